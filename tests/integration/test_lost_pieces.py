"""Heads and controller killed under streams of the whole service: nobody who reads notices."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.client import Client
from model import Mixtral
from tests import faults
from tests.integration.conftest import Service
from tests.integration.test_service import counted, until
from tests.streams import Story, prompts, tell_all, tell_until

NUM_STREAMS = 16
MAX_TOKENS = 100


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def alone(mixtral: Mixtral) -> list[str]:
    return [mixtral.generate(prompt, max_tokens=MAX_TOKENS) for prompt in prompts(NUM_STREAMS)]


@pytest.fixture
def client(two_heads: Service) -> Iterator[Client]:
    with two_heads.client() as client:
        yield client


def test_what_an_operator_changes_costs_no_stream_anything(alone: list[str]) -> None:
    program = [sys.executable, "-m", "tests.integration.operated_service"]
    ended = subprocess.run(
        [*program, str(NUM_STREAMS), str(MAX_TOKENS)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    deployed = ("a file deployed", "while it is", "a file for other workers")
    changes = (*deployed, "3 workers", "1 workers", "a head stopped")
    assert told["texts"] == dict.fromkeys(changes, alone)
    assert told["are_workers_kept"]
    assert list(told["replays"]) == ["moved"]
    assert "dtype cannot change without a restart" in told["refusal"]


def report(what: str, stories: list[Story]) -> None:
    print(f"\n{what}: longest stall {max(gap for story in stories for gap in story.gaps_s):.2f} s")


def test_a_killed_head_costs_no_stream_anything(
    two_heads: Service, client: Client, alone: list[str]
) -> None:
    victim = faults.actors(two_heads.process.pid, "HeadReplica")[0]

    def disturb() -> None:
        faults.kill(victim)

    stories = tell_all(client, prompts(NUM_STREAMS), MAX_TOKENS, disturb, after=20 * NUM_STREAMS)
    assert [story.text for story in stories] == alone
    assert counted(client, "maestrale_replays_total") > 0
    report("a head killed", stories)


def test_killed_controllers_cost_no_stream_anything(
    two_heads: Service, client: Client, alone: list[str]
) -> None:
    """One after the other, under streams; the last's successor takes over what runs."""
    root = two_heads.process.pid
    workers = faults.actors(root, "ExpertWorker")
    is_over = threading.Event()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        try:
            with faults.killing(faults.oldest(root, faults.CONTROLLER), every_s=3.0) as killed:
                running = [
                    pool.submit(tell_until, client, prompt, MAX_TOKENS, is_over)
                    for prompt in prompts(NUM_STREAMS)
                ]
                until(lambda: len(set(killed)) == 3, "three controllers", timeout_s=60)
        finally:
            is_over.set()  # else the pool would wait for its streams for ever
        stories = [each.result() for each in running]
    assert [{story.text for story in own} for own in stories] == [{text} for text in alone]
    report("controllers killed", [story for own in stories for story in own])
    until(
        lambda: bool(set(faults.actors(root, faults.CONTROLLER)) - set(killed)),
        "another controller",
        timeout_s=60,
    )
    again = tell_all(client, prompts(2), 20, lambda: None, after=1)
    assert [story.text for story in again] == [
        text[: len(story.text)] for text, story in zip(alone, again, strict=False)
    ]
    assert sorted(faults.actors(root, "ExpertWorker")) == sorted(workers)
