"""Every expert has a home, the load is even, and the same input gives the same plan."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import PlacementError
from cluster.placement import (
    ClusterView,
    Copy,
    HeadInfo,
    Placement,
    Table,
    WorkerInfo,
    held_by,
    plan,
)
from model.units import Unit

SIZES = st.tuples(st.integers(1, 8), st.integers(1, 9), st.integers(1, 7))
"""Layers, experts, workers."""


def loads(table: Table, num_workers: int) -> list[list[int]]:
    """Experts by worker, of each layer."""
    counts = [Counter(w for copies in layer for copy in copies for w in copy) for layer in table]
    return [[count[worker] for worker in range(num_workers)] for count in counts]


def plan_evenly(num_layers: int, num_experts: int, num_workers: int) -> Table:
    return plan(
        num_layers=num_layers,
        num_experts=num_experts,
        expert_bytes=[100] * num_workers,
        budgets=[None] * num_workers,
    )


@given(sizes=SIZES)
def test_every_expert_of_every_layer_has_exactly_one_copy(sizes: tuple[int, int, int]) -> None:
    num_layers, num_experts, num_workers = sizes
    table = plan_evenly(*sizes)
    assert len(table) == num_layers
    for layer in table:
        assert len(layer) == num_experts
        for copies in layer:
            ((holder,),) = copies
            assert 0 <= holder < num_workers


@given(sizes=SIZES)
def test_without_budgets_layers_and_totals_are_even(sizes: tuple[int, int, int]) -> None:
    table = plan_evenly(*sizes)
    by_layer = loads(table, sizes[2])
    for in_layer in by_layer:
        assert max(in_layer) - min(in_layer) <= 1
    totals = [sum(column) for column in zip(*by_layer, strict=True)]
    assert max(totals) - min(totals) <= 1


@given(sizes=SIZES, data=st.data())
def test_budgets_hold_whenever_the_experts_fit_and_only_then(
    sizes: tuple[int, int, int], data: st.DataObject
) -> None:
    num_layers, num_experts, num_workers = sizes

    def per_worker(each: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(each, min_size=num_workers, max_size=num_workers))

    budgets = per_worker(st.none() | st.integers(0, 3_000))
    expert_bytes = per_worker(st.sampled_from([25, 50, 100]))  # int4 here, int8 there
    rooms = [
        10**6 if budget is None else budget // of_one
        for budget, of_one in zip(budgets, expert_bytes, strict=True)
    ]

    def planned() -> Table:
        return plan(
            num_layers=num_layers,
            num_experts=num_experts,
            expert_bytes=expert_bytes,
            budgets=budgets,
        )

    if sum(rooms) < num_layers * num_experts:
        with pytest.raises(PlacementError):
            planned()
        return
    table = planned()
    for worker, room in enumerate(rooms):
        assert len(held_by(table, worker)) <= room
    assert sum(len(held_by(table, worker)) for worker in range(num_workers)) == (
        num_layers * num_experts
    )


def test_a_refusal_has_the_numbers() -> None:
    with pytest.raises(PlacementError) as refused:
        plan(num_layers=2, num_experts=8, expert_bytes=[1_000, 500], budgets=[3_500, 2_000])
    message = str(refused.value)
    for number in ("expert 7 of layer 0", "2 workers", "5,500 bytes", "16,000"):
        assert number in message
    with pytest.raises(PlacementError, match="0 workers"):
        plan(num_layers=1, num_experts=1, expert_bytes=[], budgets=[])


@given(sizes=SIZES)
def test_the_same_input_gives_the_same_plan(sizes: tuple[int, int, int]) -> None:
    assert plan_evenly(*sizes) == plan_evenly(*sizes)


@given(sizes=SIZES, data=st.data())
def test_held_by_is_the_inverse_of_the_table(
    sizes: tuple[int, int, int], data: st.DataObject
) -> None:
    """With several copies of an expert and with slices, too."""
    num_layers, num_experts, num_workers = sizes

    def copies(holders: list[int]) -> tuple[Copy, ...]:
        """All but the last two workers hold it whole; those hold it in slices."""
        whole = tuple((worker,) for worker in holders[:-2])
        return (*whole, tuple(holders[-2:]))

    row = st.lists(
        st.lists(st.integers(0, num_workers - 1), min_size=1, unique=True).map(copies),
        min_size=num_experts,
        max_size=num_experts,
    ).map(tuple)
    table = data.draw(st.lists(row, min_size=num_layers, max_size=num_layers).map(tuple))
    assert {(worker, unit) for worker in range(num_workers) for unit in held_by(table, worker)} == {
        (worker, Unit(layer, expert_id, number, len(copy)))
        for layer, experts in enumerate(table)
        for expert_id, copies in enumerate(experts)
        for copy in copies
        for number, worker in enumerate(copy)
    }


def test_a_placement_names_the_worker_to_ask() -> None:
    workers = tuple(WorkerInfo(f"worker-{i}", f"127.0.0.1:{i}", i, 300) for i in range(2))

    def one(worker: int) -> tuple[Copy, ...]:
        return ((worker,),)

    placement = Placement(1, workers, ((one(0), one(1), one(1)), (((1,), (0,)), one(0), one(1))))
    assert [placement.holder(0, expert_id) for expert_id in range(3)] == [0, 1, 1]
    assert placement.holder(1, 0) == 1
    assert [placement.num_experts_of(worker) for worker in range(2)] == [3, 4]


@pytest.mark.parametrize(("is_placed", "has_head"), [(a, b) for a in (0, 1) for b in (0, 1)])
def test_a_cluster_is_ready_with_placed_experts_and_a_head(is_placed: int, has_head: int) -> None:
    view = ClusterView(
        version=1,
        phase="",
        percent=0,
        error=None,
        placement=Placement(1, (), ()) if is_placed else None,
        heads=(HeadInfo("head", "127.0.0.1:1"),) * has_head,
        heads_expected=1,
    )
    assert view.is_ready == bool(is_placed and has_head)
