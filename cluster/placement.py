"""Which worker holds which expert, and the view of the cluster that the controller publishes.

Pure: no network, no clock, no torch. `planning` decides who is to hold what.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.signals import WorkerTotals
from model.progress import Progress
from model.units import Unit

Copy = tuple[int, ...]
"""The workers, by index, that hold slice 0, 1, ... of an expert; a single one holds it whole."""

Stamp = tuple[int, int]
"""Term and epoch of a placement: of two, the later has the higher one. (0, 0): of none."""

Table = tuple[tuple[tuple[Copy, ...], ...], ...]
"""Of each layer, of each expert: its copies. None of them: nobody holds it now, the controller has
it loaded, and rows for it wait for the next placement."""


@dataclass(frozen=True)
class WorkerInfo:
    """A running expert worker.

    incarnation: random number drawn at its start, so that a restarted one is not taken for it.
    num_bytes:   of the experts it holds. Not compared: it is the same worker when it holds more.
    """

    name: str
    address: str
    incarnation: int
    num_bytes: int = field(compare=False)


@dataclass(frozen=True)
class WorkerReport:
    """What an expert worker says with every heartbeat.

    node:      where it runs.
    stamp:     the highest that it had been told before this one, by any controller.
    held:      the units that it can be asked for, with the digest of what was read for each.
    num_bytes: of these.
    rows:      how many it has computed since its start, by layer and expert.
    error:     why it failed to load a unit, until it is told again what to hold.
    totals:    what it has done since its start.
    settings:  what it was started with, in words that differ where it does.
    serves:    the part of it that heads must agree on to use it, likewise.
    loading:   how far it has come with what it is loading, if it is.
    borrows:   whether it reads from other nodes, since its own lacks the checkpoint's folder.
    """

    address: str
    incarnation: int
    node: str
    stamp: Stamp
    held: Mapping[Unit, str]
    num_bytes: int
    rows: Mapping[tuple[int, int], int]
    error: str | None
    totals: WorkerTotals = field(default_factory=WorkerTotals)
    settings: str = ""
    serves: str = ""
    loading: Progress | None = None
    borrows: bool = False


@dataclass(frozen=True)
class Placement:
    """Where every expert is. Immutable; each change has a new epoch.

    term: of the controller that published it. One that has been replaced and does not know it yet
          may go on publishing; heads that know a placement of a higher term pass over its own.
    """

    epoch: int
    workers: tuple[WorkerInfo, ...]
    table: Table
    term: int = 0

    @property
    def stamp(self) -> Stamp:
        return self.term, self.epoch

    @property
    def num_missing(self) -> int:
        """Experts that nobody holds now."""
        return sum(not copies for layer in self.table for copies in layer)

    def num_experts_of(self, worker: int) -> int:
        """How many units a worker holds."""
        return len(held_by(self.table, worker))


def held_by(table: Table, worker: int) -> list[Unit]:
    """The units that a worker holds, in ascending order."""
    return sorted(
        Unit(layer, expert_id, slice_number, len(copy))
        for layer, experts in enumerate(table)
        for expert_id, copies in enumerate(experts)
        for copy in copies
        for slice_number, holder in enumerate(copy)
        if holder == worker
    )


def available(target: Table, held: Sequence[Collection[Unit]]) -> Table:
    """What heads can be told: of each expert the wanted copies that are there already, and as many
    other ones as are still missing. held: by worker.
    """
    table = []
    for layer, experts in enumerate(target):
        row = []
        for expert_id, wanted in enumerate(experts):
            num_slices = len(wanted[0])
            there = [
                copy
                for copy in wanted
                if all(
                    Unit(layer, expert_id, number, num_slices) in held[worker]
                    for number, worker in enumerate(copy)
                )
            ]
            used = {worker for copy in there for worker in copy}
            others = other_copies(layer, expert_id, num_slices, held, used)
            row.append((*there, *others[: len(wanted) - len(there)]))
        table.append(tuple(row))
    return tuple(table)


def other_copies(
    layer: int,
    expert_id: int,
    num_slices: int,
    held: Sequence[Collection[Unit]],
    used: Collection[int],
) -> list[Copy]:
    """Copies of an expert that can be put together from the workers that are not used yet."""
    holders = [
        [
            worker
            for worker, units in enumerate(held)
            if worker not in used and Unit(layer, expert_id, number, num_slices) in units
        ]
        for number in range(num_slices)
    ]
    return list(zip(*holders, strict=False))


def compacted(table: Table) -> tuple[list[int], Table]:
    """The workers that hold something, and the table numbered by those."""
    used = sorted({w for layer in table for copies in layer for copy in copies for w in copy})
    return used, renumbered(table, {worker: index for index, worker in enumerate(used)})


def renumbered(table: Table, number: Mapping[int, int]) -> Table:
    """A table by other numbers of the workers, without the copies of those that have none."""
    return tuple(
        tuple(
            tuple(
                tuple(number[worker] for worker in copy)
                for copy in copies
                if all(worker in number for worker in copy)
            )
            for copies in layer
        )
        for layer in table
    )


@dataclass(frozen=True)
class Loading:
    """How far a worker has come with what it is loading. borrows: see WorkerReport."""

    worker: str
    progress: Progress
    borrows: bool


@dataclass(frozen=True)
class HeadInfo:
    """A head replica that takes requests."""

    name: str
    address: str


@dataclass(frozen=True)
class HeadsWanted:
    """How many heads Serve is to run, and since when: seconds since the epoch."""

    number: int
    decided_at: float


@dataclass(frozen=True)
class ClusterView:
    """What the controller tells everybody.

    version: grows with every change. phase, percent: how far the start has come, for people.
    error:   what keeps a worker or head from ever getting ready, or None.
    heads_wanted: None: as many as Serve runs now, for the controller does not know yet, or never
             scales.
    scaling: the last change of their number, or of the workers', and why; None before the first.
    takes_over: whether workers were alive when the controller began, so that it is ready in a
             moment; None until it has looked.
    is_asleep: heads and workers are let go until a request asks for them.
    loading: of the workers that load, as of a second ago.
    """

    version: int
    phase: str
    percent: int
    error: str | None
    placement: Placement | None
    heads: tuple[HeadInfo, ...]
    heads_expected: int
    heads_wanted: HeadsWanted | None = None
    scaling: str | None = None
    takes_over: bool | None = None
    is_asleep: bool = False
    loading: tuple[Loading, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Experts are placed and a head has passed rows through every one of them."""
        return self.placement is not None and len(self.heads) > 0

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where heads and workers listen, HOST:PORT."""
        workers = self.placement.workers if self.placement else ()
        return (*(head.address for head in self.heads), *(worker.address for worker in workers))
