"""Experts move, workers die, controllers restart: nobody is told of an expert that is not there."""

from collections.abc import Collection
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.head.feed import PlacementFeed
from cluster.living import LivingPlacement, Sizes
from cluster.load import MEMORY_ROWS, PRIOR_ROWS, LoadTracker
from cluster.placement import Placement, Stamp, Table, WorkerReport, available, held_by
from model.progress import Progress
from model.units import Unit

DRAIN_S = 30.0
TERM = 5


@dataclass
class FakeWorker:
    """Holds what it is told to, loading one unit a beat; remembers the highest stamp it was told.

    It checks that it never holds more than it has room for, but for one.
    """

    number: int
    incarnation: int
    room: int
    held: list[Unit] = field(default_factory=list)
    orders: tuple[Unit, ...] = ()
    stamp: Stamp = (0, 0)
    rows: dict[tuple[int, int], int] = field(default_factory=dict)

    def hold(self, orders: tuple[Unit, ...]) -> None:
        self.orders = orders
        self.held = [unit for unit in self.held if unit in orders]

    def load_one(self) -> None:
        missing = [unit for unit in self.orders if unit not in self.held]
        self.held += missing[:1]
        assert len(self.held) <= self.room + 1

    def report(self) -> WorkerReport:
        return WorkerReport(
            address=f"127.0.0.1:{self.number + 1}",
            incarnation=self.incarnation,
            node="",
            stamp=self.stamp,
            held=dict.fromkeys(self.held, "digest"),
            num_bytes=len(self.held),
            rows=dict(self.rows),
            error=None,
            loading=Progress(len(self.orders), len(self.held)) if self.is_loading else None,
        )

    @property
    def is_loading(self) -> bool:
        return not set(self.orders) <= set(self.held)


