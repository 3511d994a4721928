"""Every expert has a home, the load is even, and the same input gives the same plan."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import (
    ClusterView,
    Copy,
    HeadInfo,
    Placement,
    Table,
    WorkerInfo,
    held_by,
)
from cluster.planning import plan
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


def test_a_worker_counts_the_copies_that_it_holds() -> None:
    workers = tuple(WorkerInfo(f"worker-{i}", f"127.0.0.1:{i}", i, 300) for i in range(2))

    def one(worker: int) -> tuple[Copy, ...]:
        return ((worker,),)

    placement = Placement(1, workers, ((one(0), one(1), one(1)), (((1,), (0,)), one(0), one(1))))
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
