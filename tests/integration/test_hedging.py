"""A worker that stalls holds nobody up where its experts have copies, and its late answers do no
harm."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.head import answer_times
from cluster.head.feed import PlacementFeed
from cluster.metrics import HeadMetrics
from cluster.placement import Placement
from model import Mixtral
from model.sampling_params import SamplingParams
from model.weights import Checkpoint
from tests.integration.workers import WorkerServer, behind_proxy, remote_experts

GREEDY = SamplingParams(max_tokens=40, temperature=0.0)
STALLS = range(10, 40, 10)
"""After how many tokens the worker stalls."""
STALLED_TOKENS = 5
PATIENCE_S = 60.0
BUDGET = 0.25
"""High, so that short texts earn enough."""


class Stalling:
    """Has a worker hold its answers while told to."""

    def __init__(self, worker: WorkerServer) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.num_calls = 0
        self._compute = worker.service._batcher.compute
        worker.service._batcher.compute = self._compute_late  # type: ignore[method-assign]

    def _compute_late(self, *args: Any) -> Any:
        self.num_calls += 1
        assert self.may_answer.wait(PATIENCE_S)
        return self._compute(*args)


@contextmanager
def hedged(
    workers: list[WorkerServer], checkpoint: Checkpoint, link: str, metrics: HeadMetrics
) -> Iterator[Any]:
    """Experts with a copy on each of two workers."""
    config = checkpoint.config
    table = ((((0,), (1,)),) * config.num_local_experts,) * config.num_hidden_layers
    with ExitStack() as stack:
        infos = [worker.info for worker in workers]
        if link == "grpc":
            infos = [stack.enter_context(behind_proxy(worker))[1] for worker in workers]
        feed = PlacementFeed()
        feed.put(Placement(1, tuple(infos), table))
        experts = remote_experts(
            feed,
            checkpoint,
            timeout_s=PATIENCE_S,
            recovery_timeout_s=PATIENCE_S,
            metrics=metrics,
            hedge_budget=BUDGET,
        )
        stack.callback(experts.close)
        assert experts.connect(timeout_s=10)
        with feed.changed:
            assert feed.changed.wait_for(lambda: "without []" in repr(experts), 10)
        yield experts


def samples(exposition: str, name: str) -> dict[str, float]:
    """A counter's values, by outcome if it has one."""
    return {
        sample.labels.get("outcome", str(sample.labels)): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == name
    }


@pytest.mark.parametrize("link", ["pipe", "grpc"])
def test_a_stall_changes_no_token_and_is_not_waited_for(
    mixtral: Mixtral,
    two_workers: list[WorkerServer],
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    link: str,
) -> None:
    """The worker answers again only once tokens have come without it."""
    monkeypatch.setattr(answer_times, "FLOOR_S", PATIENCE_S)  # a stall must not pass for a loss
    prompt = mixtral.tokenizer.encode_prompt("Once upon a time")
    expected = mixtral.generate_ids([prompt], [GREEDY])
    stalling = Stalling(two_workers[1])
    metrics = HeadMetrics()
    seen = 0

    def stall(_index: int, _token_id: int) -> None:
        nonlocal seen
        seen += 1
        if seen in STALLS:
            stalling.may_answer.clear()
        if seen - STALLED_TOKENS in STALLS:
            stalling.may_answer.set()

    with hedged(two_workers, checkpoint, link, metrics) as experts:
        split = Mixtral(mixtral.decoder, experts, mixtral.tokenizer, mixtral.chat)
        assert split.generate_ids([prompt], [GREEDY]) == expected  # so that times are known
        assert split.generate_ids([prompt], [GREEDY], stall) == expected
        stalling.may_answer.set()
        deadline = time.monotonic() + PATIENCE_S
        while experts._races.late_workers():
            assert time.monotonic() < deadline
        before = stalling.num_calls
        assert split.generate_ids([prompt], [GREEDY]) == expected
        assert stalling.num_calls > before
        assert "without []" in repr(experts)

    hedged_rows = samples(metrics.exposition(), "maestrale_expert_rows_hedged_total")
    assert hedged_rows["won"] >= len(STALLS)
    assert "failed" not in hedged_rows
    assert sum(samples(metrics.exposition(), "maestrale_expert_worker_losses_total").values()) == 0
    num_rows = sum(
        sum(samples(worker.metrics.exposition(), "maestrale_expert_rows_total").values())
        for worker in two_workers
    )
    num_extra = sum(hedged_rows.values())
    assert num_extra <= BUDGET * (num_rows - num_extra)
