"""Weight files: which tensors they hold, and reading runs of them. Knows no model.

safetensors files are read with plain reads straight into the tensor that is kept. The library would
map the whole file writable, which Linux refuses for a file larger than memory and swap, though a
worker wants a small part of it (seen with 200 GB on a machine of 24 GB).
"""

import fnmatch
import hashlib
import json
import struct
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from os import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from model.errors import CheckpointError
from model.weight_folder import LocalFolder, WeightFolder

_MAX_HEADER_BYTES = 100_000_000  # the format's own bound

_NUM_SAMPLES, _SAMPLE_BYTES = 2048, 4096
"""Of all files together: enough to meet most tensors, and read in a second from any disk."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0
    """Where its bytes begin in a safetensors file."""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """One safetensors file; only its header is kept."""

    def __init__(self, path: Path, folder: WeightFolder | None = None) -> None:
        """folder: what opens the file by its name; None for the path's own.

        Raises CheckpointError when the header is damaged or the file is cut.
        """
        self.path = path
        self._folder = folder or LocalFolder(path.parent)
        try:
            with BufferedReader(self._folder.open(path.name)) as file:
                self.tensors: Mapping[str, StoredTensor] = _read_header(file)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist") from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a sound safetensors file: {error}") from error

    def read(self, name: str, offset: int, out: Tensor, row_stride: int | None = None) -> None:
        """Fill `out` (contiguous, CPU, the stored dtype) from element `offset` on.

        row_stride: elements from one row of `out` (two axes) to the next; None where they follow
            each other. Raises CheckpointError.
        """
        rows = out.view(1, -1) if row_stride is None else out
        row_begin = self.tensors[name].begin + offset * out.itemsize
        try:
            with self._folder.open(self.path.name) as file:
                for row in rows.view(torch.uint8).numpy():
                    file.seek(row_begin)
                    row_begin += (row_stride or 0) * out.itemsize
                    unread = row.data
                    while unread:
                        num_read = file.readinto(unread)
                        if not num_read:
                            raise CheckpointError(f"{self.path}: the file ends within {name}")
                        unread = unread[num_read:]
                    _count_in(row.data)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error


class PickleFile:
    """One `.pt` file, mapped; unpickling is limited to tensors and plain containers."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when the file holds anything but named tensors."""
        self.path = path
        try:
            _check_archive(path)
            content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist") from error
        except Exception as error:  # a pickle is a program: a damaged one may raise anything
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{path} cannot be loaded as tensors only: {reason}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
        for name, tensor in content.items():
            if not isinstance(name, str) or not _is_plain(tensor):
                raise CheckpointError(f"{path}: {name!r} is not a plain tensor")
        self._tensors: dict[str, Tensor] = content
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(tensor.dtype, tuple(tensor.shape))
            for name, tensor in content.items()
        }

    def read(self, name: str, offset: int, out: Tensor, row_stride: int | None = None) -> None:
        """Fill `out` (contiguous, the stored dtype) from element `offset` on; see the other file's
        `read`.
        """
        rows = out.view(1, -1) if row_stride is None else out
        stored = self._tensors[name].view(-1)[offset:]
        rows.copy_(stored.as_strided(rows.shape, (row_stride or 0, 1), stored.storage_offset()))
        _count_in(rows.view(torch.uint8).numpy().data)


WeightFile = SafetensorsFile | PickleFile

_digest: ContextVar["hashlib._Hash | None"] = ContextVar("digest of what is read", default=None)


@contextmanager
def digested() -> Iterator["hashlib._Hash"]:
    """SHA-256 over all values that the block reads from weight files in this thread: as they are
    stored, before any conversion, in the order in which they are read.
    """
    digest = hashlib.sha256()
    token = _digest.set(digest)
    try:
        yield digest
    finally:
        _digest.reset(token)


def _count_in(values: memoryview) -> None:
    if (digest := _digest.get()) is not None:
        digest.update(values)


