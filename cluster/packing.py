"""The search behind a plan: from a start, the change that gains most, until none gains anything.

Knows sites, where experts may be: a worker, or the crew of workers that hold slices together.
`planning` says what workers are. Pure.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MOVE_PRICE = 0.02
"""What loading a unit must gain at least: this share of the time that a layer would take if its
load were perfectly even. Loading reads hundreds of megabytes; noise in the load is a few percent.
"""

_SHARPNESS = 8
"""The search goes by this norm of a layer's loads rather than by the largest: the norm also falls
when one of two equally busy workers gets relief, the first step to relieving both."""

_TOO_LITTLE = 1e-9


@dataclass(frozen=True)
class Task:
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


class Draft:
    """A plan in the making: the sites that hold each expert of each layer."""

    def __init__(self, task: Task) -> None:
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


def search(task: Task) -> list[list[list[int]]]:
    """The sites of each expert of each layer, by the best plan that is found.

    There must be room; see Task.
    """
    drafts = []
    if any(sites for layer in task.held for sites in layer):
        drafts += _drafts_from_what_is_held(task)
    greedy, rationed = _greedy(task, is_rationed=False), _greedy(task, is_rationed=True)
    drafts += [greedy, _climbed(greedy), _climbed(rationed)]
    return min(drafts, key=Draft.price).sites  # the first of several: to stay, if that is one


def _greedy(task: Task, *, is_rationed: bool) -> Draft:
    """The expert with the most load to the sites with the least, layer by layer.

    Where several are equal, to the emptiest. is_rationed: no site takes more than its room's even
    share for a layer, if others can. Otherwise small rooms are full before the last layers.
    """
    draft = Draft(task)
    to_go = sum(len(layer) for layer in task.load)
    for layer, load_of in enumerate(task.load):
        layers_to_go = len(task.load) - layer
        reserved = [room - -(-room // layers_to_go) if is_rationed else 0 for room in draft.left]
        for expert_id in sorted(range(len(load_of)), key=lambda e: (-load_of[e], e)):
            draft.put(layer, expert_id, _greedy_sites(draft, layer, to_go, reserved))
            to_go -= 1
    return draft


def _greedy_sites(draft: Draft, layer: int, to_go: int, reserved: list[int]) -> list[int]:
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


def _drafts_from_what_is_held(task: Task) -> list[Draft]:
    """To stay, and to go on from there; nothing where what is held now cannot stay.

    The second starts with the copies that must be. Others come back for nothing where they help,
    and otherwise make room for those that help more.
    """
    stay, fewer = Draft(task), Draft(task)
    for layer, experts in enumerate(task.held):
        for expert_id, sites in enumerate(experts):
            stay.put(layer, expert_id, list(sites))
            fewer.put(layer, expert_id, list(sites[: task.num_copies]))
    is_enough = all(len(sites) >= task.num_copies for layer in task.held for sites in layer)
    if not is_enough and not _completed(fewer):
        return []
    drafts = [stay] if is_enough and min(stay.left) >= 0 else []
    return [*drafts, _climbed(fewer)] if min(fewer.left) >= 0 else drafts


def _completed(draft: Draft) -> bool:
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


def _climbed(start: Draft) -> Draft:
    """The best change first, in whatever layer, until none gains anything."""
    draft = Draft(start.task)
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
