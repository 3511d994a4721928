"""Expert workers for a benchmark: processes of their own, on loopback, without Ray."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from cluster import rpc
from cluster.bench.memory import above, pss_bytes
from cluster.errors import BenchError
from cluster.expert.batcher import Batcher, Held
from cluster.expert.service import ExpertService
from cluster.head.dispatch import RemoteExperts
from cluster.head.feed import PlacementFeed
from cluster.metrics import WorkerMetrics
from cluster.placement import Placement, Table, WorkerInfo, held_by
from model.config import MixtralConfig
from model.phases import Phases
from model.units import Unit
from model.weights import Checkpoint, torch_dtype

STOP_TIMEOUT_S = 5.0
RECOVERY_TIMEOUT_S = 1.0
"""No worker comes back here: one that is lost ends the benchmark soon."""


@dataclass(frozen=True)
class Holding:
    """What a worker holds and answers for."""

    config: MixtralConfig
    dtype: torch.dtype
    held: Held


class FromCheckpoint:
    """Experts of a checkpoint. Called in the worker's process."""

    def __init__(
        self,
        folder: Path,
        units: Sequence[Unit],
        *,
        dtype: str | None,
        quantization: str | None,
    ) -> None:
        self._folder = folder
        self._units = units
        self._dtype = dtype
        self._quantization = quantization

    def __call__(self) -> Holding:
        checkpoint = Checkpoint(
            self._folder, dtype=torch_dtype(self._dtype), expert_quantization=self._quantization
        )
        experts = checkpoint.load_experts(self._units)
        return Holding(checkpoint.config, checkpoint.dtype, experts)


@dataclass(frozen=True)
class Worker:
    """A worker process that answers."""

    address: str
    incarnation: int
    pid: int
    idle_bytes: int | None
    """Its memory before it held anything."""

    @property
    def held_bytes(self) -> int | None:
        """Its memory above that."""
        return above(pss_bytes(self.pid), self.idle_bytes)


@contextmanager
def running_workers(
    makers: Sequence[Callable[[], Holding]],
    *,
    num_threads: int,
    unix_socket: str | None = None,
    offers_pipe: bool = True,
) -> Iterator[list[Worker]]:
    """One process for each maker, which calls it; they end with the block.

    unix_socket: path that gRPC listens on as well. offers_pipe: else all goes by gRPC.
    Raises BenchError when one cannot start.
    """
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        connections = []
        for maker in makers:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_serve,
                args=(theirs, maker, num_threads, unix_socket, offers_pipe),
                daemon=True,
            )
            process.start()
            theirs.close()
            stack.callback(process.join, STOP_TIMEOUT_S)
            stack.callback(ours.close)  # first: it is what ends the process
            connections.append(ours)
        yield [_started(connection, index) for index, connection in enumerate(connections)]


def connected(
    workers: Sequence[Worker],
    table: Table,
    holding: tuple[MixtralConfig, torch.dtype],
    phases: Phases,
    *,
    timeout_s: float,
    addresses: Sequence[str] | None = None,
) -> RemoteExperts:
    """Experts on these workers, as `table` spreads them. The caller closes them.

    addresses: to use in place of the workers' own. Raises BenchError.
    """
    infos = tuple(
        WorkerInfo(f"worker-{index}", address, worker.incarnation, 0)
        for index, (worker, address) in enumerate(
            zip(workers, addresses or [worker.address for worker in workers], strict=True)
        )
    )
    feed = PlacementFeed()
    feed.put(Placement(1, infos, table))
    experts = RemoteExperts(
        feed,
        rpc.Identity("bench", _fingerprint(*holding)),
        timeout_s=timeout_s,
        recovery_timeout_s=RECOVERY_TIMEOUT_S,
        phases=phases,
    )
    if not experts.connect(rpc.HANDSHAKE_TIMEOUT_S):
        experts.close()
        raise BenchError(f"no connection to all of the workers at {[i.address for i in infos]}")
    return experts


def makers_for(
    folder: Path, table: Table, num_workers: int, *, dtype: str | None, quantization: str | None
) -> list[FromCheckpoint]:
    """What each of these workers is to hold."""
    return [
        FromCheckpoint(folder, held_by(table, index), dtype=dtype, quantization=quantization)
        for index in range(num_workers)
    ]


def _started(connection: Connection, index: int) -> Worker:
    """Wait for a worker; however long its experts take to load, it answers or ends."""
    try:
        answer = connection.recv()
    except EOFError as error:
        raise BenchError(f"worker {index} ended while it started") from error
    if not isinstance(answer, Worker):
        raise BenchError(f"worker {index} cannot start: {answer}")
    return answer


def _serve(
    connection: Connection,
    maker: Callable[[], Holding],
    num_threads: int,
    unix_socket: str | None,
    offers_pipe: bool,
) -> None:
    """A worker's life: load, say where, answer until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends us
    torch.set_num_threads(num_threads)
    idle_bytes = pss_bytes(os.getpid())
    try:
        holding = maker()
        metrics = WorkerMetrics()
        identity = rpc.Identity("worker", _fingerprint(holding.config, holding.dtype))
        service = ExpertService(
            Batcher(holding.held, metrics),
            holding.config,
            holding.dtype,
            torch.device("cpu"),
            identity,
            metrics,
            lambda unit: False,  # nothing is cross-checked here
        )
        server, address = rpc.new_server("127.0.0.1", observe_refusal=metrics.observe_refusal)
        if unix_socket is not None:
            server.add_insecure_port(f"unix:{unix_socket}")
        service.add_to(server)
        if not offers_pipe:
            identity.pipe = ""
        server.start()
    except Exception as error:
        # The parent's to tell; whatever it was, this process has no other word.
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(Worker(address, identity.incarnation, os.getpid(), idle_bytes))
    try:
        connection.recv()
    except EOFError:
        service.end(server, 0)


def _fingerprint(config: MixtralConfig, dtype: torch.dtype) -> str:
    return rpc.fingerprint(config, str(dtype).removeprefix("torch."))
