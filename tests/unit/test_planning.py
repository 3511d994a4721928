"""A plan fits, holds every expert, is no slower than greedy's, and moves only what pays."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import PlacementError
from cluster.packing import MOVE_PRICE
from cluster.placement import Table, held_by
from cluster.planning import Load, busiest, loads, moves, plan

TINY_LOAD = [
    [1568, 1797, 2384, 1966, 2070, 2127, 1990, 1884],
    [2964, 1823, 1826, 912, 1546, 2413, 1971, 2331],
    [1824, 1777, 2290, 1880, 1779, 1879, 2500, 1857],
    [1550, 2132, 1885, 2649, 1144, 1269, 2657, 2500],
    [4080, 3884, 3091, 3255, 207, 436, 497, 336],
    [155, 3363, 2677, 910, 1889, 1690, 4282, 820],
]
"""Rows that each expert of the embedded checkpoint got of held-out stories."""


class Case:
    """Workers of different size, an expected load, and what is asked of the plan."""

    def __init__(self, draw: Any, *, max_copies: int = 2, is_roomy: bool = False) -> None:
        self.num_layers, self.num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
        self.num_copies = draw(st.integers(1, max_copies))
        self.num_workers = draw(st.integers(self.num_copies, 5))
        self.num_all = self.num_layers * self.num_experts

        def per_worker(each: st.SearchStrategy[Any]) -> list[Any]:
            return draw(st.lists(each, min_size=self.num_workers, max_size=self.num_workers))

        self.expert_bytes = per_worker(st.sampled_from([25, 50, 100]))  # int4 here, int8 there
        least = 100 * self.num_all if is_roomy else 0
        self.budgets = per_worker(st.none() | st.integers(least, 200 * self.num_all))
        self.nodes = per_worker(st.sampled_from("ab"))
        self.load = [
            [draw(st.sampled_from([0.0, 1.0, 2.0, 5.0, 20.0])) for _ in range(self.num_experts)]
            for _ in range(self.num_layers)
        ]
        self.rooms = [
            self.num_all if budget is None else min(self.num_all, budget // of_one)
            for budget, of_one in zip(self.budgets, self.expert_bytes, strict=True)
        ]

    @property
    def has_room(self) -> bool:
        return sum(self.rooms) >= self.num_all * self.num_copies

    def plan(self, load: Load | None = None, current: Table | None = None) -> Table:
        return plan(
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            expert_bytes=self.expert_bytes,
            budgets=self.budgets,
            nodes=self.nodes,
            load=load or self.load,
            current=current,
            num_copies=self.num_copies,
        )

    def time(self, table: Table, load: Load | None = None) -> float:
        """Of all layers, in units of one layer's if everything were even."""
        load = load or self.load
        even = sum(map(sum, load)) / self.num_layers / self.num_workers
        return sum(map(max, loads(table, load, self.num_workers))) / even if even else 0.0


cases = st.composite(lambda draw: Case(draw))()
roomy_cases = st.composite(lambda draw: Case(draw, is_roomy=True))()
single_cases = st.composite(lambda draw: Case(draw, max_copies=1))()


@given(cases)
@settings(max_examples=60)
def test_a_plan_fits_and_holds_every_expert_whenever_there_is_room(case: Case) -> None:
    if not case.has_room:
        with pytest.raises(PlacementError):
            case.plan()
        return
    table = case.plan()
    assert [len(layer) for layer in table] == [case.num_experts] * case.num_layers
    for layer in table:
        for copies in layer:
            holders = [worker for (worker,) in copies]
            assert len(holders) >= case.num_copies
            assert len(set(holders)) == len(holders)
    for worker, room in enumerate(case.rooms):
        assert len(held_by(table, worker)) <= room


@given(roomy_cases)
def test_copies_are_on_different_nodes_where_there_are_several(case: Case) -> None:
    num_nodes = len(set(case.nodes))
    for layer in case.plan():
        for copies in layer:
            nodes = {case.nodes[worker] for (worker,) in copies}
            assert len(nodes) == min(len(copies), num_nodes)


@given(single_cases)
def test_no_plan_is_slower_than_the_longest_first_greedy_one(case: Case) -> None:
    if not case.has_room:
        return
    left = list(case.rooms)
    greedy = []
    for load_of in case.load:
        in_layer = [0.0] * case.num_workers
        holders = [((0,),)] * case.num_experts
        for expert_id in sorted(range(case.num_experts), key=lambda e: (-load_of[e], e)):
            worker = min(
                (w for w in range(case.num_workers) if left[w]),
                key=lambda w: (in_layer[w], case.rooms[w] - left[w], w),
            )
            left[worker] -= 1
            in_layer[worker] += load_of[expert_id]
            holders[expert_id] = ((worker,),)
        greedy.append(tuple(holders))
    assert case.time(case.plan()) <= case.time(tuple(greedy)) + 1e-6


@given(case=roomy_cases, data=st.data())
def test_a_change_of_load_moves_only_what_pays_for_itself(case: Case, data: st.DataObject) -> None:
    before = case.plan()
    factor = st.floats(0.8, 1.25)
    load = [[rows * data.draw(factor) for rows in layer] for layer in case.load]
    after = case.plan(load=load, current=before)
    gain = case.time(before, load) - case.time(after, load)
    assert MOVE_PRICE * len(moves(before, after, case.num_workers)) <= gain + 1e-6


@given(cases)
def test_the_same_input_gives_the_same_plan(case: Case) -> None:
    if case.has_room:
        assert case.plan() == case.plan()


