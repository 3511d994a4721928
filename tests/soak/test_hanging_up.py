"""200 clients hang up after half a second: who asks next is answered at once, nothing is left."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cluster.client import Client
from model import Mixtral
from tests.integration.conftest import Service
from tests.integration.test_service import PROMPT, counted, until
from tests.leavers import IDLE, ask_and_leave, bodies, in_hand

pytestmark = pytest.mark.timeout(900)

NUM_CLIENTS = 200
PATIENCE_S = 0.5
AT_ONCE = (200, 50, 20, 10)
"""In each round: fewer come further before they leave."""
MAX_RUNNING = 8


@pytest.fixture(scope="module")
def talkative() -> Iterator[Service]:
    """A service that prints what its processes log, with few places, so that many queue."""
    few = ("--set", f"max_running_sequences={MAX_RUNNING}")
    service = Service.start("--dtype", "float32", "--workers", "2", "--verbose", *few)
    try:
        yield service
    finally:
        service.stop()


@contextmanager
def highest(client: Client) -> Iterator[Counter[str]]:
    """The most that `in_hand` tells while it is open."""
    most: Counter[str] = Counter()
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            for name, value in in_hand(client).items():
                most[name] = max(most[name], int(value))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        is_over.set()
        watcher.join()


def test_200_clients_leave_and_the_next_is_answered(
    talkative: Service, mixtral: Mixtral, stories: list[str]
) -> None:
    expected = mixtral.generate(PROMPT, max_tokens=10)
    reached: Counter[str] = Counter()
    with talkative.client() as client:

        def answer_s() -> float:
            began = time.monotonic()
            reply = client.completions.create(prompt=PROMPT, max_tokens=10, temperature=0)
            assert reply.choices[0].text == expected
            return time.monotonic() - began

        alone_s = sorted(answer_s() for _ in range(5))[2]
        for at_once in AT_ONCE:
            asked = bodies(stories, NUM_CLIENTS)
            computed = counted(client, "maestrale_step_tokens_total")
            emitted = counted(client, "maestrale_generation_tokens_total")
            with talkative.client() as other, highest(other) as most:
                began = time.monotonic()
                left = ask_and_leave(talkative.url, asked, PATIENCE_S, at_once)
                lasted_s = time.monotonic() - began
            next_s = answer_s()
            until(lambda: in_hand(client) == IDLE, "all that they had asked for to be given up")
            idle_s = time.monotonic() - began - lasted_s
            computed = counted(client, "maestrale_step_tokens_total") - computed
            emitted = counted(client, "maestrale_generation_tokens_total") - emitted
            num_begun = sum(each.num_parts > 0 for each in left)
            print(
                f"\n{NUM_CLIENTS} clients, {at_once} at once, left within {lasted_s:.1f} s, "
                f"{num_begun} with a part of the answer; {computed:.0f} tokens computed, "
                f"{emitted:.0f} of them new; at most {dict(most)}; the next was answered in "
                f"{next_s:.3f} s ({alone_s:.3f} s alone), all was idle after {idle_s:.2f} s"
            )
            assert not any(each.is_over for each in left)
            assert emitted < sum(body["max_tokens"] for body in asked) / 2
            reached |= most
            reached["begun"] += num_begun
    assert reached["begun"] > 0
    assert reached["maestrale_sequences_running"] > 0
    assert reached["maestrale_sequences_waiting"] > 0
    assert not [line for line in talkative.lines if "Traceback" in line or " ERROR " in line]