def sampled(folder: WeightFolder, names: Collection[str]) -> str:
    """A digest of names, sizes and samples of these files: the same wherever their bytes are. It
    tells other content apart; single damaged bytes it does not see.

    Raises CheckpointError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    num_samples = max(2, _NUM_SAMPLES // max(1, len(names)))
    for name in sorted(names):
        try:
            with folder.open(name) as file:
                num_bytes = file.seek(0, SEEK_END)
                digest.update(f"{name} {num_bytes}\n".encode())
                last_begin = max(0, num_bytes - _SAMPLE_BYTES)
                for number in range(num_samples):
                    file.seek(last_begin * number // (num_samples - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise CheckpointError(f"{folder.path / name} cannot be read: {error}") from error
    return digest.hexdigest()[:16]


class WeightFiles:
    """The weight files of a checkpoint folder, opened when first needed."""

    def __init__(self, folder: WeightFolder) -> None:
        """Find the files: Hugging Face's, else Mistral's, safetensors before `.pt`.

        Raises CheckpointError when there are none, or their index or first header is damaged.
        """
        self.folder = folder
        self.is_mistrals = False
        self._opened: dict[str, WeightFile] = {}
        try:
            names = sorted(folder.names())
        except OSError as error:
            raise CheckpointError(f"{folder.path} cannot be read: {error}") from error
        for stem in ("model", "consolidated"):
            self.is_mistrals = stem == "consolidated"
            index_file, single_file = f"{stem}.safetensors.index.json", f"{stem}.safetensors"
            if index_file in names:
                self.file_of: Mapping[str, str] = _read_index(folder, index_file)
                return
            if single_file in names:
                self.file_of = dict.fromkeys(self.open(single_file).tensors, single_file)
                return
        released = fnmatch.filter(names, "consolidated*.safetensors")
        released = released or fnmatch.filter(names, "consolidated*.pt")
        if not released:
            raise CheckpointError(
                f"{folder.path} holds no weights: neither model.safetensors, nor "
                "model.safetensors.index.json, nor consolidated*.safetensors, nor consolidated*.pt"
            )
        # a later file wins, as in Mistral's own loader
        self.file_of = {tensor: name for name in released for tensor in self.open(name).tensors}

    def path(self, file_name: str) -> Path:
        """Of a file, for messages."""
        return self.folder.path / file_name

    def open(self, file_name: str) -> WeightFile:
        """The file of that name. Raises CheckpointError when it is missing or damaged."""
        if file_name not in self._opened:
            path = self.path(file_name)
            if path.suffix != ".pt":
                self._opened[file_name] = SafetensorsFile(path, self.folder)
            elif isinstance(self.folder, LocalFolder):
                self._opened[file_name] = PickleFile(path)
            else:
                raise CheckpointError(f"{path} is no safetensors file, so it must lie on this node")
        return self._opened[file_name]


def _read_header(file: BinaryIO) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises OSError, or ValueError saying what is wrong."""
    file_bytes = file.seek(0, SEEK_END)
    file.seek(0)
    length_field = file.read(8)
    if len(length_field) < 8:
        raise ValueError(f"the file has only {len(length_field)} bytes")
    (header_bytes,) = struct.unpack("<Q", length_field)
    data_bytes = file_bytes - 8 - header_bytes
    if header_bytes > _MAX_HEADER_BYTES or data_bytes < 0:
        raise ValueError(f"a header of {header_bytes} bytes in a file of {file_bytes}")
    header = json.loads(file.read(header_bytes), object_pairs_hook=_no_name_twice)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    ends: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        tensor, begin, end = _read_entry(name, entry)
        if end - begin != tensor.num_bytes:
            raise ValueError(f"{name} has {end - begin} bytes, its shape {tensor.num_bytes}")
        tensors[name] = StoredTensor(tensor.dtype, tensor.shape, 8 + header_bytes + begin)
        ends.append((begin, end, name))
    # the tensors must fill the rest of the file: no gap, no overlap, nothing cut, nothing after
    expected = 0
    for begin, end, name in sorted(ends):
        if begin != expected:
            raise ValueError(f"{name} begins at byte {begin} of the data, not at {expected}")
        expected = end
    if expected != data_bytes:
        raise ValueError(f"the tensors take {expected} bytes, the file has {data_bytes} for them")
    return tensors


def _read_entry(name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} has no description")
    dtype = _DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise ValueError(f"{name} has the unknown dtype {entry.get('dtype')!r}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has the shape {shape!r} at the bytes {offsets!r}")
    return StoredTensor(dtype, tuple(shape)), offsets[0], offsets[1]


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("the header names something twice")
    return content


def _check_archive(path: Path) -> None:
    """Check what torch does not: the directory of a `.pt` file, which is a zip archive.

    Without this, one flipped bit can make it take a tensor's values from a few bytes further on.
    The values themselves are not read. Raises what `zipfile` raises, or ValueError.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        next_offsets = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
        for entry, next_offset in zip(entries, next_offsets, strict=True):
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            with archive.open(entry) as content:  # compares the name with the entry's own header
                if "/data/" not in entry.filename:
                    content.read()  # compares the checksum
            file.seek(entry.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
            begin = entry.header_offset + 30 + name_bytes + extra_bytes
            # torch begins entries at multiples of 64, with at most 24 bytes after the one before
            gap = next_offset - begin - entry.file_size
            if begin % 64 or not 0 <= gap <= 24:
                raise ValueError(f"{entry.filename} does not lie where its neighbours leave room")


def _is_plain(tensor: Any) -> bool:
    """Whether it is a contiguous tensor in main memory that stays within its storage."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.is_contiguous()
        and (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
        <= tensor.untyped_storage().nbytes()
    )


def _read_index(folder: WeightFolder, name: str) -> dict[str, str]:
    """Which file holds which tensor."""
    try:
        with BufferedReader(folder.open(name)) as file:
            weight_map = json.loads(file.read())["weight_map"]
        return {str(name): _plain_name(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = f"is not an index of shards: {error!r}"
        raise CheckpointError(f"{folder.path / name} {reason}") from error


def _plain_name(file_name: str) -> str:
    """A shard's name as the index gives it; it may not lead out of the folder."""
    if Path(file_name).name != file_name or file_name in ("", ".."):
        raise ValueError(f"{file_name!r} is not a plain file name")
    return file_name
