"""100,000 random and mutated messages on a worker's and on a head's port."""

import random
from collections.abc import Callable

import grpc
import psutil
import pytest

from cluster import rpc
from model import TINY
from model.config import MixtralConfig
from tests.fuzz_servers import Server, fuzzed_head, fuzzed_worker
from tests.fuzzing import fuzz_head, fuzz_worker

pytestmark = pytest.mark.timeout(3_600)

NUM_MESSAGES = 100_000
BATCH = 500
"""Messages between two good requests."""
MAX_GROWTH_BYTES = 32 << 20
"""Of a server's resident memory between a tenth of the run and its end."""


def soak(server: Server, fuzz: Callable[[random.Random], None]) -> None:
    """Batch after batch, each with a seed of its own, that an error names."""
    process = psutil.Process(server.pid)
    sizes = []
    for seed in range(NUM_MESSAGES // BATCH):
        try:
            fuzz(random.Random(seed))
        except (AssertionError, grpc.RpcError) as error:
            raise AssertionError(f"batch of seed {seed}: {error}") from error
        sizes.append(process.memory_info().rss)
    tenths = sizes[len(sizes) // 10 - 1 :: len(sizes) // 10]
    print(f"\n{NUM_MESSAGES} messages; MiB after each tenth: {[size >> 20 for size in tenths]}")
    assert tenths[-1] - tenths[0] <= MAX_GROWTH_BYTES


def test_a_worker_outlives_any_message() -> None:
    config = MixtralConfig.from_folder(TINY)
    with (
        fuzzed_worker() as worker,
        grpc.insecure_channel(worker.address, options=rpc.CHANNEL_OPTIONS) as channel,
    ):
        soak(worker, lambda rng: fuzz_worker(rng, channel, worker.address, config, BATCH))


def test_a_head_outlives_any_message() -> None:
    with (
        fuzzed_head() as head,
        grpc.insecure_channel(head.address, options=rpc.CHANNEL_OPTIONS) as channel,
    ):
        expected = fuzz_head(random.Random(0), channel, head.address, 1)

        def fuzz(rng: random.Random) -> None:
            assert fuzz_head(rng, channel, head.address, BATCH) == expected

        soak(head, fuzz)
