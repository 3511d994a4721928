"""Real servers: gRPC workers in this process, and a whole service in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from cluster.app import free_port
from cluster.client import Client
from model import TINY
from model.weights import Checkpoint
from tests import faults
from tests.integration.workers import WorkerServer

START_TIMEOUT_S = 120


@dataclass
class Service:
    """A `maestrale serve` of its own, with what it has printed."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""
    grpc_address: str = ""
    """Of the users' gRPC API."""
    _found: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(cls, *flags: str) -> "Service":
        """Start, and wait until it serves."""
        command = [sys.executable, "-m", "cluster.cli", "serve", "--port", "0", *flags]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        service = cls(process)
        threading.Thread(target=service._read, daemon=True).start()
        if not service._found.wait(START_TIMEOUT_S):
            service.stop()
            raise AssertionError("the service did not start:\n" + "".join(service.lines))
        assert service.url, "the service ended:\n" + "".join(service.lines)
        return service

    def client(self) -> Client:
        """One that asks once and shows every break: it is the service that is tested."""
        return Client(self.url, timeout=60, max_retries=0)

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Ask it to stop and wait for the end; returns its exit code.

        One that hangs is killed with all that it has started, and the test fails.
        """
        if signum == signal.SIGINT:
            os.killpg(self.process.pid, signum)
        else:
            self.process.send_signal(signum)
        try:
            return self.process.wait(timeout=60)
        finally:
            if self.process.poll() is None:
                faults.kill_all(self.process.pid)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(r"at (http://\S+)/v1", line):
                self.url = match[1]
                if by_grpc := re.search(r"by gRPC at (\S+)", line):
                    self.grpc_address = by_grpc[1]
                self._found.set()
        self._found.set()


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """Head, two workers, ingress on a Ray of their own, in float32, so that ids are exact."""
    grpc_port = str(free_port("127.0.0.1"))
    service = Service.start("--dtype", "float32", "--workers", "2", "--grpc-port", grpc_port)
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[Client]:
    with service.client() as client:
        yield client


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    import torch

    return Checkpoint(TINY, dtype=torch.float32)


@pytest.fixture
def two_workers(checkpoint: Checkpoint) -> Iterator[list[WorkerServer]]:
    """Two gRPC servers with half of the experts each, without Ray."""
    servers = [WorkerServer(f"worker-{index}", checkpoint) for index in range(2)]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()
