"""A few hundred hostile messages on real ports; tests/soak has the long run."""

import random

import grpc
import pytest

from cluster import rpc
from model import TINY
from model.config import MixtralConfig
from tests.fuzz_servers import fuzzed_head, fuzzed_worker
from tests.fuzzing import fuzz_head, fuzz_worker

NUM_MESSAGES = 300


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


def test_a_worker_answers_the_next_call_after_garbage(rng: random.Random) -> None:
    config = MixtralConfig.from_folder(TINY)
    with (
        fuzzed_worker() as worker,
        grpc.insecure_channel(worker.address, options=rpc.CHANNEL_OPTIONS) as channel,
    ):
        fuzz_worker(rng, channel, worker.address, config, NUM_MESSAGES)


def test_a_head_answers_the_next_request_after_garbage(rng: random.Random) -> None:
    with (
        fuzzed_head() as head,
        grpc.insecure_channel(head.address, options=rpc.CHANNEL_OPTIONS) as channel,
    ):
        before = fuzz_head(rng, channel, head.address, 1)
        assert fuzz_head(rng, channel, head.address, NUM_MESSAGES) == before
