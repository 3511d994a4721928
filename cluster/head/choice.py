"""Which workers a call's rows go to, among the copies that can be asked. Pure: no network,
no clock.

Shape suffixes: A assignments.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.placement import Copy
from model.experts import Assignments
from model.units import Unit

_MAX_STEPS = 64
"""Of the search for a better choice: a microsecond or two each, in every layer of every step."""


def options(unit: Unit, copies: Iterable[Copy], may_ask: Collection[int]) -> list[Copy]:
    """The ways to have a unit computed by workers that may be asked; none when there are none.

    copies: of the unit's expert. A whole expert may be computed by any copy, slices together; where
    no copy in n slices is complete, by slices of several. A slice only by the same slice.
    """
    if unit.num_slices > 1:
        same = (copy[unit.slice_number] for copy in copies if len(copy) == unit.num_slices)
        return [(worker,) for worker in dict.fromkeys(same) if worker in may_ask]
    by_slices: dict[int, list[Copy]] = defaultdict(list)
    for copy in copies:
        by_slices[len(copy)].append(copy)
    found: list[Copy] = []
    for alike in by_slices.values():
        complete = [copy for copy in alike if all(worker in may_ask for worker in copy)]
        if complete:
            found += complete
            continue
        mixed = tuple(
            next((worker for worker in holders if worker in may_ask), None)
            for holders in zip(*alike, strict=True)
        )
        if None not in mixed:
            found.append(tuple(worker for worker in mixed if worker is not None))
    return found


def choose(wanted: Sequence[tuple[int, Sequence[Copy]]]) -> list[Copy]:
    """One copy for each expert, so that the busiest worker gets few rows. Deterministic.

    wanted: of each expert its number of rows and its options, at least one.

    Experts with many rows choose first, each the copy that makes the busiest worker least busy.
    Then other choices are tried, for a bounded number of steps or until none can be better by more
    than a row or a sixteenth.
    """
    if all(len(copies) == 1 for _, copies in wanted):
        return [copies[0] for _, copies in wanted]
    order = sorted(range(len(wanted)), key=lambda index: -wanted[index][0])
    workers = {worker for _, copies in wanted for copy in copies for worker in copy}
    even = sum(rows for rows, _ in wanted) / len(workers)
    largest = max(rows / max(map(len, copies)) for rows, copies in wanted)
    good_enough = max(even + max(1, even / 16), largest)
    load: dict[int, float] = defaultdict(float)
    chosen: list[Copy] = [()] * len(wanted)
    best: list[Copy] = []
    least = float("inf")
    num_steps = 0

    def visit(depth: int, busiest: float) -> None:
        nonlocal best, least, num_steps
        if depth == len(order):
            best, least = chosen.copy(), busiest
            return
        rows, copies = wanted[order[depth]]
        ranked = sorted(
            (max(load[worker] for worker in copy) + rows / len(copy), number)
            for number, copy in enumerate(copies)
        )
        for after, number in ranked:
            has_to_stop = best and (num_steps >= _MAX_STEPS or least <= good_enough)
            if has_to_stop or max(busiest, after) >= least:
                return
            num_steps += 1
            copy = copies[number]
            chosen[order[depth]] = copy
            for worker in copy:
                load[worker] += rows / len(copy)
            visit(depth + 1, max(busiest, after))
            for worker in copy:
                load[worker] -= rows / len(copy)

    visit(0, 0.0)
    return best


def split(assignments: Assignments, copies: Sequence[Copy]) -> list[tuple[int, Assignments]]:
    """Assignments by worker, in ascending order, on the CPU.

    copies: of each of `assignments.counts`, one. Rows of an expert that is held in slices go to all
    of the copy's workers.
    """
    pieces: dict[int, list[tuple[tuple[Unit, int], slice]]] = defaultdict(list)
    begin = 0
    for (unit, count), copy in zip(assignments.counts, copies, strict=True):
        where = slice(begin, begin + count)
        begin += count
        for number, worker in enumerate(copy):
            part = (
                unit if len(copy) == 1 else unit._replace(slice_number=number, num_slices=len(copy))
            )
            pieces[worker].append(((part, count), where))
    rows_A, weights_A = assignments.rows_A.cpu().numpy(), assignments.weights_A.cpu().numpy()
    return [
        (
            worker,
            Assignments(
                counts=tuple(count for count, _ in mine),
                rows_A=torch.from_numpy(np.concatenate([rows_A[where] for _, where in mine])),
                weights_A=torch.from_numpy(np.concatenate([weights_A[where] for _, where in mine])),
            ),
        )
        for worker, mine in sorted(pieces.items())
    ]


def renumbered(rows_A: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The rows that occur, ascending, and of every assignment the place among them."""
    # numpy: torch's `unique` alone takes longer
    rows = rows_A.numpy()
    occurs_T = np.zeros(num_rows, dtype=bool)
    occurs_T[rows] = True
    place_T = occurs_T.cumsum() - 1
    return torch.from_numpy(occurs_T.nonzero()[0]), torch.from_numpy(place_T[rows])
