"""A program: lends a checkpoint's folder until its input ends. Prints its address."""

import sys
from pathlib import Path

import grpc

from cluster import rpc
from cluster.lending.service import LenderService
from cluster.security import Security
from protos.lender_pb2_grpc import add_LenderServicer_to_server


def lend(
    folder: Path, weights: str, security: Security = rpc.LOOPBACK_ONLY
) -> tuple[grpc.Server, str]:
    """A server that lends a folder, and its address."""
    server, address = rpc.new_server("127.0.0.1", security)
    add_LenderServicer_to_server(LenderService(folder, weights), server)
    server.start()
    return server, address


if __name__ == "__main__":
    _, its_address = lend(Path(sys.argv[1]), sys.argv[2])
    print(its_address, flush=True)
    sys.stdin.read()
