"""Which worker holds which expert, and the view of the cluster that the controller publishes.

Pure: no network, no clock, no torch. Same input, same plan: a restarted controller moves nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.errors import PlacementError
from model.units import Unit

Copy = tuple[int, ...]
"""The workers, by index, that hold slice 0, 1, ... of an expert; a single one holds it whole."""

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
class Placement:
    """Where every expert is. Immutable; each change has a new epoch."""

    epoch: int
    workers: tuple[WorkerInfo, ...]
    table: Table

    def holder(self, layer: int, expert_id: int) -> int:
        """Index of the worker to ask."""
        (worker,) = self.table[layer][expert_id][0]
        return worker

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


def plan(
    *,
    num_layers: int,
    num_experts: int,
    expert_bytes: Sequence[int],
    budgets: Sequence[int | None],
) -> Table:
    """Give every expert one copy, spreading each layer, and then the bytes, evenly.

    Layers run one after another, so a layer is as slow as its busiest worker: evenness within the
    layer comes first. Where a layer does not divide evenly, the surplus goes round.

    expert_bytes: what an expert takes on each worker.
    budgets:      bytes each worker may hold, None for no bound.
    Raises PlacementError when the experts do not fit.
    """
    used = [0] * len(budgets)
    table = []
    for layer in range(num_layers):
        in_layer = [0] * len(budgets)
        row = []
        for expert_id in range(num_experts):
            open_workers = [
                worker
                for worker, budget in enumerate(budgets)
                if budget is None or used[worker] + expert_bytes[worker] <= budget
            ]
            if not open_workers:
                needed = num_layers * num_experts * max(expert_bytes, default=0)
                raise PlacementError(
                    f"no room for expert {expert_id} of layer {layer}: {len(budgets)} workers may "
                    f"hold {sum(b or 0 for b in budgets):,} bytes, all experts take up to "
                    f"{needed:,}; add workers or raise worker_memory_bytes"
                )
            chosen = min(open_workers, key=lambda worker: (in_layer[worker], used[worker], worker))
            in_layer[chosen] += 1
            used[chosen] += expert_bytes[chosen]
            row.append(((chosen,),))
        table.append(tuple(row))
    return tuple(table)


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
