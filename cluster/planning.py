"""Which worker is to hold which expert: a plan from budgets, expected load and what is held now.

Layers run one after another, and a layer is as slow as its busiest worker. So the plan makes the
sum over the layers of the busiest worker's load small. An expert's rows count as spread evenly
over its copies; what a row takes counts as the same on every worker.

Pure: no network, no clock, no torch. Same input, same plan: a restarted controller moves nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import PlacementError
from cluster.placement import Copy, Table, held_by
from model.units import Unit

Load = Sequence[Sequence[float]]
"""Of each layer, of each expert: how many rows are expected, in any unit."""

MOVE_PRICE = 0.02
"""What loading a unit must gain at least: this share of the time that a layer would take if its
load were perfectly even. Loading reads hundreds of megabytes; noise in the load is a few percent.
"""

_SHARPNESS = 8
"""The search goes by this norm of a layer's loads rather than by the largest: the norm also falls
when one of two equally busy workers gets relief, the first step to relieving both."""

_TOO_LITTLE = 1e-9


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
    num_slices:   each expert is cut over so many workers, which then hold the same slices of
                  everything. It must divide their number.
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
    by_node = sorted(range(len(budgets)), key=lambda worker: (nodes[worker], worker))
    crews = [tuple(by_node[i : i + num_slices]) for i in range(0, len(by_node), num_slices)]
    needed = num_layers * num_experts
    of_workers = rooms(needed, expert_bytes, budgets, num_slices)
    of_crews = [min(of_workers[worker] for worker in crew) for crew in crews]
    if sum(of_crews) < needed * num_copies:
        raise PlacementError(
            f"no room for {num_copies} x {needed} experts of {max(expert_bytes, default=0):,} "
            f"bytes: {len(budgets)} workers may hold {sum(b or 0 for b in budgets):,} bytes, which "
            f"is room for {sum(of_crews)}; add workers or raise worker_memory_bytes"
        )
    task = _Task(
        load=_scaled(load or [[1.0] * num_experts] * num_layers, len(crews)),
        rooms=of_crews,
        takes_more=[all(budgets[worker] is not None for worker in crew) for crew in crews],
        nodes=[nodes[crew[0]] for crew in crews],
        num_copies=num_copies,
        held=_held_by_crews(current, crews) if current else [[()] * num_experts] * num_layers,
    )
    drafts = []
    if current:
        drafts += _drafts_from_what_is_held(task)
    greedy, rationed = _greedy(task, is_rationed=False), _greedy(task, is_rationed=True)
    drafts += [greedy, _climbed(greedy), _climbed(rationed)]
    best = min(drafts, key=_Draft.price)  # the first of several equals: to stay, if that is one
    return tuple(
        tuple(tuple(crews[site] for site in sites) for sites in layer) for layer in best.sites
    )


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


# --- the search, over crews: the workers that hold an expert's slices together, often just one ---


@dataclass(frozen=True)
class _Task:
    """What is asked for. A site is a crew, by index."""

    load: list[list[float]]
    rooms: list[int]
    """Experts that each site may hold, of all layers."""
    takes_more: list[bool]
    """Whether a site may get copies that need not be."""
    nodes: list[str]
    num_copies: int
    held: list[list[tuple[int, ...]]]
    """The sites that hold each expert of each layer now."""

    def num_loads(self, layer: int, expert_id: int, sites: Sequence[int]) -> int:
        """How many of these sites would have to load the expert."""
        return sum(site not in self.held[layer][expert_id] for site in sites)

    def clashes(self, sites: Sequence[int]) -> int:
        """Copies that share a node with another, though there are nodes enough."""
        distinct = len({self.nodes[site] for site in sites})
        return min(len(sites), len(set(self.nodes))) - distinct


@dataclass(frozen=True)
class _Change:
    """New sites for one or two experts of a layer."""

    gain: float
    sites: tuple[tuple[int, list[int]], ...] = ()


class _Draft:
    """A plan in the making."""

    def __init__(self, task: _Task) -> None:
        self.task = task
        self.sites: list[list[list[int]]] = [[[] for _ in layer] for layer in task.load]
        self.loads = [[0.0] * len(task.rooms) for _ in task.load]
        self.left = list(task.rooms)

    def put(self, layer: int, expert_id: int, sites: list[int]) -> None:
        """Let these sites hold an expert, in place of those that did."""
        loads, rows = self.loads[layer], self.task.load[layer][expert_id]
        before = self.sites[layer][expert_id]
        for site in before:
            loads[site] -= rows / len(before)
            self.left[site] += 1
        for site in sites:
            loads[site] += rows / len(sites)
            self.left[site] -= 1
        self.sites[layer][expert_id] = sites

    def price(self) -> float:
        """Time of all layers, and what must be loaded."""
        return sum(max(loads) for loads in self.loads) + MOVE_PRICE * sum(
            self.task.num_loads(layer, expert_id, sites)
            for layer, experts in enumerate(self.sites)
            for expert_id, sites in enumerate(experts)
        )

    def fits(self, change: _Change, layer: int) -> bool:
        """Whether there still is room for it."""
        after = Counter(site for _, sites in change.sites for site in sites)
        after.subtract(site for e, _ in change.sites for site in self.sites[layer][e])
        return all(more <= self.left[site] for site, more in after.items() if more > 0)

    def best_change(self, layer: int) -> _Change:
        """What relieves the layer's busiest site most."""
        task, loads, sites_of = self.task, self.loads[layer], self.sites[layer]
        powers = sum(load**_SHARPNESS for load in loads)
        here = loads.index(max(loads))
        by_load = sorted(range(len(loads)), key=lambda site: (loads[site], site))
        best = _Change(_TOO_LITTLE)

        def consider(*changed: tuple[int, list[int]]) -> None:
            nonlocal best
            difference: dict[int, float] = {}
            price = 0.0
            for expert_id, sites in changed:
                before, rows = sites_of[expert_id], task.load[layer][expert_id]
                if task.clashes(sites) > task.clashes(before):
                    return
                for site in before:
                    difference[site] = difference.get(site, 0.0) - rows / len(before)
                for site in sites:
                    difference[site] = difference.get(site, 0.0) + rows / len(sites)
                price += MOVE_PRICE * (
                    task.num_loads(layer, expert_id, sites)
                    - task.num_loads(layer, expert_id, before)
                )
            after = powers + sum(
                max(0.0, loads[site] + more) ** _SHARPNESS - loads[site] ** _SHARPNESS
                for site, more in difference.items()
            )
            gain = powers ** (1 / _SHARPNESS) - max(0.0, after) ** (1 / _SHARPNESS) - price
            if gain > best.gain:
                best = _Change(gain, changed)

        for expert_id, sites in enumerate(sites_of):
            if here not in sites:
                continue
            others = [site for site in sites if site != here]
            if len(others) >= task.num_copies:
                consider((expert_id, others))
            for site in range(len(loads)):
                if site not in sites and self.left[site] > 0:
                    consider((expert_id, [*others, site]))
                    if task.takes_more[site]:
                        consider((expert_id, [*sites, site]))
            for other_id, other_sites in enumerate(sites_of):
                for site in other_sites:
                    if site in sites:
                        continue
                    rest = [s for s in other_sites if s != site]
                    if here not in other_sites:
                        consider((expert_id, [*others, site]), (other_id, [*rest, here]))
                    thirds = [s for s in by_load if s not in other_sites and self.left[s] > 0]
                    if task.takes_more[site]:
                        for third in thirds[:3]:
                            consider((expert_id, [*sites, site]), (other_id, [*rest, third]))
        return best


