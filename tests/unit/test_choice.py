"""Rows go to copies that can be asked, every row to all parts of its expert once, and evenly."""

from collections import Counter
from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.head.choice import choose, options, split
from cluster.placement import Copy
from model.experts import Assignments, assign
from model.router import Routing
from model.units import Unit

WHOLE = Unit(0, 3)
WORKERS = range(4)


def busiest(rows: list[int], chosen: list[Copy]) -> float:
    load: Counter[int] = Counter()
    for count, copy in zip(rows, chosen, strict=True):
        for worker in copy:
            load[worker] += count / len(copy)  # type: ignore[assignment]
    return max(load.values())


# --- which copies can be asked ---


def test_a_whole_expert_may_be_computed_by_any_complete_copy() -> None:
    copies = [(0,), (1, 2), (3,)]
    assert options(WHOLE, copies, WORKERS) == [(0,), (3,), (1, 2)]
    assert options(WHOLE, copies, {1, 2, 3}) == [(3,), (1, 2)]
    assert options(WHOLE, copies, {0, 1}) == [(0,)]
    assert options(WHOLE, copies, {2}) == []


def test_slices_of_several_copies_make_one_where_none_is_complete() -> None:
    copies = [(0, 1), (2, 3)]
    assert options(WHOLE, copies, WORKERS) == [(0, 1), (2, 3)]
    assert options(WHOLE, copies, {0, 3}) == [(0, 3)]
    assert options(WHOLE, copies, {0, 2}) == []


def test_a_slice_is_computed_by_the_same_slice_only() -> None:
    copies = [(0,), (1, 2), (3, 0), (0, 1, 2)]
    assert options(Unit(0, 3, 1, 2), copies, WORKERS) == [(2,), (0,)]
    assert options(Unit(0, 3, 1, 2), copies, {1, 3}) == []
    assert options(Unit(0, 3, 0, 4), copies, WORKERS) == []


@given(
    copies=st.lists(st.lists(st.sampled_from(WORKERS), min_size=1, max_size=3, unique=True)),
    may_ask=st.sets(st.sampled_from(WORKERS)),
)
def test_options_hold_every_slice_and_ask_nobody_else(
    copies: list[list[int]], may_ask: set[int]
) -> None:
    found = options(WHOLE, [tuple(copy) for copy in copies], may_ask)
    for option in found:
        assert set(option) <= may_ask
        for number, worker in enumerate(option):
            assert any(len(copy) == len(option) and copy[number] == worker for copy in copies)
    assert bool(found) == any(
        all(any(len(c) == n and c[number] in may_ask for c in copies) for number in range(n))
        for n in (1, 2, 3)
    )


# --- which of them are ---


@given(
    experts=st.lists(
        st.tuples(
            st.integers(1, 40),
            st.lists(
                st.lists(st.sampled_from(WORKERS), min_size=1, max_size=2, unique=True).map(tuple),
                min_size=1,
                max_size=2,
                unique=True,
            ),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_the_busiest_worker_is_as_little_busy_as_can_be(
    experts: list[tuple[int, list[Copy]]],
) -> None:
    rows = [count for count, _ in experts]
    chosen = choose(experts)
    assert all(copy in copies for copy, (_, copies) in zip(chosen, experts, strict=True))
    best = min(busiest(rows, list(each)) for each in product(*(copies for _, copies in experts)))
    workers = {worker for _, copies in experts for copy in copies for worker in copy}
    even = sum(rows) / len(workers)
    assert busiest(rows, chosen) <= best + max(1, even / 16) + 1e-9
    assert chosen == choose(experts)


def test_many_experts_with_many_copies_are_spread_evenly() -> None:
    """Far more choices than there are steps."""
    rows = [50, 3, 8, 1, 20, 20, 7, 13] * 4
    copies = [(0,), (1,), (2,), (3,)]
    chosen = choose([(count, copies) for count in rows])
    assert busiest(rows, chosen) <= 1.05 * sum(rows) / 4


def test_two_experts_of_one_row_go_to_two_workers() -> None:
    assert choose([(1, [(0,), (1,)]), (1, [(0,), (1,)])]) == [(0,), (1,)]
    assert choose([(1, [(0,)]), (1, [(0,), (1,)])]) == [(0,), (1,)]
    assert choose([]) == []


# --- splitting ---


def triples(assignments: Assignments) -> list[tuple[Unit, int, float]]:
    """(unit, row, weight) of each assignment."""
    units = [unit for unit, count in assignments.counts for _ in range(count)]
    rows, weights = assignments.rows_A.tolist(), assignments.weights_A.tolist()
    return list(zip(units, rows, weights, strict=True))


@given(
    copies=st.lists(
        st.lists(st.sampled_from(WORKERS), min_size=1, max_size=3, unique=True).map(tuple),
        min_size=8,
        max_size=8,
    ),
    num_rows=st.integers(1, 20),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 2**30),
)
def test_every_assignment_goes_once_to_each_slice_of_its_copy(
    copies: list[Copy], num_rows: int, top_k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(num_rows, 8, generator=generator)
    weights_TK = torch.rand(num_rows, top_k, generator=generator)
    assignments = assign(0, Routing(scores_TE.argsort(dim=1)[:, :top_k], weights_TK))
    parts = split(assignments, [copies[unit.expert_id] for unit, _ in assignments.counts])
    assert [worker for worker, _ in parts] == sorted({worker for worker, _ in parts})
    sent = Counter((worker, triple) for worker, mine in parts for triple in triples(mine))
    expected = Counter(
        (
            worker,
            (Unit(0, unit.expert_id, number, len(copies[unit.expert_id])), row, weight),
        )
        for unit, row, weight in triples(assignments)
        for number, worker in enumerate(copies[unit.expert_id])
    )
    assert sent == expected
    for _, mine in parts:
        units = [unit for unit, _ in mine.counts]
        assert units == sorted(set(units))
        assert all(count > 0 for _, count in mine.counts)
