"""Reading a checkpoint's files from lenders: one at a time, the next where one fails. No gRPC.

A borrowed file can be read from any offset like one on disk, straight into the caller's memory, so
that nothing but the tensors that are asked for crosses the network, and nothing is kept on disk.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import SEEK_CUR, SEEK_END, SEEK_SET, RawIOBase
from pathlib import Path
from typing import Protocol

from cluster.errors import FilesUnavailableError, LenderError

logger = logging.getLogger(__name__)

Buffer = bytearray | memoryview

PATIENCE_S = 60.0
"""How long nothing may have come from any lender before a read fails: longer than others take to
be started, also by another controller."""

PAUSE_S = 1.0
"""Before all are asked once more."""

AHEAD_BYTES = 2**20
"""Read at once where small reads follow each other closely, such as the rows of a slice."""


@dataclass(frozen=True)
class LenderInfo:
    """Where a lender is, and what it has: the model as configured, and its `Checkpoint.sample`."""

    address: str
    model: Path
    weights: str


@dataclass(frozen=True)
class BorrowedFile:
    """A file as lenders list it. sha256: empty for weights."""

    num_bytes: int
    sha256: bytes


class Transport(Protocol):
    """Calls of one lender by its address. Both raise LenderError, saying what went wrong."""

    def files(self, address: str, weights: str) -> Mapping[str, BorrowedFile]:
        """What it has, by name."""

    def read(
        self, address: str, weights: str, name: str, offset: int, length: int
    ) -> Iterator[memoryview | bytes]:
        """So many bytes of a file, in pieces; fewer where it ends early."""

    max_bytes: int
    """Of one read."""


class Borrower:
    """Asks the lenders that there are. Not thread-safe."""

    def __init__(
        self,
        transport: Transport,
        find_lenders: Callable[[], Sequence[LenderInfo]],
        model: Path,
        path: Path,
        weights: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """find_lenders: of any model, as they are now.
        model: as configured; its lenders are asked. path: what that is on this node, for messages.
        weights: the `Checkpoint.sample` wanted; None for that of the first lender found.
        """
        self.path = path
        self._transport = transport
        self._find_lenders = find_lenders
        self._model = model
        self._weights = weights
        self._clock = clock
        self._sleep = sleep
        self._lenders: list[str] = []
        """Addresses, as they were last found."""
        self._chosen: str | None = None

    def __repr__(self) -> str:
        return f"Borrower({self.path}, from {self._chosen} of {self._lenders})"

    def files(self) -> Mapping[str, BorrowedFile]:
        """All there are, by name. Raises FilesUnavailableError."""
        found: Mapping[str, BorrowedFile] = {}

        def ask(lender: str, weights: str) -> Iterator[None]:
            nonlocal found
            found = self._transport.files(lender, weights)
            yield

        self._from_any("the list of its files", ask, lambda: not found)
        return found

    def read_into(self, name: str, offset: int, out: Buffer) -> None:
        """Fill `out` with a file's bytes from `offset` on. Raises FilesUnavailableError.

        Where a lender fails, the next goes on with what has not arrived yet.
        """
        unread = memoryview(out)

        def read(lender: str, weights: str) -> Iterator[None]:
            nonlocal unread
            length = min(len(unread), self._transport.max_bytes)
            begin = offset + len(out) - len(unread)
            for piece in self._transport.read(lender, weights, name, begin, length):
                if len(piece) > length:
                    raise LenderError(f"it gives more of {name} than was asked for")
                unread[: len(piece)] = piece
                unread, length = unread[len(piece) :], length - len(piece)
                if piece:
                    yield
            if length:
                raise LenderError(f"{length} bytes of {name} did not come")

        self._from_any(name, read, lambda: len(unread) > 0)

    def _from_any(
        self,
        what: str,
        ask: Callable[[str, str], Iterator[None]],
        is_wanting: Callable[[], bool],
    ) -> None:
        """Ask one lender after the other while something is wanting.

        ask: asks the one at that address for these weights; yields whenever something has come.
        Raises FilesUnavailableError once nothing has come for PATIENCE_S.
        """
        failures: dict[str, str] = {}
        in_vain: set[str] = set()
        deadline, is_waiting = self._clock() + PATIENCE_S, False
        while is_wanting():
            lender = self._choose(in_vain)
            if lender is None or self._weights is None:
                if is_waiting:
                    if self._clock() >= deadline:
                        raise FilesUnavailableError(self._complaint(what, failures))
                    self._sleep(PAUSE_S)
                is_waiting = True
                in_vain.clear()
                self._look_round(failures)
                continue
            try:
                for _ in ask(lender, self._weights):
                    deadline, is_waiting = self._clock() + PATIENCE_S, False
            except LenderError as error:
                if failures.get(lender) != str(error):
                    logger.warning("%s from %s: %s", what, lender, error)
                failures[lender] = str(error)
                in_vain.add(lender)

    def _choose(self, in_vain: set[str]) -> str | None:
        """The lender that was asked last, else any: so that borrowers ask different ones."""
        candidates = [lender for lender in self._lenders if lender not in in_vain]
        if self._chosen not in candidates:
            self._chosen = random.choice(candidates) if candidates else None
        return self._chosen

    def _look_round(self, failures: dict[str, str]) -> None:
        """Find out who there is. failures: takes why some cannot be asked."""
        found = [info for info in self._find_lenders() if info.model == self._model]
        if found and self._weights is None:
            self._weights = found[0].weights
        self._lenders = [info.address for info in found if info.weights == self._weights]
        for info in found:
            if info.weights != self._weights:
                failures[info.address] = f"it has the weights {info.weights}, not {self._weights}"

    def _complaint(self, what: str, failures: Mapping[str, str]) -> str:
        asked = "; ".join(f"{lender}: {reason}" for lender, reason in failures.items())
        return (
            f"{self.path} is not on this node, and in {PATIENCE_S:.0f} s no other gave {what}: "
            + (f"asked {asked}" if asked else "there is none that has it and could be asked")
            + ". Put the folder on this node, or see to the nodes that have it"
        )


class BorrowedFolder:
    """A checkpoint's folder that other nodes have; a `model.weight_folder.WeightFolder`."""

    def __init__(self, borrower: Borrower) -> None:
        """Raises FilesUnavailableError."""
        self._borrower = borrower
        self.files = borrower.files()

    @property
    def path(self) -> Path:
        return self._borrower.path

    def names(self) -> list[str]:
        return list(self.files)

    def open(self, name: str) -> RawIOBase:
        if name not in self.files:
            raise FileNotFoundError(f"{name} is in no folder of a node that was asked")
        return _Reader(self._borrower, name, self.files[name].num_bytes)

    def whole(self, name: str) -> bytes:
        """A file that is not weights. Raises FilesUnavailableError, also for other content than
        was listed.
        """
        file = self.files[name]
        content = bytearray(file.num_bytes)
        self._borrower.read_into(name, 0, content)
        if sha256(content).digest() != file.sha256:
            raise FilesUnavailableError(
                f"{self.path / name}, as other nodes have it, changes: it is not what it was when "
                "it was listed; give all nodes the same files"
            )
        return bytes(content)


