"""What sending late rows to a second copy gains, where a worker stalls now and then.

Two worker processes with a copy of every expert each, one of which stalls for a while before some
of its calls. Two heads on the same workers take turns, a text each: one sends late rows twice. Both
must tell the same text.

    python -m tests.bench.hedged [--budget 0.02] [--stall-ms 50] [--share 0.01] [--rounds 20]
                                 [--grpc]
"""

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families

from cluster import rpc
from cluster.bench.workers import FromCheckpoint, Holding, running_workers
from cluster.expert.batcher import Batcher
from cluster.head.dispatch import RemoteExperts
from cluster.head.feed import PlacementFeed
from cluster.metrics import HeadMetrics
from cluster.placement import Placement, Table, WorkerInfo
from model import TINY, Mixtral
from model.sampling_params import SamplingParams
from model.weights import Checkpoint

DTYPE = "float32"
NUM_TOKENS = 64
TIMEOUT_S = 30.0
WARM_UP_ROUNDS = 3


class Stalling(FromCheckpoint):
    """Experts whose calls stall now and then. Called in the worker's process."""

    def __init__(self, *args: Any, share: float, stall_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._share = share
        self._stall_s = stall_s

    def __call__(self) -> Holding:
        draw, compute = random.Random(0), Batcher.compute

        def late(batcher: Batcher, *args: Any) -> torch.Tensor:
            if draw.random() < self._share:
                time.sleep(self._stall_s)  # the fault that hedging is measured by
            return compute(batcher, *args)

        Batcher.compute = late  # type: ignore[method-assign]
        return super().__call__()


class Head:
    """Tells texts on these workers, and keeps how long each step took."""

    def __init__(
        self, mixtral: Mixtral, checkpoint: Checkpoint, placement: Placement, budget: float
    ) -> None:
        self.metrics = HeadMetrics()
        self.seconds: list[float] = []
        feed = PlacementFeed()
        feed.put(placement)
        self.experts = RemoteExperts(
            feed,
            rpc.Identity("bench", rpc.fingerprint(checkpoint.config, DTYPE)),
            timeout_s=TIMEOUT_S,
            recovery_timeout_s=TIMEOUT_S,
            metrics=self.metrics,
            hedge_budget=budget,
        )
        assert self.experts.connect(rpc.HANDSHAKE_TIMEOUT_S)
        self._mixtral = Mixtral(mixtral.decoder, self.experts, mixtral.tokenizer, mixtral.chat)

    def tell(self, prompt: Sequence[int]) -> list[list[int]]:
        """A text; the time of its first step, the prompt's, is not kept."""
        before = None

        def on_token(_index: int, _token_id: int) -> None:
            nonlocal before
            now = time.perf_counter()
            if before is not None:
                self.seconds.append(now - before)
            before = now

        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, min_tokens=NUM_TOKENS)
        return self._mixtral.generate_ids([prompt], [params], on_token)

    def describe(self) -> str:
        """Percentiles of a step in ms, and the rows that were sent twice."""
        steps = sorted(self.seconds)
        points = (steps[int(share * (len(steps) - 1))] * 1e3 for share in (0.5, 0.95, 0.99, 0.999))
        hedged = {
            sample.labels["outcome"]: int(sample.value)
            for family in text_string_to_metric_families(self.metrics.exposition())
            for sample in family.samples
            if sample.name == "maestrale_expert_rows_hedged_total"
        }
        mean = sum(steps) / len(steps) * 1e3
        times = " | ".join(f"{point:.1f}" for point in points)
        return f"{times} | {mean:.1f} | {len(steps)} steps, rows sent twice: {hedged}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=0.02)
    parser.add_argument("--stall-ms", type=float, default=50.0)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--grpc", action="store_true", help="not by the pipe of one host")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint(TINY, dtype=torch.float32)
    config = checkpoint.config
    mixtral = Mixtral.load(dtype=DTYPE)
    prompt = mixtral.tokenizer.encode_prompt("Once upon a time")
    table: Table = ((((0,), (1,)),) * config.num_local_experts,) * config.num_hidden_layers
    units = list(config.expert_units)
    makers = [
        Stalling(
            TINY,
            units,
            dtype=DTYPE,
            quantization=None,
            share=share,
            stall_s=wanted.stall_ms / 1e3,
        )
        for share in (0.0, wanted.share)
    ]
    with ExitStack() as stack:
        workers = stack.enter_context(
            running_workers(makers, num_threads=1, offers_pipe=not wanted.grpc)
        )
        infos = tuple(
            WorkerInfo(f"worker-{index}", worker.address, worker.incarnation, 0)
            for index, worker in enumerate(workers)
        )
        heads = {
            budget: Head(mixtral, checkpoint, Placement(1, infos, table), budget)
            for budget in (0.0, wanted.budget)
        }
        for head in heads.values():
            stack.callback(head.experts.close)
        for number in range(WARM_UP_ROUNDS + wanted.rounds):
            if number == WARM_UP_ROUNDS:
                for head in heads.values():
                    head.seconds.clear()
            texts = [head.tell(prompt) for head in heads.values()]
            assert texts[0] == texts[1]
        print("budget | p50 | p95 | p99 | p99.9 | mean, ms")
        for budget, head in heads.items():
            print(f"{budget} | {head.describe()}")


if __name__ == "__main__":
    main()