class Cluster:
    """A controller without Ray: workers, one head and the living placement, beat by beat."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.num_workers = sizes.num_workers
        """At the start of the next controller."""
        self.workers: list[FakeWorker | None] = [None] * sizes.num_workers
        self.num_started = 0
        for index in range(self.num_workers):
            self.restart_worker(index)
        self.now = 0.0
        self.placements: list[Placement] = []
        self.head_follows = True
        self.head_stamp: Stamp = (0, 0)
        self.living = self.new_controller()

    def new_controller(self, term: int = TERM) -> LivingPlacement:
        sizes = self.sizes.for_workers(self.num_workers)
        return LivingPlacement(sizes, "worker-{}".format, drain_s=DRAIN_S, term=term)

    def restart_worker(self, index: int) -> None:
        self.num_started += 1
        self.workers[index] = FakeWorker(index, 100 + self.num_started, self.sizes.rooms[-1])

    def resize(self, num_workers: int) -> None:
        self.living.resize(num_workers)
        self.workers += [None] * (num_workers - len(self.workers))
        for index in range(num_workers):
            if self.workers[index] is None:
                self.restart_worker(index)

    def beat(self) -> None:
        self.now += 1
        for index, worker in enumerate(self.workers):
            if worker is None:
                self.living.lose(index)
            else:
                worker.load_one()
                report = worker.report()
                worker.stamp = max(worker.stamp, self.living.stamp)
                self.living.hear(index, report)
            if self.living.needs_plan:
                self.living.adopt(self.living.proposal()())
            self.living.drain([self.head_stamp], self.now)
            if (placement := self.living.publish(self.now)) is not None:
                self.placements.append(placement)
            if worker is not None:
                worker.hold(self.living.orders(index))
            if self.living.may_go(index):
                self.workers[index] = None
                self.living.lose(index)
            self.check()
        if self.head_follows and self.placements:
            self.head_stamp = max(self.head_stamp, self.placements[-1].stamp)

    def check(self) -> None:
        """Whoever the placement of head or controller names holds what it is named for."""
        alive = {w.incarnation: w for w in self.workers if w is not None}
        for placement in self.placements[-1:]:
            for index, info in enumerate(placement.workers):
                if info.incarnation in alive:
                    holds = alive[info.incarnation].held
                    assert set(held_by(placement.table, index)) <= set(holds)
        stamps = [placement.stamp for placement in self.placements]
        assert stamps == sorted(set(stamps))

    def run(self, num_beats: int = 200) -> None:
        for _ in range(num_beats):
            self.beat()
            if self.living.is_settled:
                return
        raise AssertionError(f"never settled: {self.living}")

    def holds(self, index: int) -> list[Unit]:
        """What a worker holds, in the order in which it came."""
        worker = self.workers[index]
        assert worker is not None
        return worker.held

    @property
    def newest(self) -> Placement:
        return self.placements[-1]

    def adopt_for(self, load: list[list[int]]) -> Table:
        """Count rows, and want what is best for them."""
        worker = next(w for w in self.workers if w is not None)
        for layer, rows in enumerate(load):
            for expert_id, count in enumerate(rows):
                worker.rows[layer, expert_id] = worker.rows.get((layer, expert_id), 0) + count
        self.living.hear(worker.number, worker.report())
        change = self.living.proposal()()
        self.living.adopt(change)
        return change.table


def sizes(
    num_workers: int = 2, *, room: int | None = None, copies: int = 1, slices: int = 1
) -> Sizes:
    """Two layers of four experts of a byte each."""
    return Sizes(2, 4, (slices,) * num_workers, (room,) * num_workers, copies, slices)


SKEWED = [[90_000, 100, 90_000, 100], [90_000, 100, 90_000, 100]]


def test_the_first_placement_waits_until_every_expert_can_be_asked_for() -> None:
    cluster = Cluster(sizes())
    cluster.beat()
    assert cluster.placements == []
    assert "8 units to load" in repr(cluster.living)
    cluster.run()
    assert cluster.placements[0].epoch == 1
    assert cluster.placements[0].num_missing == 0
    assert {info.name for info in cluster.newest.workers} == {"worker-0", "worker-1"}


def test_a_start_says_how_far_it_is() -> None:
    cluster = Cluster(sizes())
    assert cluster.living.progress(has_head=False) == ("starting expert workers", 0)
    told = []
    while not cluster.living.is_settled:
        cluster.beat()
        told.append(cluster.living.progress(has_head=False))
    assert told[0] == ("loading experts", 10)
    assert [percent for _, percent in told] == sorted(percent for _, percent in told)
    assert told[-1] == ("starting head replicas", 90)
    assert cluster.living.progress(has_head=True) == ("ready", 100)


def test_those_who_load_are_told_of_until_they_hold_all() -> None:
    cluster = Cluster(sizes())
    told = []
    while not cluster.living.is_settled:
        cluster.beat()
        told.append([load.worker for load in cluster.living.loading])
    assert {worker for workers in told for worker in workers} == {"worker-0", "worker-1"}
    assert told[-1] == []


@given(
    num_workers=st.sampled_from([2, 4]),
    spare=st.integers(0, 3),
    copies=st.integers(1, 2),
    slices=st.integers(1, 2),
    loads=st.lists(
        st.lists(st.integers(0, 50_000), min_size=8, max_size=8), min_size=1, max_size=3
    ),
)
@settings(phases=[Phase.generate])  # a smaller failing case would take minutes to find
def test_a_change_of_plan_takes_no_expert_away_and_ends(
    num_workers: int, spare: int, copies: int, slices: int, loads: list[list[int]]
) -> None:
    """Also when every worker is full. Nobody ever holds more than one unit too many."""
    if copies * slices > num_workers:
        return
    room = 8 * copies * slices // num_workers + spare
    cluster = Cluster(sizes(num_workers, room=room, copies=copies, slices=slices))
    cluster.run()
    for load in loads:
        wanted = cluster.adopt_for([load[:4], load[4:]])
        cluster.run()
        assert all(placement.num_missing == 0 for placement in cluster.placements)
        for index in range(num_workers):
            assert sorted(cluster.holds(index)) == held_by(wanted, index)


def test_an_old_copy_is_dropped_only_once_every_head_has_moved_on() -> None:
    cluster = Cluster(sizes(room=4))
    cluster.run()
    cluster.head_follows = False
    cluster.adopt_for(SKEWED)
    for _ in range(5):
        cluster.beat()
    extra = [len(worker.held) for worker in cluster.workers if worker]
    assert cluster.living.num_missing > 0 or max(extra) > 4
    assert not cluster.living.is_settled
    cluster.head_follows = True
    cluster.run()
    assert [len(worker.held) for worker in cluster.workers if worker] == [4, 4]


def test_a_head_that_never_moves_on_is_waited_for_so_long_only() -> None:
    cluster = Cluster(sizes(room=4))
    cluster.run()
    cluster.head_follows = False
    cluster.adopt_for(SKEWED)
    cluster.run(num_beats=int(10 * DRAIN_S))
    assert cluster.now >= DRAIN_S


def test_with_other_copies_a_lost_worker_is_unlisted_at_once() -> None:
    cluster = Cluster(sizes(3, copies=2))
    cluster.run()
    cluster.workers[1] = None
    cluster.beat()
    assert {info.name for info in cluster.newest.workers} == {"worker-0", "worker-2"}
    assert cluster.newest.num_missing == 0
    cluster.restart_worker(1)
    cluster.run()
    assert len(cluster.newest.workers) == 3
    assert all(len(copies) == 2 for layer in cluster.newest.table for copies in layer)


@pytest.mark.parametrize("copies", [1, 2])
def test_there_is_no_rest_until_heads_know_that_a_lost_workers_successor_holds_all(
    copies: int,
) -> None:
    """So outdated workers are replaced one after the other: the next when there is rest."""
    cluster = Cluster(sizes(3, copies=copies))
    cluster.run()
    assert cluster.living.is_at_rest
    for index in range(3):
        cluster.workers[index] = None
        cluster.living.lose(index)
        assert not cluster.living.is_at_rest
        cluster.beat()
        assert not cluster.living.is_at_rest
        cluster.restart_worker(index)
        while not cluster.living.is_at_rest:
            cluster.beat()
        assert cluster.head_stamp == cluster.newest.stamp
        assert cluster.newest.num_missing == 0
        worker = cluster.workers[index]
        assert worker is not None
        assert worker.incarnation in {info.incarnation for info in cluster.newest.workers}


def test_without_copies_a_replacement_serves_each_expert_as_it_arrives_hottest_first() -> None:
    cluster = Cluster(sizes(2))
    cluster.run()
    lost = {unit[:2] for unit in held_by(cluster.newest.table, 1)}
    assert cluster.workers[1]
    cluster.workers[1].rows = {(layer, e): 1_000 * (layer + e) for layer, e in lost}
    cluster.beat()
    cluster.restart_worker(1)
    before = len(cluster.placements)
    cluster.run()
    missing = [placement.num_missing for placement in cluster.placements[before:]]
    assert missing == [4, 3, 2, 1, 0]
    came = [sum(unit[:2]) for unit in cluster.holds(1)]
    assert came == sorted(came, reverse=True)


def test_a_replacement_loads_first_what_nobody_else_holds() -> None:
    cluster = Cluster(sizes(3, room=4))
    cluster.run()
    cluster.adopt_for([[60_000, 100, 100, 100], [100, 100, 100, 100]])
    cluster.run()
    lost = {unit: cluster.newest.table[unit.layer][unit.expert_id] for unit in cluster.holds(0)}
    assert len({len(copies) for copies in lost.values()}) > 1
    cluster.restart_worker(0)
    cluster.run()
    num_copies = [len(lost[unit]) for unit in cluster.holds(0)]
    assert num_copies == sorted(num_copies)


def test_a_restarted_controller_goes_on_from_what_is_held() -> None:
    cluster = Cluster(sizes(3, room=4))
    cluster.run()
    cluster.adopt_for(SKEWED)
    cluster.run()
    before = cluster.newest
    held = [sorted(worker.held) for worker in cluster.workers if worker]
    cluster.living = cluster.new_controller(TERM + 1)
    cluster.run()
    assert cluster.newest.epoch > before.epoch
    assert cluster.newest.workers == before.workers
    assert [sorted(worker.held) for worker in cluster.workers if worker] == held


@given(
    sizes_wanted=st.lists(st.integers(2, 5), min_size=1, max_size=4),
    copies=st.integers(1, 2),
    spare=st.integers(0, 3),
    num_beats=st.integers(0, 9),
)
@settings(phases=[Phase.generate])
def test_workers_come_and_go_without_an_expert_missing(
    sizes_wanted: list[int], copies: int, spare: int, num_beats: int
) -> None:
    """Also when the next change begins before the last has ended."""
    cluster = Cluster(sizes(2, room=4 * copies + spare, copies=copies))
    cluster.run()
    for wanted in sizes_wanted:
        cluster.resize(wanted)
        for _ in range(num_beats):
            cluster.beat()
    cluster.run()
    cluster.beat()
    assert all(placement.num_missing == 0 for placement in cluster.placements)
    alive = [index for index, worker in enumerate(cluster.workers) if worker]
    assert alive == list(range(sizes_wanted[-1]))
    # a fifth worker is of no use to four experts
    assert {info.name for info in cluster.newest.workers} <= {f"worker-{n}" for n in alive}
    assert len(cluster.living.totals) == len(alive)


def test_a_worker_that_is_wanted_but_silent_is_not_counted_on() -> None:
    cluster = Cluster(sizes(2))
    cluster.run()
    before = cluster.newest
    cluster.living.resize(4)
    cluster.workers += [None, None]
    cluster.beat()
    assert (cluster.newest, cluster.living.needs_plan) == (before, False)
    for index in (2, 3):
        cluster.restart_worker(index)
    cluster.run()
    assert len(cluster.newest.workers) == 4


def test_a_worker_that_dies_as_it_is_to_go_is_not_waited_for() -> None:
    cluster = Cluster(sizes(3))
    cluster.run()
    cluster.resize(2)
    cluster.workers[2] = None
    cluster.run()
    assert cluster.workers[2] is None
    assert cluster.newest.num_missing == 0


def test_a_restarted_controller_keeps_the_workers_that_were_added() -> None:
    cluster = Cluster(sizes(2))
    cluster.run()
    cluster.resize(3)
    cluster.run()
    held = [sorted(worker.held) for worker in cluster.workers if worker]
    cluster.num_workers = 3
    cluster.living = cluster.new_controller(TERM + 1)
    cluster.run()
    assert [sorted(worker.held) for worker in cluster.workers if worker] == held


def test_heads_take_only_later_placements_even_if_no_worker_remembers_any() -> None:
    cluster = Cluster(sizes())
    cluster.head_stamp = (TERM + 2, 41)
    cluster.run()
    assert cluster.newest.stamp == (TERM + 3, 42)


def test_a_head_that_is_heard_of_late_gets_a_placement_later_than_its_own() -> None:
    """Its placement may be of a controller that no worker has heard of."""
    cluster = Cluster(sizes())
    cluster.run()
    assert cluster.newest.epoch == 1
    cluster.head_stamp, cluster.head_follows = (TERM + 2, 41), False
    cluster.beat()
    stamps = [placement.stamp for placement in cluster.placements]
    assert stamps == [(TERM, 1), (TERM + 3, 42)]
    assert cluster.newest.table == cluster.placements[0].table
    cluster.head_follows = True
    cluster.run()
    cluster.beat()
    assert cluster.newest.epoch == 42


@pytest.mark.parametrize("term", [TERM - 3, TERM + 3])
def test_a_new_controllers_placements_are_later_than_the_last_ones_whatever_its_clock_says(
    term: int,
) -> None:
    """Also when it hears only of the workers what there was before it."""
    cluster = Cluster(sizes())
    cluster.run()
    cluster.beat()
    before = cluster.newest
    cluster.head_stamp, cluster.head_follows = (0, 0), False
    cluster.living = cluster.new_controller(term)
    cluster.run()
    assert cluster.newest.stamp > before.stamp
    assert cluster.newest.epoch > before.epoch


def test_of_two_controllers_heads_go_by_the_later_one_at_the_same_epoch() -> None:
    """One that was replaced, and is cut off from its workers, does not know it yet."""
    cluster = Cluster(sizes(3, copies=2))
    cluster.run()
    old, cluster.living = cluster.living, cluster.new_controller(TERM + 1)
    cluster.run()
    old.lose(0)
    stale = old.publish(cluster.now)
    assert stale is not None
    assert stale.epoch == cluster.newest.epoch
    assert stale.table != cluster.newest.table
    feed = PlacementFeed()
    for placement in (stale, cluster.newest, stale):
        feed.put(placement)
    assert feed.newest is cluster.newest


def test_a_replaced_controller_does_not_outbid_the_one_that_it_hears_of_by_workers() -> None:
    cluster = Cluster(sizes())
    cluster.run()
    old, cluster.living = cluster.living, cluster.new_controller(TERM + 1)
    cluster.run()
    cluster.beat()
    for index, worker in enumerate(cluster.workers):
        assert worker is not None
        assert worker.stamp > old.stamp
        old.hear(index, worker.report())
    assert old.publish(cluster.now) is None
    assert cluster.living.stamp > old.stamp


@given(
    copies=st.lists(
        st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True), min_size=3, max_size=3
    ),
    held=st.lists(st.sets(st.integers(0, 2)), min_size=4, max_size=4),
)
def test_what_is_available_is_held_and_as_much_as_is_wanted(
    copies: list[list[int]], held: list[set[int]]
) -> None:
    target: Table = (tuple(tuple((w,) for w in holders) for holders in copies),)
    units: list[Collection[Unit]] = [{Unit(0, e) for e in experts} for experts in held]
    (found,) = available(target, units)
    for expert_id, (wanted, there) in enumerate(zip(target[0], found, strict=True)):
        holders = [(w,) for w in range(4) if expert_id in held[w]]
        assert set(there) <= set(holders)
        assert len(there) == min(len(wanted), len(holders))
        assert {copy for copy in wanted if copy in holders} <= set(there)


def test_load_is_what_was_counted_lately_and_a_quiet_time_changes_nothing() -> None:
    load = LoadTracker(1, 2)
    assert load.expected() == [[PRIOR_ROWS, PRIOR_ROWS]]
    load.count(7, {(0, 0): 1_000})
    load.count(7, {(0, 0): 1_000})  # nothing new
    assert load.expected()[0] == pytest.approx([1_000 + PRIOR_ROWS, PRIOR_ROWS], rel=0.02)
    load.forget(7)
    load.count(8, {(0, 1): 2 * 5 * MEMORY_ROWS})
    cold, hot = load.expected()[0]
    assert cold == pytest.approx(PRIOR_ROWS + 1_000 / 2**5, rel=0.02)
    assert hot > 100 * cold