class _Reader(RawIOBase):
    """One borrowed file. Owned by one thread."""

    def __init__(self, borrower: Borrower, name: str, num_bytes: int) -> None:
        super().__init__()
        self._borrower = borrower
        self._name = name
        self._num_bytes = num_bytes
        self._position = 0
        self._window = memoryview(b"")
        self._window_begin = 0
        self._last_end = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET, /) -> int:
        self._check_open()
        origin = {SEEK_SET: 0, SEEK_CUR: self._position, SEEK_END: self._num_bytes}[whence]
        if origin + offset < 0:
            raise OSError(f"{self._name}: byte {origin + offset} is before its beginning")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:  # type: ignore[override]
        self._check_open()
        left = max(0, self._num_bytes - self._position)
        out = memoryview(buffer).cast("B")[:left]
        if not out:
            return 0
        begin, end = self._position, self._position + len(out)
        if len(out) >= AHEAD_BYTES or not 0 <= begin - self._last_end <= AHEAD_BYTES:
            self._borrower.read_into(self._name, begin, out)
        else:
            self._look_ahead(begin, end)
            out[:] = self._window[begin - self._window_begin : end - self._window_begin]
        self._position = self._last_end = end
        return len(out)

    def readall(self) -> bytes:
        content = bytearray(max(0, self._num_bytes - self._position))
        self.readinto(content)
        return bytes(content)

    def _look_ahead(self, begin: int, end: int) -> None:
        """Have these bytes, and those after them, in the window."""
        window_end = self._window_begin + len(self._window)
        if self._window_begin <= begin and end <= window_end:
            return
        window = memoryview(bytearray(min(AHEAD_BYTES, self._num_bytes - begin)))
        self._borrower.read_into(self._name, begin, window)
        self._window, self._window_begin = window, begin

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self._name} is closed")
