"""Experts move under streams: what a step takes meanwhile, and how even the work is afterwards."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import median

import pytest

from cluster.client import Client
from model import Mixtral
from tests.integration.conftest import Service
from tests.streams import percentile, prompts, tell

pytestmark = pytest.mark.timeout(600)

NUM_STREAMS = 8
MAX_TOKENS = 250
MINUTE_S = 60.0
"""Slept through three times: nothing is waited for, but steps are watched for as long before the
move, with it and after it."""
MOST_UNEVEN = 1.15
"""What the busiest worker of a layer may get, of the workers' mean."""


@pytest.fixture
def three_workers() -> Iterator[Service]:
    """Nothing moves by itself; experts are spread by number, which is uneven in load."""
    service = Service.start("--dtype", "float32", "--workers", "3", "--set", "rebalance_gain=null")
    yield service
    service.stop()


class Reader:
    """Reads the same story again and again, and notes when each of its chunks came."""

    def __init__(self, client: Client, prompt: str, is_over: threading.Event) -> None:
        self.texts: set[str] = set()
        self._stories: list[list[float]] = []
        self._client = client
        self._prompt = prompt
        self._is_over = is_over

    def read(self) -> None:
        while not self._is_over.is_set():
            self._stories.append([])
            story = tell(self._client, self._prompt, MAX_TOKENS, self._note)
            self.texts.add(story.text)

    def _note(self) -> None:
        self._stories[-1].append(time.monotonic())

    def gaps_s(self, begin: float, end: float) -> list[float]:
        """Between the chunks of a story that came in this time: what steps took."""
        return [
            after - before
            for times in self._stories
            for before, after in pairwise(times)
            if begin <= after < end
        ]


def rows(client: Client) -> dict[tuple[str, str], float]:
    """Rows that each worker has computed of each layer."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for sample in client.cluster.metrics():
        if sample.name == "maestrale_expert_rows_total":
            found[sample.labels["process"], sample.labels["layer"]] += sample.value
    return found


def busiest(before: Mapping[tuple[str, str], float], after: dict[tuple[str, str], float]) -> float:
    """Of the most uneven layer: the busiest worker's rows since then, relative to the mean."""
    workers = {worker for worker, _ in after}
    since = {key: total - before.get(key, 0.0) for key, total in after.items()}
    shares = []
    for layer in {layer for _, layer in after}:
        of_workers = [since.get((worker, layer), 0.0) for worker in workers]
        shares.append(max(of_workers) * len(of_workers) / sum(of_workers))
    return max(shares)


def test_experts_move_under_streams_and_work_is_even_afterwards(
    three_workers: Service, mixtral: Mixtral
) -> None:
    is_over = threading.Event()
    with three_workers.client() as client, ThreadPoolExecutor(NUM_STREAMS) as pool:
        readers = [Reader(client, prompt, is_over) for prompt in prompts(NUM_STREAMS)]
        try:
            running = [pool.submit(reader.read) for reader in readers]
            time.sleep(MINUTE_S)
            counted, began = rows(client), time.monotonic()
            change = client.cluster.rebalance()
            uneven_before = busiest({}, counted)
            time.sleep(MINUTE_S)
            counted, moved = rows(client), time.monotonic()
            time.sleep(MINUTE_S)
            uneven_after = busiest(counted, rows(client))
        finally:
            is_over.set()  # else the pool would wait for its readers for ever
        for each in running:
            each.result()
    gaps_s = {
        "before": [gap for reader in readers for gap in reader.gaps_s(began - MINUTE_S, began)],
        "meanwhile": [gap for reader in readers for gap in reader.gaps_s(began, moved)],
    }
    usual_s = median(gaps_s["before"])
    print(f"\n{len(change.moves)} units moved; a step takes {1000 * usual_s:.1f} ms in the median")
    for when, gaps in gaps_s.items():
        print(
            f"{when}: p99 {percentile(gaps, 99) / usual_s:.2f}, p99.9 "
            f"{percentile(gaps, 99.9) / usual_s:.2f}, longest {max(gaps) / usual_s:.2f} x that; "
            f"{sum(gap > 2 * usual_s for gap in gaps)} of {len(gaps)} took more than twice as long"
        )
    print(f"the most uneven layer's busiest worker: {uneven_before:.2f}, then {uneven_after:.2f}")
    assert change.adopted
    for reader, prompt in zip(readers, prompts(NUM_STREAMS), strict=True):
        assert reader.texts == {mixtral.generate(prompt, max_tokens=MAX_TOKENS)}
    assert uneven_after <= MOST_UNEVEN < uneven_before
