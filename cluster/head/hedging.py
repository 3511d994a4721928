"""Whether rows whose answer is late are sent to other copies too, when, and to whom. Pure: no
network, no clock.

Hedged requests (Dean & Barroso, The Tail at Scale, 2013): whichever answer is complete first is
used. A bucket of rows keeps the price within a share of what is sent anyhow.
"""

from collections.abc import Collection, Iterable

from cluster.head.routes import Routes
from cluster.placement import Copy, WorkerInfo
from model.units import Unit

MOST_SAVED_ROWS = 512
"""What may be sent at once after a long calm: about one worker's share of a step of 512 tokens. A
call of more rows, such as a chunk of a longer prompt, computes for long anyhow, and is never sent
twice."""

RESERVE = 4
"""When no more hedges than that can be paid for, each waits longer, in proportion. One answer in 20
is slower than usual by a little: those must not leave nothing for the ones that are late by far."""


class Hedging:
    """The rows that may be sent twice. Owned by the engine's thread."""

    def __init__(self, budget: float) -> None:
        """budget: rows to send twice, at most, as a share of those that are sent."""
        self._budget = budget
        self._saved_rows = 0.0

    def earn(self, num_rows: int) -> None:
        """So many rows were sent, of all experts together, as they would have been anyhow."""
        self._saved_rows = min(MOST_SAVED_ROWS, self._saved_rows + self._budget * num_rows)

    def due_s(self, num_rows: int, usual_s: float | None) -> float | None:
        """How long to wait for an answer before its rows are sent twice; None: for ever.

        usual_s: nearly all answers come sooner.
        """
        num_affordable = self._saved_rows / num_rows
        if usual_s is None or num_affordable < 1:
            return None
        return usual_s * max(1.0, RESERVE / num_affordable)

    def spend(self, num_rows: int) -> bool:
        """Pay for rows that are to be sent twice; False if they must not be."""
        if num_rows > self._saved_rows:
            return False
        self._saved_rows -= num_rows
        return True


def other_copies(
    routes: Routes, units: Iterable[Unit], avoid: Collection[WorkerInfo]
) -> list[list[Copy]] | None:
    """Of each unit the ways to have it computed by trusted workers that are not to be avoided; None
    if one of them has none.
    """
    found = [routes.trusted_options(unit, avoid) for unit in units]
    return found if all(found) else None
