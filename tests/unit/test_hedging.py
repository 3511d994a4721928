"""Rows are sent twice within the budget only, to the trusted only; one answer is used, all read."""

import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ExpertFailedError, ExpertsUnavailableError
from cluster.head.hedging import MOST_SAVED_ROWS, RESERVE, Hedging, other_copies
from cluster.head.part import Part
from cluster.head.race import Races
from cluster.head.routes import Routes
from cluster.metrics import HeadMetrics
from cluster.placement import Copy, Placement, WorkerInfo
from model.units import Unit

NUM_WORKERS = 5
COPIES = st.integers(1, 3).flatmap(
    lambda num_slices: st.lists(
        st.permutations(range(NUM_WORKERS)).map(lambda order: tuple(order[:num_slices])),
        min_size=1,
        max_size=3,
    )
)


@given(
    budget=st.floats(0, 0.5),
    sent=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), max_size=200),
    begin=st.integers(0, 200),
)
def test_no_stretch_of_time_costs_more_than_the_budget_and_what_was_saved(
    budget: float, sent: list[tuple[int, int]], begin: int
) -> None:
    hedging = Hedging(budget)
    extra = []
    for num_rows, num_late in sent:
        hedging.earn(num_rows)
        extra.append(num_late if hedging.spend(num_late) else 0)
    earned = budget * sum(num_rows for num_rows, _ in sent)
    assert sum(extra) <= earned + 1e-6
    earned_since = budget * sum(num_rows for num_rows, _ in sent[begin:])
    assert sum(extra[begin:]) <= earned_since + MOST_SAVED_ROWS + 1e-6


@given(
    num_rows=st.integers(1, 100_000),
    usual_s=st.floats(1e-4, 10),
    num_late=st.integers(1, 10),
)
def test_without_a_budget_nothing_is_sent_twice(
    num_rows: int, usual_s: float, num_late: int
) -> None:
    hedging = Hedging(0.0)
    hedging.earn(num_rows)
    assert hedging.due_s(num_late, usual_s) is None
    assert not hedging.spend(num_late)


@given(
    saved=st.integers(0, MOST_SAVED_ROWS),
    num_rows=st.integers(1, 2 * MOST_SAVED_ROWS),
    usual_s=st.floats(1e-4, 10),
)
def test_what_is_due_can_be_paid_is_slower_than_usual_and_waits_longer_the_less_there_is(
    saved: int, num_rows: int, usual_s: float
) -> None:
    hedging = Hedging(1.0)
    hedging.earn(saved)
    assert hedging.due_s(num_rows, None) is None
    due_s = hedging.due_s(num_rows, usual_s)
    if due_s is None:
        assert not hedging.spend(num_rows)
        return
    assert usual_s <= due_s <= RESERVE * usual_s
    assert hedging.spend(num_rows)
    later_s = hedging.due_s(num_rows, usual_s)
    assert later_s is None or later_s >= due_s


@given(
    copies=st.lists(COPIES, min_size=1, max_size=4),
    trusted=st.frozensets(st.integers(0, NUM_WORKERS - 1)),
    avoid=st.frozensets(st.integers(0, NUM_WORKERS - 1), min_size=1),
)
def test_only_trusted_workers_that_are_not_avoided_are_asked_and_each_unit_of_some(
    copies: list[list[Copy]], trusted: frozenset[int], avoid: frozenset[int]
) -> None:
    workers = tuple(WorkerInfo(f"worker-{n}", f"127.0.0.1:{n}", n, 0) for n in range(NUM_WORKERS))
    table = (tuple(tuple(each) for each in copies),)
    routes = Routes(Placement(1, workers, table), {}, trusted)
    units = [Unit(0, expert_id) for expert_id in range(len(copies))]
    found = other_copies(routes, units, [workers[number] for number in avoid])
    allowed = trusted - avoid
    if found is None:
        assert any(not routes.options_among(unit, allowed) for unit in units)
        return
    assert len(found) == len(units)
    for ways in found:
        assert ways
        assert {worker for copy in ways for worker in copy} <= allowed


# --- races, by a made-up clock ---


