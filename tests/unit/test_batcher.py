"""Calls that are computed together get what each would get alone."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.expert.batcher import Batcher, NotHeldError
from cluster.metrics import WorkerMetrics
from model.experts import Assignments, ExpertWeights, assign, weighted_sums
from model.router import Routing
from tests.cluster_fakes import DEADLINE_S, random_rows

NUM_LAYERS, NUM_EXPERTS, HIDDEN, INNER = 2, 4, 6, 5
TOLERANCE = 1e-6
"""In float32 a matrix product may add in another order when it has more rows."""


class Held(dict[tuple[int, int], ExpertWeights]):
    """Weights; a computation that takes them from here waits until it is let through."""

    def __init__(self, weights: Mapping[tuple[int, int], ExpertWeights]) -> None:
        super().__init__(weights)
        self.is_computing = threading.Event()
        self.may_go_on = threading.Event()

    def __getitem__(self, unit: tuple[int, int]) -> ExpertWeights:
        self.is_computing.set()
        assert self.may_go_on.wait(DEADLINE_S)
        return super().__getitem__(unit)


class Passes(WorkerMetrics):
    """Metrics that remember every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[int, dict[int, int]]] = []

    def observe_pass(self, layer: int, rows_by_expert: Mapping[int, int], seconds: float) -> None:
        super().observe_pass(layer, rows_by_expert, seconds)
        self.passes.append((layer, dict(rows_by_expert)))


class CountingLock:
    """A lock that tells how often it has been left: a call has queued when it leaves it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._num_left = 0

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        with self._changed:
            self._num_left += 1
            self._changed.notify_all()

    def wait_until_left(self, times: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_left >= times, DEADLINE_S)


class Caller(threading.Thread):
    """Makes one call on a thread of its own and keeps what comes of it."""

    def __init__(self, compute: Callable[..., Tensor], *call: Any) -> None:
        super().__init__(daemon=True)
        self._compute = compute
        self._call = call
        self.sums_RD: Tensor | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.sums_RD = self._compute(*self._call)
        except Exception as error:
            self.error = error


@pytest.fixture(scope="module")
def weights() -> dict[tuple[int, int], ExpertWeights]:
    generator = torch.Generator().manual_seed(1)
    return {
        (layer, expert_id): ExpertWeights(
            torch.randn(2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5,
            torch.randn(HIDDEN, INNER, generator=generator) * INNER**-0.5,
        )
        for layer in range(NUM_LAYERS)
        for expert_id in range(NUM_EXPERTS)
    }


def call_of(num_rows: int, *, seed: int, top_k: int = 2) -> tuple[Tensor, Assignments]:
    """Random rows, each for top_k random experts."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_rows, NUM_EXPERTS, generator=generator)
    weights_TK = torch.rand(num_rows, top_k, generator=generator)
    routing = Routing(scores.argsort(dim=1)[:, :top_k], weights_TK)
    return random_rows(num_rows, HIDDEN, seed=seed), assign(routing)


def alone(
    weights: Mapping[tuple[int, int], ExpertWeights], layer: int, call: tuple[Tensor, Assignments]
) -> Tensor:
    experts = {e: w for (where, e), w in weights.items() if where == layer}
    return weighted_sums(experts, *call)


def pile_up(
    batcher_held: Held, metrics: Passes, calls: list[tuple[int, Tensor, Assignments]]
) -> list[Caller]:
    """The first call computes while all others queue behind it; returns when all have ended."""
    lock = CountingLock()
    batcher = Batcher(batcher_held, metrics, _waiting_lock=lock)  # type: ignore[arg-type]
    callers = [Caller(batcher.compute, *calls[0])]
    assert batcher_held.is_computing.wait(DEADLINE_S)
    callers += [Caller(batcher.compute, *call) for call in calls[1:]]
    lock.wait_until_left(len(calls) + 1)  # every call's own, and the first one's taking
    batcher_held.may_go_on.set()
    for caller in callers:
        caller.join(DEADLINE_S)
        assert not caller.is_alive()
    return callers


@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    top_k=st.integers(1, NUM_EXPERTS),
    seed=st.integers(0, 2**30),
)
def test_joined_calls_get_what_each_gets_alone(
    weights: dict[tuple[int, int], ExpertWeights], sizes: list[int], top_k: int, seed: int
) -> None:
    calls = [call_of(size, seed=seed + i, top_k=top_k) for i, size in enumerate(sizes)]
    callers = pile_up(Held(weights), Passes(), [(1, *call) for call in calls])
    for caller, call in zip(callers, calls, strict=True):
        assert caller.error is None
        assert caller.sums_RD is not None
        torch.testing.assert_close(
            caller.sums_RD, alone(weights, 1, call), rtol=TOLERANCE, atol=TOLERANCE
        )


