"""What micro-batches gain over a slow link, beside what the rule promises.

A head and a worker with one thread each, and between them a proxy that delivers every byte late.
With T_a and T_e the times of attention and experts of one micro-batch in one layer, F the larger of
them, and c the delay one way, a layer of m micro-batches takes max(m F, T_a + T_e + 2 c): from
m = 2 (1 + c / F) on, with T_a = T_e = F, the link is hidden (MegaScale-Infer, Zhu et al., 2025).

    python -m tests.bench.ping_pong [--rows 32] [--most 6] [--rounds 5] [--threads 1]
"""

import argparse
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

import torch

from cluster.bench.workers import connected, makers_for, running_workers
from cluster.head.dispatch import RemoteExperts
from cluster.head.stopwatch import Stopwatch
from cluster.planning import plan
from model.batch import Batch, Span, build_batch
from model.decoder import Decoder
from model.kv_cache import KVCache
from model.weights import Checkpoint
from tests.bench.make_checkpoint import make_checkpoint
from tests.faults import Proxy

NUM_LAYERS = 4
CONTEXT = 256
"""Tokens that each sequence has behind it."""
BLOCK_SIZE = 16
DELAYS = (0.5, 1.0)
"""One way, in parts of F."""
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Times:
    """Seconds of one micro-batch in one layer; `rest`: of a step, outside the layers."""

    attention: float
    experts: float
    rest: float

    @property
    def larger(self) -> float:
        return max(self.attention, self.experts)

    def predicted(self, number: int, delay_s: float) -> float:
        """Seconds of a step of so many micro-batches."""
        through = self.attention + self.experts + 2 * delay_s
        return self.rest + NUM_LAYERS * max(number * self.larger, through)


class Bench:
    """A decoder, sequences with something behind them, and steps that all compute the same."""

    def __init__(self, checkpoint: Checkpoint, *, num_sequences: int) -> None:
        self.stopwatch = Stopwatch()
        weights = checkpoint.load_decoder()
        self.decoder = Decoder(checkpoint.config, weights, phases=self.stopwatch)
        self._blocks = -(-(CONTEXT + 1) // BLOCK_SIZE)
        self._cache: KVCache = self.decoder.new_cache(
            num_blocks=num_sequences * self._blocks, block_size=BLOCK_SIZE
        )
        for tensor in self._cache.keys + self._cache.values:
            tensor.normal_()

    def batch(self, first: int, num_sequences: int) -> Batch:
        """The next token of some sequences."""
        spans = [
            Span([300 + index], CONTEXT, range(index * self._blocks, (index + 1) * self._blocks))
            for index in range(first, first + num_sequences)
        ]
        return build_batch(spans, block_size=BLOCK_SIZE, device=self.decoder.device)

    def step_s(self, batches: Sequence[Batch], experts: RemoteExperts) -> float:
        started = time.perf_counter()
        self.decoder.forward_in_turns(batches, self._cache, experts)
        return time.perf_counter() - started

    def times(self, batch: Batch, experts: RemoteExperts, rounds: int) -> Times:
        """Of a micro-batch alone, over a link without delay."""
        self.step_s([batch], experts)
        found: list[tuple[float, float, float]] = []
        for _ in range(rounds):
            self.stopwatch.take()
            whole_s = self.step_s([batch], experts)
            phases = self.stopwatch.take()
            own_s = sum(phases[p] for p in ("attention", "routing", "packing", "unpacking"))
            away_s = phases["experts"] + phases["transfer"]
            found.append((own_s, away_s, whole_s - own_s - away_s))
        own, away, rest = (median(each) for each in zip(*found, strict=True))
        return Times(own / NUM_LAYERS, away / NUM_LAYERS, rest)


@contextmanager
def delayed(address: str, delay_s: float) -> Iterator[str]:
    """Where the same worker answers late. The proxy has a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_deliver_late, args=(theirs, address, delay_s), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join()


def _deliver_late(connection: Connection, address: str, delay_s: float) -> None:
    with Proxy(address, delay_s=delay_s) as proxy:
        connection.send(proxy.address)
        try:
            connection.recv()
        except EOFError:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="sequences of a micro-batch")
    parser.add_argument("--most", type=int, default=6, help="micro-batches")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of head and worker, each")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = make_checkpoint("balanced", NUM_LAYERS)
    checkpoint = Checkpoint(folder, dtype=torch.float32)
    config = checkpoint.config
    table = plan(
        num_layers=NUM_LAYERS,
        num_experts=config.num_local_experts,
        expert_bytes=[checkpoint.expert_bytes],
        budgets=[None],
    )
    bench = Bench(checkpoint, num_sequences=given.rows * given.most)
    batches = [bench.batch(index * given.rows, given.rows) for index in range(given.most)]
    makers = makers_for(folder, table, 1, dtype="float32", quantization=None)
    workers = running_workers(makers, num_threads=given.threads, offers_pipe=False)
    with workers as (worker,):

        def connect(address: str) -> RemoteExperts:
            holding = (config, checkpoint.dtype)
            return connected(
                [worker], table, holding, bench.stopwatch, timeout_s=TIMEOUT_S, addresses=[address]
            )

        experts = connect(worker.address)
        times = bench.times(batches[0], experts, given.rounds)
        experts.close()
        print(
            f"{given.rows} rows in a micro-batch; in a layer attention takes "
            f"{1e3 * times.attention:.2f} ms, experts {1e3 * times.experts:.2f} ms\n"
        )
        print("| delay, ms | m | step, ms | predicted | measured / predicted | rows/s over m = 1 |")
        print("| --- | --- | --- | --- | --- | --- |")
        for part in DELAYS:
            delay_s = part * times.larger
            hides_from = math.ceil(2 * (1 + part))
            with delayed(worker.address, delay_s) as address:
                experts = connect(address)
                seconds = _by_turns(bench, batches, experts, given.rounds)
                experts.close()
            for number, taken in seconds.items():
                predicted = times.predicted(number, delay_s)
                gain = seconds[1] * number / taken
                note = " (hidden by the rule)" if number == hides_from else ""
                print(
                    f"| {1e3 * delay_s:.1f} ({part:g} F) | {number}{note} | {1e3 * taken:.0f} | "
                    f"{1e3 * predicted:.0f} | {taken / predicted:.2f} | {gain:.2f} |"
                )


def _by_turns(
    bench: Bench, batches: Sequence[Batch], experts: RemoteExperts, rounds: int
) -> dict[int, float]:
    """Median seconds of a step, by the number of micro-batches; the first round warms up."""
    seconds: dict[int, list[float]] = {number: [] for number in range(1, len(batches) + 1)}
    for round_number in range(-1, rounds):
        for number, taken in seconds.items():
            step_s = bench.step_s(batches[:number], experts)
            if round_number >= 0:
                taken.append(step_s)
    return {number: median(taken) for number, taken in seconds.items()}


if __name__ == "__main__":
    main()
