"""Experts move between real workers while texts are being written."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from model import Mixtral
from tests.integration.conftest import Service
from tests.integration.test_lifecycle import run
from tests.integration.test_service import PROMPT, until

NUM_STREAMS = 4
MAX_TOKENS = 250


@pytest.fixture(scope="module")
def three_workers() -> Iterator[Service]:
    """Nothing moves by itself; experts are spread by number, which is uneven in load."""
    service = Service.start("--dtype", "float32", "--workers", "3", "--set", "rebalance_gain=null")
    yield service
    service.stop()


def test_experts_move_while_texts_are_written_and_no_text_changes(
    three_workers: Service, mixtral: Mixtral
) -> None:
    expected = mixtral.generate(PROMPT, max_tokens=MAX_TOKENS)

    def write() -> str:
        with three_workers.client() as client:
            reply = client.completions.create(prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=0)
        return reply.choices[0].text

    with three_workers.client() as client, ThreadPoolExecutor(NUM_STREAMS) as pool:
        assert list(pool.map(lambda _: write(), range(NUM_STREAMS))) == [expected] * NUM_STREAMS
        before = client.cluster.status()
        until(
            lambda: bool(client.cluster.rebalance(dry_run=True).moves),
            "the counted rows to reach the controller",
        )
        wished = run("rebalance", "--dry-run", "--url", three_workers.url)
        assert "would be loaded" in wished.stdout, wished.stderr
        assert client.cluster.status().epoch == before.epoch

        texts = [pool.submit(write) for _ in range(NUM_STREAMS)]
        change = client.cluster.rebalance()
        assert change.adopted
        assert sum(change.busiest_after) < sum(change.busiest_before)
        until(lambda: client.cluster.status().epoch > before.epoch, "the first expert to move")
        assert [text.result() for text in texts] == [expected] * NUM_STREAMS

        until(lambda: client.cluster.status().phase == "ready", "all to be where it is wanted")
        after = client.cluster.status()
        assert after.experts_missing == 0
        assert {worker.name for worker in after.workers} == {w.name for w in before.workers}
        assert write() == expected
        samples = {sample.name: sample.value for sample in client.cluster.metrics()}
        assert samples["maestrale_experts_missing"] == 0
        assert samples["maestrale_placement_epoch"] >= after.epoch