def test_calls_that_pile_up_behind_a_computation_leave_in_one_pass_per_layer(
    weights: dict[tuple[int, int], ExpertWeights],
) -> None:
    layers = [0, 1, 0, 1, 1, 0]
    calls = [call_of(3, seed=i, top_k=NUM_EXPERTS) for i in range(len(layers))]
    metrics = Passes()
    pile_up(
        Held(weights), metrics, [(layer, *call) for layer, call in zip(layers, calls, strict=True)]
    )
    first, *others = metrics.passes
    assert first == (0, dict.fromkeys(range(NUM_EXPERTS), 3))
    assert sorted(others) == [
        (0, dict.fromkeys(range(NUM_EXPERTS), 6)),
        (1, dict.fromkeys(range(NUM_EXPERTS), 9)),
    ]
    exposition = metrics.exposition()
    assert f"maestrale_expert_passes_total {float(3 * NUM_EXPERTS)}" in exposition
    assert 'maestrale_expert_rows_total{expert="2",layer="1"} 9.0' in exposition


def test_a_call_that_nobody_waits_beside_is_computed_at_once(
    weights: dict[tuple[int, int], ExpertWeights],
) -> None:
    metrics = Passes()
    batcher = Batcher(weights, metrics)
    for layer in (0, 1, 0):
        call = call_of(4, seed=layer)
        torch.testing.assert_close(
            batcher.compute(layer, *call), alone(weights, layer, call), rtol=0, atol=0
        )
    assert [layer for layer, _ in metrics.passes] == [0, 1, 0]


def test_an_expert_that_is_not_held_is_refused_by_name(
    weights: dict[tuple[int, int], ExpertWeights],
) -> None:
    held = {unit: w for unit, w in weights.items() if unit not in {(1, 0), (1, 2)}}
    batcher = Batcher(held, Passes())
    call = call_of(3, seed=0, top_k=NUM_EXPERTS)
    with pytest.raises(NotHeldError, match=r"experts \[0, 2\] of layer 1"):
        batcher.compute(1, *call)
    batcher.compute(0, *call)  # the same experts of another layer are there


def test_an_expert_is_used_from_the_moment_it_is_held(
    weights: dict[tuple[int, int], ExpertWeights],
) -> None:
    held: dict[tuple[int, int], ExpertWeights] = {}
    batcher = Batcher(held, Passes())
    call = call_of(3, seed=0)
    with pytest.raises(NotHeldError):
        batcher.compute(0, *call)
    held.update(weights)
    torch.testing.assert_close(batcher.compute(0, *call), alone(weights, 0, call))


def test_a_failing_computation_reaches_exactly_its_callers(
    weights: dict[tuple[int, int], ExpertWeights],
) -> None:
    broken = {
        (layer, e): ExpertWeights(w.w13_2FD, w.w2_DF[:, 1:]) if layer == 1 else w
        for (layer, e), w in weights.items()
    }
    layers = [0, 1, 0, 1, 0]
    calls = [call_of(2, seed=i) for i in range(len(layers))]
    held = Held(broken)
    callers = pile_up(
        held, Passes(), [(layer, *call) for layer, call in zip(layers, calls, strict=True)]
    )
    for layer, caller, call in zip(layers, callers, calls, strict=True):
        if layer == 1:
            assert isinstance(caller.error, RuntimeError)
            assert caller.sums_RD is None
        else:
            assert caller.error is None
            assert caller.sums_RD is not None
            torch.testing.assert_close(caller.sums_RD, alone(weights, 0, call))


def test_after_a_failure_the_next_call_is_computed(
    weights: dict[tuple[int, int], ExpertWeights],
) -> None:
    held = dict(weights)
    batcher = Batcher(held, Passes())
    call = call_of(2, seed=0)
    held[0, 0] = ExpertWeights(torch.ones(3, 3), torch.ones(3, 3))
    with pytest.raises(RuntimeError):
        batcher.compute(0, *call_of(2, seed=0, top_k=NUM_EXPERTS))
    held[0, 0] = weights[0, 0]
    torch.testing.assert_close(batcher.compute(0, *call), alone(weights, 0, call))


def test_calls_without_assignments_get_zeros_joined_or_not(
    weights: dict[tuple[int, int], ExpertWeights],
) -> None:
    """The wire allows them."""
    nothing = Assignments((), torch.empty(0, dtype=torch.int64), torch.empty(0))
    calls = [(0, *call_of(2, seed=0))]
    calls += [(1, random_rows(3, HIDDEN, seed=i), nothing) for i in range(2)]
    _, *callers = pile_up(Held(weights), Passes(), calls)
    for caller in callers:
        assert caller.error is None
        assert caller.sums_RD is not None
        assert torch.equal(caller.sums_RD, torch.zeros(3, HIDDEN))