class Lane:
    """A stream with one call, whose answer or failure comes at a tick of the clock."""

    def __init__(self, race: "Field", number: int, comes_at: int, error: Exception | None) -> None:
        self.worker = WorkerInfo(f"worker-{number}", f"127.0.0.1:{number}", number, 0)
        self.race = race
        self.comes_at = comes_at
        self.error = error
        self.num_received = 0

    def wait(self, call: object, until: float) -> bool:
        assert not self.num_received
        return self.race.tick() >= self.comes_at

    def fileno(self) -> int:
        return self.race.readable


class Field:
    """Lanes on one clock, which goes on with each look at one of them."""

    def __init__(self, lanes: list[tuple[int, Exception | None]], readable: int) -> None:
        self.now = 0
        self.readable = readable
        self.lanes = [Lane(self, n, *lane) for n, lane in enumerate(lanes)]
        self.parts = [self._part(lane) for lane in self.lanes]

    def tick(self) -> int:
        self.now += 1
        return self.now

    def receive(self, part: Part) -> Any:
        lane = cast(Lane, part.stream)
        lane.num_received += 1
        self.now = max(self.now, lane.comes_at)
        if lane.error is not None:
            raise lane.error
        return lane

    def _part(self, lane: Lane) -> Part:
        rows = SimpleNamespace(rows_A=torch.zeros(1))
        overdue_at = time.monotonic() + 60
        return Part(
            call=cast(Any, None),
            rows_R=rows.rows_A,
            assignments=cast(Any, rows),
            stream=cast(Any, lane),
            sent_at=0.0,
            hedge_at=0.0,
            overdue_at=overdue_at,
        )


@pytest.fixture(scope="module")
def readable() -> Iterator[int]:
    """A descriptor that can always be read."""
    descriptor = os.eventfd(1)
    yield descriptor
    os.close(descriptor)


ERRORS = [None, ExpertsUnavailableError("gone"), ExpertFailedError("failed")]


@given(
    lanes=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(ERRORS)), min_size=2, max_size=4)
)
def test_a_race_gives_each_row_once_and_leaves_no_answer_unread(
    readable: int, lanes: list[tuple[int, Exception | None]]
) -> None:
    field = Field(lanes, readable)
    part, *rivals = field.parts
    metrics = HeadMetrics()
    races = Races(field.receive, metrics)
    are_rivals_well = all(error is None for _, error in lanes[1:])
    if lanes[0][1] is not None and not are_rivals_well:
        with pytest.raises(type(lanes[0][1])):
            races.run(part, rivals)
    else:
        answers = races.run(part, rivals)
        winners = [winner for winner, _ in answers]
        assert winners in ([part], rivals)
        assert lanes[0][1] is None if winners == [part] else are_rivals_well
        assert [reply for _, reply in answers] == [winner.stream for winner in winners]
    for _ in range(41):
        owing = races.late_workers()
    assert not owing
    assert [lane.num_received for lane in field.lanes] == [1] * len(lanes)
    assert "rows_hedged_total{" in metrics.exposition()


def test_the_first_complete_answer_wins_and_the_late_worker_is_known_until_it_has_answered(
    readable: int,
) -> None:
    field = Field([(1_000, None), (3, None), (9, None)], readable)
    part, *rivals = field.parts
    races = Races(field.receive, HeadMetrics())
    assert [winner for winner, _ in races.run(part, rivals)] == rivals
    assert races.late_workers() == {part.stream.worker}
    field.now = 1_000
    assert races.late_workers() == set()
    assert field.lanes[0].num_received == 1


def test_a_late_answer_that_never_comes_is_a_loss_once_it_is_overdue(readable: int) -> None:
    gone = ExpertsUnavailableError("gone")
    field = Field([(1_000, gone), (3, None)], readable)
    part, rival = field.parts
    races = Races(field.receive, HeadMetrics())
    object.__setattr__(part, "overdue_at", 0.0)
    assert [winner for winner, _ in races.run(part, [rival])] == [rival]
    assert races.late_workers() == set()
    assert field.lanes[0].num_received == 1
