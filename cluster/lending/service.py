"""The lender's gRPC side: the files of one checkpoint, by name, offset and length. Knows no Ray.

Only what was found in the folder at the start can be asked for, by the name that it was listed
under: a path from a caller is never opened.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import BoundedSemaphore
from typing import NoReturn

import grpc

from cluster.log import RareWarnings
from model.hub import is_small_file, is_weight_file
from protos import lender_pb2
from protos.lender_pb2_grpc import LenderServicer

logger = logging.getLogger(__name__)

MAX_READ_BYTES = 16 * 2**20
"""Of one call, so that its deadline can be short."""

CHUNK_BYTES = 2**20
"""Of one message."""

MAX_READS = 8
"""At a time. Those beyond wait for their turn."""

TURN_TIMEOUT_S = 10.0
"""How long they do; then the caller may ask elsewhere."""

MAX_SMALL_BYTES = 64 * 2**20
"""Of a file that is copied whole; the largest tokenizers have a tenth."""


@dataclass(frozen=True)
class LentFile:
    """A file as it was at the start. sha256: empty for weights."""

    path: Path
    num_bytes: int
    changed_ns: int
    sha256: bytes


def lent_files(folder: Path) -> dict[str, LentFile]:
    """The files of a checkpoint, by their names within its folder. Raises OSError.

    Links that lead out of the folder are left out, with a warning.
    """
    found = {}
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_small = is_small_file(name)
        if not (is_small or is_weight_file(name)) or not path.is_file():
            continue
        if not path.resolve().is_relative_to(root):
            logger.warning("%s is a link out of %s: other nodes do not get it", path, folder)
            continue
        status = path.stat()
        if is_small and status.st_size > MAX_SMALL_BYTES:
            logger.warning("%s has %d bytes: other nodes do not get it", path, status.st_size)
            continue
        digest = sha256(path.read_bytes()).digest() if is_small else b""
        found[name] = LentFile(path, status.st_size, status.st_mtime_ns, digest)
    return found


class LenderService(LenderServicer):
    """Answers whoever lacks the folder. Called in threads of the gRPC server's."""

    def __init__(self, folder: Path, weights: str) -> None:
        """weights: the `Checkpoint.sample` of the folder. Raises OSError."""
        self._folder = folder
        self._weights = weights
        self._files = lent_files(folder)
        self._turns = BoundedSemaphore(MAX_READS)
        self._warnings = RareWarnings(logger)

    def List(  # noqa: N802 (gRPC's name)
        self, request: lender_pb2.ListRequest, context: grpc.ServicerContext
    ) -> lender_pb2.ListReply:
        self._check_weights(request.weights, context)
        return lender_pb2.ListReply(
            files=[
                lender_pb2.File(name=name, num_bytes=file.num_bytes, sha256=file.sha256)
                for name, file in self._files.items()
            ]
        )

    def Read(  # noqa: N802
        self, request: lender_pb2.ReadRequest, context: grpc.ServicerContext
    ) -> Iterator[lender_pb2.ReadReply]:
        self._check_weights(request.weights, context)
        file = self._files.get(request.name)
        if file is None:
            self._refuse(context, grpc.StatusCode.NOT_FOUND, f"there is no {request.name[:200]!r}")
        if not 0 < request.length <= MAX_READ_BYTES:
            self._refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{request.length} bytes at once; {MAX_READ_BYTES} are the most",
            )
        if request.offset + request.length > file.num_bytes:
            self._refuse(
                context,
                grpc.StatusCode.OUT_OF_RANGE,
                f"{request.name} has {file.num_bytes} bytes, none at "
                f"{request.offset} + {request.length}",
            )
        if not self._turns.acquire(timeout=TURN_TIMEOUT_S):
            self._refuse(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_READS} others read, and none has ended for {TURN_TIMEOUT_S:.0f} s",
            )
        try:
            yield from self._read(file, request.offset, request.length, context)
        finally:
            self._turns.release()

    def _read(
        self, file: LentFile, offset: int, length: int, context: grpc.ServicerContext
    ) -> Iterator[lender_pb2.ReadReply]:
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._refuse(context, grpc.StatusCode.UNAVAILABLE, str(error))
        try:
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != (file.num_bytes, file.changed_ns):
                self._refuse(
                    context,
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"{file.path} has changed since this lender has started",
                )
            end = offset + length
            while offset < end:
                data = os.pread(descriptor, min(CHUNK_BYTES, end - offset), offset)
                if not data:
                    self._refuse(context, grpc.StatusCode.DATA_LOSS, f"{file.path} has been cut")
                offset += len(data)
                yield lender_pb2.ReadReply(data=data)
        except OSError as error:
            self._refuse(context, grpc.StatusCode.UNAVAILABLE, str(error))
        finally:
            os.close(descriptor)

    def _check_weights(self, wanted: str, context: grpc.ServicerContext) -> None:
        if wanted != self._weights:
            self._refuse(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{self._folder} holds the weights {self._weights}, not {wanted[:64]}",
            )

    def _refuse(
        self, context: grpc.ServicerContext, code: grpc.StatusCode, message: str
    ) -> NoReturn:
        self._warnings.warn(code.name, f"{context.peer()}: {message}")
        context.abort(code, message)
        raise AssertionError("abort raises")
