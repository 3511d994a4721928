"""The living placement: what each worker is to hold next, and what heads are told meanwhile.

A unit is loaded where it is to be, then a placement says so, then heads move on to it, and only
then is the old copy dropped; so a change of plan interrupts nobody. The same rules bring up a new
cluster, a replaced worker and a restarted controller: they look only at what is wanted and what is
held. Pure: told what workers and heads say and what time it is.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from cluster.load import LoadTracker
from cluster.placement import (
    Loading,
    Placement,
    Stamp,
    Table,
    WorkerInfo,
    WorkerReport,
    available,
    compacted,
    held_by,
    other_copies,
    renumbered,
)
from cluster.planning import busiest, moves, plan, rooms
from cluster.signals import WorkerTotals
from model.units import Unit


@dataclass(frozen=True)
class Sizes:
    """What is to be placed, and where there is room; as `planning.plan` takes it."""

    num_layers: int
    num_experts: int
    expert_bytes: tuple[int, ...]
    budgets: tuple[int | None, ...]
    num_copies: int = 1
    num_slices: int = 1

    @property
    def num_workers(self) -> int:
        return len(self.budgets)

    def for_workers(self, number: int) -> "Sizes":
        """The same for more workers, which are like the last."""
        more = number - self.num_workers
        return replace(
            self,
            expert_bytes=self.expert_bytes + more * self.expert_bytes[-1:],
            budgets=self.budgets + more * self.budgets[-1:],
        )

    @cached_property
    def rooms(self) -> list[int]:
        """Units that each worker may hold."""
        return rooms(
            self.num_layers * self.num_experts, self.expert_bytes, self.budgets, self.num_slices
        )


@dataclass(frozen=True)
class Change:
    """Another plan, and what it is expected to be good for."""

    table: Table
    members: frozenset[int]
    """The workers that it counts on."""
    moves: list[tuple[int, Unit]]
    """Worker and unit to load."""
    before: list[float]
    """Of each layer: the busiest worker's expected load, relative to the mean."""
    after: list[float]

    @property
    def gain(self) -> float:
        """Share of the experts' time that it is expected to save."""
        return 1 - sum(self.after) / sum(self.before)


@dataclass(frozen=True)
class _Published:
    """A placement, with its table in the controller's own numbering of the workers."""

    placement: Placement
    table: Table
    replaced_at: float = 0.0

    def uses(self, worker: int, incarnation: int) -> list[Unit]:
        """What heads that go by it may ask of a worker."""
        is_listed = any(info.incarnation == incarnation for info in self.placement.workers)
        return held_by(self.table, worker) if is_listed else []


