"""What the run asks of every engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.bench.peers.plan import Measured, Plan
from tests.bench.peers.processes import Command


@dataclass(frozen=True)
class WeightBytes:
    """Bytes that a weight takes, scales included."""

    attention: float
    expert: float
    head: float


class Engine(Protocol):
    """An engine, installed or not."""

    name: str
    precisions: Mapping[str, str]
    """What it offers of PRECISIONS, with its own word for it."""

    def prepare(self, plan: Plan) -> str:
        """Install it and make its files; returns its version. Raises PeerError."""
        ...

    def weight_bytes(self, precision: str) -> WeightBytes: ...

    def measure(self, plan: Plan, precision: str, scratch: Path, limit_s: float) -> Measured:
        """Decode and prefill. Raises PeerError."""
        ...

    def server(self, plan: Plan, precision: str, port: int) -> tuple[Command, str] | None:
        """A server, and the path that answers 200 when it is ready; None: it is not measured."""
        ...
