"""A few hundred hostile messages on real ports; tests/soak has the long run."""

import asyncio
import random

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import rpc
from model import TINY
from model.config import MixtralConfig
from tests.fuzz_servers import fuzzed_head, fuzzed_worker
from tests.fuzzing import fuzz_head, fuzz_worker

NUM_MESSAGES = 300


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


def counts(address: str, service: str) -> dict[tuple[str, str], float]:
    """A server's counters by name and their last label."""
    families = text_string_to_metric_families(asyncio.run(rpc.scrape(address, service)))
    return {
        (family.name, list(sample.labels.values())[-1]): sample.value
        for family in families
        for sample in family.samples
        if sample.labels
    }


def test_a_worker_answers_the_next_call_after_garbage(rng: random.Random) -> None:
    config = MixtralConfig.from_folder(TINY)
    with (
        fuzzed_worker() as worker,
        grpc.insecure_channel(worker.address, options=rpc.CHANNEL_OPTIONS) as channel,
    ):
        fuzz_worker(rng, channel, worker.address, config, NUM_MESSAGES)
        counted = counts(worker.address, rpc.EXPERT_SERVICE)
    assert counted["maestrale_expert_calls", "invalid"] > NUM_MESSAGES / 10
    assert counted["maestrale_refused_peers", "garbage"] > 0  # of the handshake


def test_a_head_answers_the_next_request_after_garbage(rng: random.Random) -> None:
    with (
        fuzzed_head() as head,
        grpc.insecure_channel(head.address, options=rpc.CHANNEL_OPTIONS) as channel,
    ):
        before = fuzz_head(rng, channel, head.address, 1)
        assert fuzz_head(rng, channel, head.address, NUM_MESSAGES) == before
        counted = counts(head.address, rpc.HEAD_SERVICE)
    assert counted["maestrale_refused_peers", "garbage"] > NUM_MESSAGES / 10
