"""An expert worker and a head, each in a process of its own, to be fuzzed."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from cluster import rpc
from cluster.bench.workers import FromCheckpoint, running_workers
from cluster.config import ServeConfig
from cluster.head.build import new_compiler, new_engine
from cluster.head.service import HeadService
from cluster.metrics import HeadMetrics
from model import TINY, Mixtral
from model.config import MixtralConfig
from model.weights import Checkpoint
from protos import head_pb2_grpc

START_TIMEOUT_S = 120.0
"""Until a head listens; only a hang comes near it."""


@dataclass(frozen=True)
class Server:
    """Where it listens, and its process."""

    address: str
    pid: int


@contextmanager
def fuzzed_worker() -> Iterator[Server]:
    """A worker that holds all of the tiny model's experts in float32."""
    units = MixtralConfig.from_folder(TINY).expert_units
    maker = FromCheckpoint(TINY, units, dtype="float32", quantization=None)
    with running_workers([maker], num_threads=1) as (worker,):
        yield Server(worker.address, worker.pid)


@contextmanager
def fuzzed_head() -> Iterator[Server]:
    """A head with the tiny model in float32, experts included."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve_head, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        assert ours.poll(START_TIMEOUT_S), "the head does not start"
        yield Server(ours.recv(), process.pid)
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _serve_head(connection: Connection) -> None:
    """A head's life, until the connection closes or the engine dies."""
    torch.set_num_threads(1)
    mixtral = Mixtral.load(TINY, dtype="float32")
    metrics = HeadMetrics()
    grammars = new_compiler(Checkpoint(TINY, dtype=torch.float32))
    config = ServeConfig(kv_cache_bytes=64 << 20, max_running_sequences=16)
    engine = new_engine(config, mixtral.decoder, mixtral.experts, metrics, grammars)
    service = HeadService(engine, rpc.Identity("head", "tiny"), metrics, grammars)
    server, address = rpc.new_server("127.0.0.1", observe_refusal=metrics.observe_refusal)
    head_pb2_grpc.add_HeadServicer_to_server(service, server)
    server.start()
    threading.Thread(target=_stop_with, args=(connection, engine.stop), daemon=True).start()
    connection.send(address)
    engine.run()
    server.stop(None).wait()


def _stop_with(connection: Connection, stop: Callable[[], None]) -> None:
    try:
        connection.recv()
    except EOFError:
        stop()
