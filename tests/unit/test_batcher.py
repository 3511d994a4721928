"""Calls that are computed together get what each would get alone."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.expert import batcher as batcher_module
from cluster.expert.batcher import (
    FEW_ROWS,
    MAX_PASSED_OVER,
    Batcher,
    BusyError,
    NotHeldError,
    _Job,
)
from cluster.metrics import WorkerMetrics
from model.experts import Assignments, ExpertWeights, assign, weighted_sums
from model.router import Routing
from model.units import Unit
from tests.cluster_fakes import DEADLINE_S, random_rows

NUM_LAYERS, NUM_EXPERTS, HIDDEN, INNER = 2, 4, 6, 5
TOLERANCE = 1e-6
"""In float32 a matrix product may add in another order when it has more rows."""


class Held(dict[Unit, ExpertWeights]):
    """Weights; a computation that takes them from here waits until it is let through."""

    def __init__(self, weights: Mapping[Unit, ExpertWeights]) -> None:
        super().__init__(weights)
        self.is_computing = threading.Event()
        self.may_go_on = threading.Event()

    def __getitem__(self, unit: Unit) -> ExpertWeights:
        self.is_computing.set()
        assert self.may_go_on.wait(DEADLINE_S)
        return super().__getitem__(unit)


class Passes(WorkerMetrics):
    """Metrics that remember every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[dict[Unit, int]] = []

    def observe_pass(
        self, counts: Iterable[tuple[Unit, int]], seconds: float, queued_s: Sequence[float]
    ) -> None:
        super().observe_pass(counts, seconds, queued_s)
        self.passes.append(dict(counts))


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
def weights() -> dict[Unit, ExpertWeights]:
    generator = torch.Generator().manual_seed(1)
    return {
        Unit(layer, expert_id): ExpertWeights(
            torch.randn(2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5,
            torch.randn(HIDDEN, INNER, generator=generator) * INNER**-0.5,
        )
        for layer in range(NUM_LAYERS)
        for expert_id in range(NUM_EXPERTS)
    }


Call = tuple[int, Tensor, Assignments]
"""What `Batcher.compute` takes."""


def call_of(num_rows: int, *, layer: int = 0, seed: int, top_k: int = 2) -> Call:
    """Random rows, each for top_k random experts."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_rows, NUM_EXPERTS, generator=generator)
    weights_TK = torch.rand(num_rows, top_k, generator=generator)
    routing = Routing(scores.argsort(dim=1)[:, :top_k], weights_TK)
    return layer, random_rows(num_rows, HIDDEN, seed=seed), assign(layer, routing)


def alone(weights: Mapping[Unit, ExpertWeights], call: Call) -> Tensor:
    _, x_RD, assignments = call
    return weighted_sums(weights, x_RD, assignments)


def pile_up(batcher_held: Held, metrics: Passes, calls: list[Call]) -> list[Caller]:
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
    weights: dict[Unit, ExpertWeights], sizes: list[int], top_k: int, seed: int
) -> None:
    calls = [call_of(size, layer=1, seed=seed + i, top_k=top_k) for i, size in enumerate(sizes)]
    callers = pile_up(Held(weights), Passes(), calls)
    for caller, call in zip(callers, calls, strict=True):
        assert caller.error is None
        assert caller.sums_RD is not None
        torch.testing.assert_close(
            caller.sums_RD, alone(weights, call), rtol=TOLERANCE, atol=TOLERANCE
        )


def test_calls_that_pile_up_behind_a_computation_leave_in_one_pass_per_layer(
    weights: dict[Unit, ExpertWeights],
) -> None:
    layers = [0, 1, 0, 1, 1, 0]
    calls = [call_of(3, layer=layer, seed=i, top_k=NUM_EXPERTS) for i, layer in enumerate(layers)]
    metrics = Passes()
    pile_up(Held(weights), metrics, calls)
    first, *others = metrics.passes
    assert first == {Unit(0, expert_id): 3 for expert_id in range(NUM_EXPERTS)}
    assert sorted(others, key=min) == [
        {Unit(0, expert_id): 6 for expert_id in range(NUM_EXPERTS)},
        {Unit(1, expert_id): 9 for expert_id in range(NUM_EXPERTS)},
    ]
    exposition = metrics.exposition()
    assert f"maestrale_expert_passes_total {float(3 * NUM_EXPERTS)}" in exposition
    assert 'maestrale_expert_rows_total{expert="2",layer="1"} 9.0' in exposition


def test_calls_of_few_rows_go_before_those_of_many(weights: dict[Unit, ExpertWeights]) -> None:
    many = FEW_ROWS + 1
    sizes = [(0, 1), (0, many), (1, many), (0, many), (1, 2), (0, 3), (0, FEW_ROWS)]
    calls = [
        call_of(rows, layer=layer, seed=i, top_k=NUM_EXPERTS)
        for i, (layer, rows) in enumerate(sizes)
    ]
    metrics = Passes()
    callers = pile_up(Held(weights), metrics, calls)
    passes = [(min(counts).layer, counts[min(counts)]) for counts in metrics.passes]
    few = [(0, 3 + FEW_ROWS), (1, 2)]
    assert passes[0] == (0, 1)
    assert sorted(passes[1:3]) == few
    assert sorted(passes[3:]) == [(0, 2 * many), (1, many)]
    for caller, call in zip(callers, calls, strict=True):
        assert caller.sums_RD is not None
        torch.testing.assert_close(
            caller.sums_RD, alone(weights, call), rtol=TOLERANCE, atol=TOLERANCE
        )


def test_a_call_of_many_rows_is_passed_over_so_often_and_no_more(
    weights: dict[Unit, ExpertWeights],
) -> None:
    """Each pass over few rows brings the next ones: without a bound they would go on for ever."""
    metrics = Passes()
    held = Held(weights)
    held.may_go_on.set()
    batcher = Batcher(held, metrics)
    queued = [_Job(*call_of(FEW_ROWS + 1, seed=0))]
    batcher._waiting = queued
    for number in range(MAX_PASSED_OVER + 3):
        batcher.compute(*call_of(1, layer=1, seed=number))
    layers = [min(counts).layer for counts in metrics.passes]
    assert layers.index(0) == MAX_PASSED_OVER
    assert queued[0].done


def test_what_would_wait_beyond_the_bound_is_refused_with_the_numbers(
    weights: dict[Unit, ExpertWeights],
) -> None:
    held = Held(weights)
    row_bytes = HIDDEN * 4
    batcher = Batcher(held, Passes(), max_waiting_bytes=3 * row_bytes)
    first = Caller(batcher.compute, *call_of(9, seed=0))  # alone, whatever its size
    assert held.is_computing.wait(DEADLINE_S)
    batcher._waiting.append(_Job(*call_of(2, seed=1)))
    with pytest.raises(BusyError, match=f"1 calls with {2 * row_bytes} .* {3 * row_bytes}$"):
        batcher.compute(*call_of(2, seed=2))
    fits = Caller(batcher.compute, *call_of(1, seed=3))
    held.may_go_on.set()
    for caller in (first, fits):
        caller.join(DEADLINE_S)
        assert caller.error is None
        assert caller.sums_RD is not None


def test_a_call_that_nobody_waits_beside_is_computed_at_once(
    weights: dict[Unit, ExpertWeights],
) -> None:
    metrics = Passes()
    batcher = Batcher(weights, metrics)
    for layer in (0, 1, 0):
        call = call_of(4, layer=layer, seed=layer)
        torch.testing.assert_close(batcher.compute(*call), alone(weights, call), rtol=0, atol=0)
    assert [min(counts).layer for counts in metrics.passes] == [0, 1, 0]


def test_an_expert_that_is_not_held_is_refused_by_name(
    weights: dict[Unit, ExpertWeights],
) -> None:
    held = {unit: w for unit, w in weights.items() if unit not in {Unit(1, 0), Unit(1, 2)}}
    batcher = Batcher(held, Passes())
    with pytest.raises(NotHeldError, match=r": expert 0 of layer 1, expert 2 of layer 1$"):
        batcher.compute(*call_of(3, layer=1, seed=0, top_k=NUM_EXPERTS))
    # the same experts of another layer are there
    batcher.compute(*call_of(3, layer=0, seed=0, top_k=NUM_EXPERTS))


def test_an_expert_is_used_from_the_moment_it_is_held(
    weights: dict[Unit, ExpertWeights],
) -> None:
    held: dict[Unit, ExpertWeights] = {}
    batcher = Batcher(held, Passes())
    call = call_of(3, seed=0)
    with pytest.raises(NotHeldError):
        batcher.compute(*call)
    held.update(weights)
    torch.testing.assert_close(batcher.compute(*call), alone(weights, call))


def test_a_failing_computation_reaches_exactly_its_callers(
    weights: dict[Unit, ExpertWeights],
) -> None:
    broken = {
        unit: ExpertWeights(w.w13_2FD, w.w2_DF[:, 1:]) if unit.layer == 1 else w
        for unit, w in weights.items()
    }
    layers = [0, 1, 0, 1, 0]
    calls = [call_of(2, layer=layer, seed=i) for i, layer in enumerate(layers)]
    held = Held(broken)
    callers = pile_up(held, Passes(), calls)
    for layer, caller, call in zip(layers, callers, calls, strict=True):
        if layer == 1:
            assert isinstance(caller.error, RuntimeError)
            assert caller.sums_RD is None
        else:
            assert caller.error is None
            assert caller.sums_RD is not None
            torch.testing.assert_close(caller.sums_RD, alone(weights, call))


class Dropping(Held):
    """Loses a unit while the first computation goes on."""

    def __init__(self, weights: Mapping[Unit, ExpertWeights], lost: Unit) -> None:
        super().__init__(weights)
        self._lost = lost

    def __getitem__(self, unit: Unit) -> ExpertWeights:
        found = super().__getitem__(unit)
        self.pop(self._lost, None)
        return found


def test_an_expert_dropped_meanwhile_costs_only_the_calls_that_want_it(
    weights: dict[Unit, ExpertWeights],
) -> None:
    one_expert = Assignments(((Unit(1, 0), 2),), torch.tensor([0, 1]), torch.ones(2))
    calls = [
        call_of(1, seed=0),
        call_of(2, layer=1, seed=1, top_k=NUM_EXPERTS),
        (1, random_rows(2, HIDDEN, seed=2), one_expert),
    ]
    _, wants_it, other = pile_up(Dropping(weights, Unit(1, 3)), Passes(), calls)
    assert isinstance(wants_it.error, NotHeldError)
    assert other.error is None
    assert other.sums_RD is not None
    torch.testing.assert_close(other.sums_RD, alone(weights, calls[2]), rtol=0, atol=0)


def test_after_a_failure_the_next_call_is_computed(
    weights: dict[Unit, ExpertWeights],
) -> None:
    held = dict(weights)
    batcher = Batcher(held, Passes())
    call = call_of(2, seed=0)
    held[Unit(0, 0)] = ExpertWeights(torch.ones(3, 3), torch.ones(3, 3))
    with pytest.raises(RuntimeError):
        batcher.compute(*call_of(2, seed=0, top_k=NUM_EXPERTS))
    held[Unit(0, 0)] = weights[Unit(0, 0)]
    torch.testing.assert_close(batcher.compute(*call), alone(weights, call))


def test_calls_without_assignments_get_zeros_joined_or_not(
    weights: dict[Unit, ExpertWeights],
) -> None:
    """The wire allows them."""
    nothing = Assignments((), torch.empty(0, dtype=torch.int64), torch.empty(0))
    calls = [call_of(2, seed=0)]
    calls += [(1, random_rows(3, HIDDEN, seed=i), nothing) for i in range(2)]
    _, *callers = pile_up(Held(weights), Passes(), calls)
    for caller in callers:
        assert caller.error is None
        assert caller.sums_RD is not None
        assert torch.equal(caller.sums_RD, torch.zeros(3, HIDDEN))


class OnGpu:
    """Sums that a GPU is still computing, as far as the batcher can see."""

    device = torch.device("cuda", 0)

    def __getitem__(self, rows: slice) -> "OnGpu":
        return self


def compute_on_gpu(
    weights: Mapping[Unit, ExpertWeights],
    metrics: WorkerMetrics,
    monkeypatch: pytest.MonkeyPatch,
    synchronize: Callable[[], None],
) -> None:
    """One call. synchronize: what waiting for the device does."""
    stream = SimpleNamespace(synchronize=synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(batcher_module, "weighted_sums", lambda held, x_RD, of: OnGpu())
    Batcher(weights, metrics).compute(*call_of(2, seed=0))


def test_on_a_gpu_a_pass_takes_until_it_is_computed(
    weights: dict[Unit, ExpertWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only until it is launched."""
    now = 100.0
    took: list[float] = []

    class Timed(WorkerMetrics):
        def observe_pass(
            self, counts: Iterable[tuple[Unit, int]], seconds: float, queued_s: Sequence[float]
        ) -> None:
            took.append(seconds)

    def synchronize() -> None:
        nonlocal now
        now += 3.0

    monkeypatch.setattr(batcher_module, "time", SimpleNamespace(perf_counter=lambda: now))
    compute_on_gpu(weights, Timed(), monkeypatch, synchronize)
    assert took == [3.0]


def test_what_a_gpu_reports_late_is_the_calls_failure(
    weights: dict[Unit, ExpertWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="CUDA error"):
        compute_on_gpu(weights, Passes(), monkeypatch, synchronize)
