"""Heads without Ray: an engine, its service and a real gRPC server, in this process."""

from collections.abc import Iterator
from contextlib import contextmanager

from cluster import rpc
from cluster.head.service import HeadService
from cluster.placement import HeadInfo
from model import Mixtral
from protos import head_pb2_grpc
from tests.cluster_fakes import Head

FINGERPRINT = "tiny"


class HeadServer:
    """One head that computes its experts itself."""

    def __init__(self, name: str, mixtral: Mixtral) -> None:
        self.name = name
        self.head = Head(mixtral, num_blocks=200, max_running=16)
        identity = rpc.Identity(name, FINGERPRINT)
        self.service = HeadService(self.head.engine, identity, self.head.metrics)
        self.server, self.address = rpc.new_server("127.0.0.1")
        head_pb2_grpc.add_HeadServicer_to_server(self.service, self.server)

    def info(self, address: str | None = None) -> HeadInfo:
        """address: of a proxy before it."""
        return HeadInfo(self.name, address or self.address)

    @contextmanager
    def running(self) -> Iterator["HeadServer"]:
        with self.head.running():
            self.server.start()
            try:
                yield self
            finally:
                self.server.stop(None).wait()