class LivingPlacement:
    """Wanted, held, published. Owned by the controller's event loop."""

    def __init__(
        self, sizes: Sizes, name_of: Callable[[int], str], *, drain_s: float, term: int
    ) -> None:
        """name_of: a worker. drain_s: how long heads that do not say that they have moved on are
        waited for. term: of this controller, above those before it; raised where it is not.
        """
        self.num_workers = sizes.num_workers
        """How many are wanted. Those with higher numbers give away what they hold, and may go."""
        self.load = LoadTracker(sizes.num_layers, sizes.num_experts)
        self._term = term
        self._epoch = 0
        self._sizes = sizes
        self._name_of = name_of
        self._drain_s = drain_s
        self._reports: list[WorkerReport | None] = [None] * sizes.num_workers
        self._target: Table | None = None
        self._members: frozenset[int] = frozenset()
        """The workers that the target counts on."""
        self._published: _Published | None = None
        self._draining: list[_Published] = []

    def __repr__(self) -> str:
        num_heard = sum(report is not None for report in self._reports)
        return (
            f"LivingPlacement(epoch {self._epoch}, {num_heard} of {len(self._reports)} workers, "
            f"{self.num_missing} units to load, {len(self._draining)} epochs drain)"
        )

    @property
    def stamp(self) -> Stamp:
        """Of the newest placement that there is, as far as is known."""
        return self._term, self._epoch

    # --- what is heard ---

    def hear(self, worker: int, report: WorkerReport) -> None:
        """A worker's heartbeat."""
        before = self._reports[worker]
        if before is not None and before.incarnation != report.incarnation:
            self.lose(worker)
        self._reports[worker] = report
        if self._published is None:  # later, it may have heard of a controller after this one
            self._come_after(report.stamp)
        self.load.count(report.incarnation, report.rows)

    def lose(self, worker: int) -> None:
        """A worker is gone, with all that it held."""
        report = self._reports[worker]
        if report is not None:
            self.load.forget(report.incarnation)
        self._reports[worker] = None

    def drain(self, stamps_of_heads: Collection[Stamp], now: float) -> None:
        """Forget the placements that no head goes by any more, or for too long.

        stamps_of_heads: of what each of them goes by; (0, 0) for one that knows no placement yet.
        """
        for stamp in stamps_of_heads:
            self._come_after(stamp)  # they take no older one
        oldest = min((stamp for stamp in stamps_of_heads if any(stamp)), default=self.stamp)
        self._draining = [
            old
            for old in self._draining
            if oldest <= old.placement.stamp and now - old.replaced_at < self._drain_s
        ]

    def _come_after(self, stamp: Stamp) -> None:
        """Whatever is published from now on is later than that."""
        term, epoch = stamp
        if term > self._term:
            self._term = term + 1
        self._epoch = max(self._epoch, epoch)

    @property
    def totals(self) -> dict[int, WorkerTotals]:
        """What the workers that hold all that they are to have done, by incarnation."""
        return {
            report.incarnation: report.totals
            for worker, report in enumerate(self._reports)
            if report is not None and report.held.keys() >= set(held_by(self._target or (), worker))
        }

    # --- what is wanted ---

    @property
    def is_planned(self) -> bool:
        return self._target is not None

    @property
    def has_heard_all(self) -> bool:
        """Every worker that is wanted lives and has reported."""
        return None not in self._reports[: self.num_workers]

    @property
    def needs_plan(self) -> bool:
        """There is none yet and could be one, or workers have come or are to go since."""
        if self._target is None:
            return self.has_heard_all
        return self._members_now != self._members

    @property
    def _members_now(self) -> frozenset[int]:
        """The workers that a plan may count on: a new one once it is heard of, and none that dies
        is given up, since it will be replaced.
        """
        return frozenset(
            worker
            for worker in range(self.num_workers)
            if self._target is None or worker in self._members or self._reports[worker] is not None
        )

    @property
    def num_wanted(self) -> int:
        """Units that are to be held, over all workers."""
        return sum(len(copy) for layer in self._target or () for es in layer for copy in es)

    @property
    def num_missing(self) -> int:
        """Units that are still to be loaded, over all workers."""
        if self._target is None:
            return 0
        held = [self._held(worker) for worker in range(len(self._reports))]
        return sum(
            Unit(layer, expert_id, number, len(copy)) not in held[worker]
            for layer, experts in enumerate(self._target)
            for expert_id, copies in enumerate(experts)
            for copy in copies
            for number, worker in enumerate(copy)
        )

    def progress(self, *, has_head: bool) -> tuple[str, int]:
        """What is still to be done before requests can be answered, and how much of all is done,
        percent. has_head: a head replica is ready.
        """
        if self._target is None:
            num_heard = sum(report is not None for report in self._reports)
            return "starting expert workers", 10 * num_heard // self.num_workers
        if self._published is None:
            num_loaded = self.num_wanted - self.num_missing
            return "loading experts", 10 + 80 * num_loaded // max(1, self.num_wanted)
        if num_missing := self._published.placement.num_missing:
            return f"reloading {num_missing} experts that nobody holds", 90
        return ("ready", 100) if has_head else ("starting head replicas", 90)

    @property
    def loading(self) -> tuple[Loading, ...]:
        """How far the workers have come that load something."""
        return tuple(
            Loading(self._name_of(worker), report.loading, report.borrows)
            for worker, report in enumerate(self._reports)
            if report is not None and report.loading is not None
        )

    @property
    def is_settled(self) -> bool:
        """All is where it is wanted, and no head goes by an older placement."""
        return self.is_planned and not self.num_missing and not self._draining

    @property
    def is_at_rest(self) -> bool:
        """Settled, and no worker that is wanted is away."""
        return self.is_settled and self.has_heard_all

    def proposal(self) -> Callable[[], Change]:
        """Finds the best plan for the load of now, from what is wanted already, or else held.

        May be called in another thread. Raises PlacementError when the experts do not fit.
        """
        sizes = self._sizes
        current = self._target or self._all_held()
        load = self.load.expected()
        nodes = [report.node if report else "" for report in self._reports]
        members = sorted(self._members_now)
        stays = renumbered(current, {worker: n for n, worker in enumerate(members)})

        def find() -> Change:
            planned = plan(
                num_layers=sizes.num_layers,
                num_experts=sizes.num_experts,
                expert_bytes=[sizes.expert_bytes[worker] for worker in members],
                budgets=[sizes.budgets[worker] for worker in members],
                nodes=[nodes[worker] for worker in members],
                load=load,
                current=stays,
                num_copies=sizes.num_copies,
                num_slices=sizes.num_slices,
            )
            table = renumbered(planned, dict(enumerate(members)))
            return Change(
                table,
                frozenset(members),
                moves(current, table, sizes.num_workers),
                busiest(stays, load, len(members)),
                busiest(planned, load, len(members)),
            )

        return find

    def adopt(self, change: Change) -> None:
        """Want this from now on."""
        self._target, self._members = change.table, change.members

    def resize(self, num_workers: int) -> None:
        """Want so many workers from now on: a plan without the others, or with more, is needed."""
        assert num_workers > 0
        self.num_workers = num_workers
        if (more := num_workers - self._sizes.num_workers) > 0:
            self._sizes = self._sizes.for_workers(num_workers)
            self._reports += [None] * more

    # --- what follows ---

    def orders(self, worker: int) -> tuple[Unit, ...]:
        """What a worker is to hold now: what heads may ask it for, and what it is to load next.

        Units that nobody holds come first, then those with the most load. While units move, a
        worker holds at most one more than it has room for. What is left out counts as dropped.
        """
        report = self._reports[worker]
        if report is None:
            return ()
        if self._target is None:
            return tuple(report.held)
        wanted = held_by(self._target, worker)
        needed = set(wanted)
        for published in filter(None, (self._published, *self._draining)):
            needed.update(published.uses(worker, report.incarnation))
        kept = {unit: digest for unit, digest in report.held.items() if unit in needed}
        self._reports[worker] = replace(report, held=kept)  # the rest is gone once it is told
        load = self.load.expected()
        held = [self._held(other) for other in range(len(self._reports))]
        missing = sorted(
            (unit for unit in wanted if unit not in report.held),
            key=lambda u: (any(u in units for units in held), -load[u.layer][u.expert_id], u),
        )
        return (*kept, *missing[: max(0, self._sizes.rooms[worker] + 1 - len(kept))])

    def may_go(self, worker: int) -> bool:
        """It is not wanted any more, and no head may ask it for anything."""
        return worker >= self.num_workers and not self.orders(worker)

    def publish(self, now: float) -> Placement | None:
        """The next placement, if anything has changed that heads must know.

        The first waits until every expert can be asked for; later ones may have experts without any
        copy, whose rows then wait.
        """
        if self._target is None:
            return None
        table = available(self._target, [self._held(w) for w in range(len(self._reports))])
        is_whole = all(copies for layer in table for copies in layer)
        if self._published is None and not is_whole:
            return None
        used, compact = compacted(table)
        infos = []
        for worker in used:
            report = self._reports[worker]
            assert report is not None, "it holds something"
            infos.append(
                WorkerInfo(
                    self._name_of(worker), report.address, report.incarnation, report.num_bytes
                )
            )
        placement = Placement(self._epoch + 1, tuple(infos), compact, self._term)
        if self._published is not None:
            before = self._published.placement
            # heads that go by a later one, of a controller before this one, would not take it
            is_newest = before.stamp == self.stamp
            is_same = (before.table, before.workers) == (placement.table, placement.workers)
            if is_newest and is_same:
                return None
            self._draining.append(replace(self._published, replaced_at=now))
        self._epoch += 1
        self._published = _Published(placement, table)
        return placement

    def _held(self, worker: int) -> Mapping[Unit, str]:
        report = self._reports[worker]
        return report.held if report else {}

    def _all_held(self) -> Table:
        """Every copy that there is."""
        nothing = ((),) * self._sizes.num_experts
        held = [self._held(worker) for worker in range(len(self._reports))]
        return tuple(
            tuple(
                tuple(other_copies(layer, e, self._sizes.num_slices, held, ()))
                for e, _ in enumerate(nothing)
            )
            for layer in range(self._sizes.num_layers)
        )