def _greedy(task: _Task, *, is_rationed: bool) -> _Draft:
    """The expert with the most load to the sites with the least, layer by layer.

    Where several are equal, to the emptiest. is_rationed: no site takes more than its room's even
    share for a layer, if others can. Otherwise small rooms are full before the last layers.
    """
    draft = _Draft(task)
    to_go = sum(len(layer) for layer in task.load)
    for layer, load_of in enumerate(task.load):
        layers_to_go = len(task.load) - layer
        reserved = [room - -(-room // layers_to_go) if is_rationed else 0 for room in draft.left]
        for expert_id in sorted(range(len(load_of)), key=lambda e: (-load_of[e], e)):
            draft.put(layer, expert_id, _greedy_sites(draft, layer, to_go, reserved))
            to_go -= 1
    return draft


def _greedy_sites(draft: _Draft, layer: int, to_go: int, reserved: list[int]) -> list[int]:
    """Sites for one expert of those to go; finds a way for all of them if there is one.

    A site with room for fewer than all experts to go is short. Every site that is not chosen now
    is of no more use to this expert, so what the short ones may give it is bounded by what all
    sites together can hold beyond the copies that must be.
    """
    task, left = draft.task, draft.left
    slack = sum(min(room, to_go) for room in left) - to_go * task.num_copies
    num_short = slack + task.num_copies - sum(room >= to_go for room in left)
    chosen: list[int] = []
    while len(chosen) < task.num_copies:
        nodes = {task.nodes[site] for site in chosen}
        site = min(
            (
                site
                for site, room in enumerate(left)
                if site not in chosen and (room >= to_go or (room > 0 and num_short > 0))
            ),
            key=lambda site: (
                task.nodes[site] in nodes,
                left[site] <= reserved[site],
                draft.loads[layer][site],
                task.rooms[site] - left[site],
                site,
            ),
        )
        num_short -= left[site] < to_go
        chosen.append(site)
    return chosen


def _drafts_from_what_is_held(task: _Task) -> list[_Draft]:
    """To stay, and to go on from there; nothing where what is held now cannot stay.

    The second starts with the copies that must be. Others come back for nothing where they help,
    and otherwise make room for those that help more.
    """
    stay, fewer = _Draft(task), _Draft(task)
    for layer, experts in enumerate(task.held):
        for expert_id, sites in enumerate(experts):
            stay.put(layer, expert_id, list(sites))
            fewer.put(layer, expert_id, list(sites[: task.num_copies]))
    is_enough = all(len(sites) >= task.num_copies for layer in task.held for sites in layer)
    if not is_enough and not _completed(fewer):
        return []
    drafts = [stay] if is_enough and min(stay.left) >= 0 else []
    return [*drafts, _climbed(fewer)] if min(fewer.left) >= 0 else drafts


def _completed(draft: _Draft) -> bool:
    """Add the copies that are missing, the most load first; says whether that worked."""
    task = draft.task
    missing = [
        (-task.load[layer][expert_id], layer, expert_id)
        for layer, experts in enumerate(draft.sites)
        for expert_id, sites in enumerate(experts)
        for _ in range(task.num_copies - len(sites))
    ]
    for _, layer, expert_id in sorted(missing):
        sites = draft.sites[layer][expert_id]
        open_sites = [s for s, room in enumerate(draft.left) if room > 0 and s not in sites]
        if not open_sites:
            return False
        site = min(
            open_sites,
            key=lambda site: (task.clashes([*sites, site]), draft.loads[layer][site], site),
        )
        draft.put(layer, expert_id, [*sites, site])
    return True


def _climbed(start: _Draft) -> _Draft:
    """The best change first, in whatever layer, until none gains anything."""
    draft = _Draft(start.task)
    for layer, experts in enumerate(start.sites):
        for expert_id, sites in enumerate(experts):
            draft.put(layer, expert_id, list(sites))
    layers = range(len(draft.sites))
    changes = [draft.best_change(layer) for layer in layers]
    has_changed = False
    while True:
        layer = max(layers, key=lambda layer: changes[layer].gain, default=0)
        if not changes or not changes[layer].sites:
            if not has_changed:
                return draft
            # room may have come free for layers that had found nothing
            changes, has_changed = [draft.best_change(layer) for layer in layers], False
            continue
        if draft.fits(changes[layer], layer):
            for expert_id, sites in changes[layer].sites:
                draft.put(layer, expert_id, sites)
            has_changed = True
        changes[layer] = draft.best_change(layer)


def _scaled(load: Load, num_sites: int) -> list[list[float]]:
    """In units of what a site would get of a layer if all were even."""
    even = sum(map(sum, load)) / max(1, len(load) * num_sites)
    return [[rows / even if even else 1.0 for rows in layer] for layer in load]


def _held_by_crews(current: Table, crews: Sequence[Copy]) -> list[list[tuple[int, ...]]]:
    """A table by site; copies that no crew holds are left out."""
    site_of = {crew: site for site, crew in enumerate(crews)}
    return [
        [tuple(site_of[copy] for copy in copies if copy in site_of) for copies in layer]
        for layer in current
    ]
