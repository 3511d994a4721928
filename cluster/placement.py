"""Which worker holds which expert, and the view of the cluster that the controller publishes.

Pure: no network, no clock, no torch. `planning` decides who is to hold what.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    """

    address: str
    incarnation: int
    node: str
    stamp: Stamp
    held: Mapping[Unit, str]
    num_bytes: int
    rows: Mapping[tuple[int, int], int]
    error: str | None


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


@dataclass(frozen=True)
class HeadInfo:
    """A head replica that takes requests."""

    name: str
    address: str


@dataclass(frozen=True)
class ClusterView:
    """What the controller tells everybody.

    version: grows with every change. phase, percent: how far the start has come, for people.
    error:   what keeps a worker or head from ever getting ready, or None.
    """

    version: int
    phase: str
    percent: int
    error: str | None
    placement: Placement | None
    heads: tuple[HeadInfo, ...]
    heads_expected: int

    @property
    def is_ready(self) -> bool:
        """Experts are placed and a head has passed rows through every one of them."""
        return self.placement is not None and len(self.heads) > 0
