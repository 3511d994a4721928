"""Where a step's time goes: a stopwatch for the phases that decoder and experts tell of."""

import time
from collections import defaultdict
from collections.abc import Callable

from model.phases import Phase


class Stopwatch:
    """Adds up the seconds of each phase. Belongs to the engine's thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[Phase, float] = defaultdict(float)
        self._phase: Phase = "outside"
        self._since = clock()

    def enter(self, phase: Phase) -> None:
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def reveal(self, seconds: float, was: Phase, really: Phase) -> None:
        """Never more than there was: the worker's clock and ours need not agree."""
        moved = min(seconds, self._seconds[was])
        self._seconds[was] -= moved
        self._seconds[really] += moved

    def take(self) -> dict[Phase, float]:
        """The seconds of each phase since the last call."""
        self.enter(self._phase)
        taken, self._seconds = self._seconds, defaultdict(float)
        return taken
