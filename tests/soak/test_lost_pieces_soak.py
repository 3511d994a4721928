"""32 streams for two minutes while pieces are killed again and again: what it costs who reads."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from model import Mixtral
from tests import faults
from tests.integration.conftest import Service
from tests.integration.test_service import counted, until
from tests.streams import percentile, prompts, tell_until

pytestmark = pytest.mark.timeout(900)

NUM_STREAMS = 32
MAX_TOKENS = 120
DURATION_S = 120.0


@pytest.fixture
def two_heads() -> Iterator[Service]:
    service = Service.start("--dtype", "float32", "--workers", "2", "--heads", "2")
    try:
        with service.client() as client:
            until(
                lambda: client.cluster.status().heads_ready == 2, "the second head", timeout_s=120
            )
        yield service
    finally:
        service.stop()


@pytest.fixture
def two_copies() -> Iterator[Service]:
    service = Service.start("--dtype", "float32", "--workers", "3", "--set", "expert_copies=2")
    yield service
    service.stop()


def soak(
    service: Service,
    mixtral: Mixtral,
    pick: Callable[[], int | None],
    every_s: float,
    how: Callable[[int], None] = faults.kill,
) -> None:
    """Do that to what is picked every so often, under streams; prints what they saw, and checks
    it.
    """
    asked = prompts(NUM_STREAMS)
    alone = [mixtral.generate(prompt, max_tokens=MAX_TOKENS) for prompt in asked]
    is_over = threading.Event()
    with service.client() as client, ThreadPoolExecutor(NUM_STREAMS) as pool:
        try:
            with faults.killing(pick, every_s, how) as killed:
                running = [
                    pool.submit(tell_until, client, prompt, MAX_TOKENS, is_over) for prompt in asked
                ]
                time.sleep(DURATION_S)
        finally:
            is_over.set()  # else the pool would wait for its streams for ever
        stories = [each.result() for each in running]
        replays = counted(client, "maestrale_replays_total")
    gaps_s = [gap for own in stories for story in own for gap in story.gaps_s]
    longest_s = [max(story.gaps_s) for own in stories for story in own]
    print(
        f"\n{len(killed)} victims of {how.__name__} in {DURATION_S:.0f} s; "
        f"{sum(map(len, stories))} streams, {replays:.0f} replays; between chunks p50 "
        f"{percentile(gaps_s, 50):.3f} s, p99 {percentile(gaps_s, 99):.3f} s; longest "
        f"stall of a stream p50 {percentile(longest_s, 50):.2f} s, "
        f"p99 {percentile(longest_s, 99):.2f} s, max {max(longest_s):.2f} s"
    )
    for text, own in zip(alone, stories, strict=True):
        assert {story.text for story in own} == {text}
    assert len(killed) >= 0.5 * DURATION_S / every_s


def test_a_head_of_two_is_killed_every_15_seconds(two_heads: Service, mixtral: Mixtral) -> None:
    soak(two_heads, mixtral, faults.oldest(two_heads.process.pid, "HeadReplica"), every_s=15.0)


def test_the_controller_is_killed_every_10_seconds(two_heads: Service, mixtral: Mixtral) -> None:
    soak(two_heads, mixtral, faults.oldest(two_heads.process.pid, faults.CONTROLLER), every_s=10.0)


@pytest.mark.parametrize("how", [faults.kill, faults.pause])
def test_a_worker_of_three_is_lost_every_30_seconds(
    two_copies: Service, mixtral: Mixtral, how: Callable[[int], None]
) -> None:
    """The controller kills what is paused, and starts another in its place."""
    soak(two_copies, mixtral, faults.oldest(two_copies.process.pid, "ExpertWorker"), 30.0, how)
