"""A lender as its borrowers call it, by gRPC."""

from collections.abc import Iterator, Mapping

import grpc

from cluster import rpc
from cluster.errors import ConfigurationError, LenderError
from cluster.lending.borrower import BorrowedFile
from cluster.lending.service import MAX_READ_BYTES, MAX_SMALL_BYTES
from cluster.security import Security
from model.hub import is_small_file, is_weight_file
from protos import lender_pb2
from protos.lender_pb2_grpc import LenderStub

LIST_TIMEOUT_S = 10.0

READ_TIMEOUT_S = 30.0
"""Of one call: half a MB per second, and the wait for a turn."""


class LenderCalls:
    """Calls lenders, each over a channel that is kept. A `Transport`; owned by one thread."""

    max_bytes = MAX_READ_BYTES

    def __init__(self, security: Security) -> None:
        self._security = security
        self._channels: dict[str, grpc.Channel] = {}

    def files(self, address: str, weights: str) -> Mapping[str, BorrowedFile]:
        """See Transport. Of what a lender lists only what belongs to a checkpoint is taken."""
        request = lender_pb2.ListRequest(weights=weights)
        try:
            reply = self._stub(address).List(request, timeout=LIST_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._failed(address, error) from error
        found = {
            file.name: BorrowedFile(file.num_bytes, file.sha256)
            for file in reply.files
            if is_weight_file(file.name)
            or (is_small_file(file.name) and file.num_bytes <= MAX_SMALL_BYTES)
        }
        if not found:
            raise LenderError("it has no file of a checkpoint")
        return found

    def read(
        self, address: str, weights: str, name: str, offset: int, length: int
    ) -> Iterator[bytes]:
        """See Transport."""
        request = lender_pb2.ReadRequest(weights=weights, name=name, offset=offset, length=length)
        call = self._stub(address).Read(request, timeout=READ_TIMEOUT_S)
        try:
            for reply in call:
                yield reply.data
        except grpc.RpcError as error:
            raise self._failed(address, error) from error
        finally:
            call.cancel()

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _stub(self, address: str) -> LenderStub:
        if address not in self._channels:
            try:
                self._channels[address] = rpc.new_channel(address, self._security, "worker")
            except ConfigurationError as error:  # certificates are being renewed
                raise LenderError(str(error)) from error
        return LenderStub(self._channels[address])

    def _failed(self, address: str, error: grpc.RpcError) -> LenderError:
        """What to say. The channel goes, too: a lender that comes back has a new one."""
        self._channels.pop(address).close()
        return LenderError(rpc.describe(error))
