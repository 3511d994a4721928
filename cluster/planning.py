"""Which worker is to hold which expert: a plan from budgets, expected load and what is held now.

Layers run one after another, and a layer is as slow as its busiest worker. So the plan makes the
sum over the layers of the busiest worker's load small. An expert's rows count as spread evenly
over its copies; what a row takes counts as the same on every worker.

Pure: no network, no clock, no torch. Same input, same plan: a restarted controller moves nothing.
"""

from collections import Counter
from collections.abc import Sequence

from cluster.errors import PlacementError
from cluster.packing import Task, search
from cluster.placement import Copy, Table, held_by
from model.units import Unit

Load = Sequence[Sequence[float]]
"""Of each layer, of each expert: how many rows are expected, in any unit."""


def plan(
    *,
    num_layers: int,
    num_experts: int,
    expert_bytes: Sequence[int],
    budgets: Sequence[int | None],
    nodes: Sequence[str] | None = None,
    load: Load | None = None,
    current: Table | None = None,
    num_copies: int = 1,
    num_slices: int = 1,
) -> Table:
    """Choose who holds what.

    Greedy first: in each layer the expert with the most load goes to the worker with the least.
    Then, starting from such a plan and from what is held now, the busiest worker of a layer gives
    an expert away, swaps one, or shares one by another copy, as long as that gains more than it
    costs. The best result is taken: never worse than greedy's or than to stay, moves included.

    expert_bytes: what a whole expert takes on each worker.
    budgets:      bytes each worker may hold, None for no bound. Copies beyond `num_copies` go only
                  to workers with a bound, since nobody knows what the others have room for.
    nodes:        where each worker runs. Copies of an expert go to different ones where possible.
    load:         even, if left out.
    current:      what is held now. Each unit that must be loaded costs MOVE_PRICE.
    num_copies:   of each expert, at least; never two on one worker.
    num_slices:   each expert is cut over so many workers, a crew, which then hold the same slices
                  of everything. It must divide their number.
    Raises PlacementError when the experts do not fit.
    """
    if len(budgets) % num_slices:
        raise PlacementError(
            f"{len(budgets)} workers cannot hold experts in {num_slices} slices each: "
            f"take a multiple of {num_slices} workers"
        )
    if num_copies * num_slices > len(budgets):
        raise PlacementError(
            f"{num_copies} copies of each expert in {num_slices} slices need as many workers, "
            f"there are {len(budgets)}"
        )
    nodes = nodes or [""] * len(budgets)
    crews = _crews(nodes, num_slices, current)
    needed = num_layers * num_experts
    of_workers = rooms(needed, expert_bytes, budgets, num_slices)
    of_crews = [min(of_workers[worker] for worker in crew) for crew in crews]
    if sum(of_crews) < needed * num_copies:
        raise PlacementError(
            f"no room for {num_copies} x {needed} experts of {max(expert_bytes, default=0):,} "
            f"bytes: {len(budgets)} workers may hold {sum(b or 0 for b in budgets):,} bytes, which "
            f"is room for {sum(of_crews)}; add workers or raise worker_memory_bytes"
        )
    task = Task(
        load=_scaled(load or [[1.0] * num_experts] * num_layers, len(crews)),
        rooms=of_crews,
        takes_more=[all(budgets[worker] is not None for worker in crew) for crew in crews],
        nodes=[nodes[crew[0]] for crew in crews],
        num_copies=num_copies,
        held=_held_by_crews(current, crews) if current else [[()] * num_experts] * num_layers,
    )
    best = search(task)
    return tuple(tuple(tuple(crews[site] for site in sites) for sites in layer) for layer in best)


def rooms(
    num_units: int,
    expert_bytes: Sequence[int],
    budgets: Sequence[int | None],
    num_slices: int = 1,
) -> list[int]:
    """How many of all units each worker has room for; see `plan` for the rest."""
    return [
        num_units
        if budget is None or not of_one
        else min(num_units, budget // -(-of_one // num_slices))
        for of_one, budget in zip(expert_bytes, budgets, strict=True)
    ]


def loads(table: Table, load: Load, num_workers: int) -> list[list[float]]:
    """Expected load of each worker, of each layer."""
    found = []
    for copies_of, load_of in zip(table, load, strict=True):
        by_worker = [0.0] * num_workers
        for copies, rows in zip(copies_of, load_of, strict=True):
            for copy in copies:
                for worker in copy:
                    by_worker[worker] += rows / len(copies) / len(copy)
        found.append(by_worker)
    return found


def busiest(table: Table, load: Load, num_workers: int) -> list[float]:
    """Of each layer: the busiest worker's expected load, relative to the workers' mean."""
    return [
        max(by_worker) * num_workers / sum(by_worker) if any(by_worker) else 1.0
        for by_worker in loads(table, load, num_workers)
    ]


def moves(current: Table, planned: Table, num_workers: int) -> list[tuple[int, Unit]]:
    """What must be loaded to get from one to the other: worker and unit."""
    return [
        (worker, unit)
        for worker in range(num_workers)
        for unit in sorted(set(held_by(planned, worker)) - set(held_by(current, worker)))
    ]


def _scaled(load: Load, num_sites: int) -> list[list[float]]:
    """In units of what a site would get of a layer if all were even."""
    even = sum(map(sum, load)) / max(1, len(load) * num_sites)
    return [[rows / even if even else 1.0 for rows in layer] for layer in load]


def _crews(nodes: Sequence[str], num_slices: int, current: Table | None) -> list[Copy]:
    """Workers that are to hold slices together: by nodes, or as they do now if more stays so.

    A worker that comes back on another node, by nodes alone, would have most others change crews
    and load everything anew.
    """
    by_node = sorted(range(len(nodes)), key=lambda worker: (nodes[worker], worker))
    of_nodes = _cut(by_node, num_slices)
    if not current or num_slices == 1:
        return of_nodes
    num_uses = Counter(copy for layer in current for copies in layer for copy in copies)
    kept: list[Copy] = []
    left = set(by_node)
    for copy in sorted(num_uses, key=lambda copy: (-num_uses[copy], copy)):
        if len(copy) == num_slices and left.issuperset(copy):
            kept.append(copy)
            left.difference_update(copy)
    kept += _cut([worker for worker in by_node if worker in left], num_slices)
    kept.sort(key=lambda crew: by_node.index(crew[0]))

    def num_held(crews: Sequence[Copy]) -> int:
        return sum(len(sites) for layer in _held_by_crews(current, crews) for sites in layer)

    return max(of_nodes, kept, key=num_held)  # the first if they are equal


def _cut(workers: Sequence[int], num_slices: int) -> list[Copy]:
    return [tuple(workers[i : i + num_slices]) for i in range(0, len(workers), num_slices)]


def _held_by_crews(current: Table, crews: Sequence[Copy]) -> list[list[tuple[int, ...]]]:
    """A table by site. A crew holds what its workers do, in whatever copies the table names them;
    copies that no crew holds are left out.
    """
    site_of = {crew: site for site, crew in enumerate(crews)}
    units = {worker: frozenset(held_by(current, worker)) for crew in crews for worker in crew}

    def sites(layer: int, expert_id: int) -> tuple[int, ...]:
        named = [site_of[copy] for copy in current[layer][expert_id] if copy in site_of]
        others = [
            site
            for site, crew in enumerate(crews)
            if site not in named
            and all(
                Unit(layer, expert_id, number, len(crew)) in units[worker]
                for number, worker in enumerate(crew)
            )
        ]
        return (*named, *others)

    return [
        [sites(layer, expert_id) for expert_id in range(len(experts))]
        for layer, experts in enumerate(current)
    ]