@given(roomy_cases)
def test_what_a_lost_worker_held_is_planned_elsewhere_and_the_rest_stays(case: Case) -> None:
    """The lost one's room is gone; with one worker more than copies, the others take over."""
    if case.num_workers == case.num_copies:
        return
    before = case.plan()
    kept = tuple(
        tuple(tuple(copy for copy in copies if copy != (0,)) for copies in layer)
        for layer in before
    )
    case.budgets[0] = 0
    after = case.plan(current=kept)
    assert not held_by(after, 0)
    missing = sum(max(0, case.num_copies - len(copies)) for layer in kept for copies in layer)
    assert len(moves(kept, after, case.num_workers)) >= missing


def test_a_hot_expert_gets_a_copy_where_there_is_room_and_only_there() -> None:
    load = [[9, 1, 1, 1]]
    sizes = {"num_layers": 1, "num_experts": 4, "expert_bytes": [10, 10], "load": load}
    assert busiest(plan(**sizes, budgets=[20, 20]), load, 2) == [10 / 6]
    unbounded = plan(**sizes, budgets=[None, None])
    assert max(len(copies) for copies in unbounded[0]) == 1
    roomy = plan(**sizes, budgets=[30, 30])
    assert len(roomy[0][0]) == 2
    assert busiest(roomy, load, 2)[0] <= 1.1


def test_a_cold_copy_makes_room_for_a_hot_one() -> None:
    sizes = {"num_layers": 1, "num_experts": 4, "expert_bytes": [10, 10], "budgets": [30, 20]}
    before = plan(**sizes, load=[[9, 1, 1, 1]])
    assert len(before[0][0]) == 2
    after = plan(**sizes, load=[[1, 9, 1, 1]], current=before)
    assert [len(copies) for copies in after[0]] == [1, 2, 1, 1]


@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_the_skewed_layers_of_the_tiny_checkpoint_become_even(num_workers: int) -> None:
    """With room for half as many again."""
    sizes = {
        "num_layers": 6,
        "num_experts": 8,
        "expert_bytes": [1] * num_workers,
        "budgets": [72 // num_workers] * num_workers,
    }
    before = plan(**sizes)
    after = plan(**sizes, load=TINY_LOAD, current=before)
    assert max(busiest(after, TINY_LOAD, num_workers)) <= 1.15
    if num_workers > 2:
        assert max(busiest(before, TINY_LOAD, num_workers)) > 1.4
    assert len(moves(before, after, num_workers)) <= 13  # of 48 experts and 24 spare places


@pytest.mark.parametrize(("num_copies", "num_workers"), [(1, 2), (1, 4), (2, 4)])
def test_slices_of_an_expert_are_on_workers_that_share_everything(
    num_copies: int, num_workers: int
) -> None:
    table = plan(
        num_layers=2,
        num_experts=3,
        expert_bytes=[101] * num_workers,
        budgets=[51 * 6] * num_workers,  # half an expert takes 51 bytes
        num_copies=num_copies,
        num_slices=2,
    )
    crews = {copy for layer in table for copies in layer for copy in copies}
    assert crews == {(worker, worker + 1) for worker in range(0, num_workers, 2)}
    assert all(len(copies) >= num_copies for layer in table for copies in layer)


def test_a_worker_that_comes_back_on_another_node_stays_in_its_crew() -> None:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "num_experts": 4,
        "expert_bytes": [2] * 6,
        "budgets": [None] * 6,
        "num_slices": 2,
    }
    before = plan(**sizes, nodes=list("aabbcc"))
    crews = {copy for layer in before for copies in layer for copy in copies}
    assert crews == {(0, 1), (2, 3), (4, 5)}
    after = plan(**sizes, nodes=list("dabbcc"), current=before)
    assert moves(before, after, 6) == []


def test_what_is_held_in_slices_stays_in_whatever_copies_it_is_listed() -> None:
    """A controller that starts anew hears who holds which slice, not which of them are a crew."""
    sizes: dict[str, Any] = {
        "num_layers": 1,
        "num_experts": 4,
        "expert_bytes": [2] * 6,
        "budgets": [None] * 6,
        "nodes": list("abccba"),
        "num_copies": 2,
        "num_slices": 2,
    }
    before = plan(**sizes)
    crews = {copy for copies in before[0] for copy in copies}
    assert crews == {(0, 5), (1, 4), (2, 3)}
    mixed = (
        tuple(
            tuple(zip(*(sorted(slices) for slices in zip(*copies, strict=True)), strict=True))
            for copies in before[0]
        ),
    )
    assert crews.isdisjoint(copy for copies in mixed[0] for copy in copies)
    after = plan(**sizes, load=[[1.0, 1.001, 1.002, 1.003]], current=mixed)
    assert moves(mixed, after, 6) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"budgets": [3_500, 2_000]}, "1 x 16 experts .* 5,500 bytes, which is room for 7;"),
        ({"num_slices": 3}, "2 workers cannot hold experts in 3 slices"),
        ({"num_copies": 3}, "3 copies .* there are 2"),
        ({"expert_bytes": [], "budgets": []}, "there are 0"),
    ],
)
def test_a_refusal_has_the_numbers(changed: dict[str, Any], says: str) -> None:
    sizes = {"expert_bytes": [1_000, 500], "budgets": [None, None]}
    with pytest.raises(PlacementError, match=says):
        plan(num_layers=2, num_experts=8, **{**sizes, **changed})
