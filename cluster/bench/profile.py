"""Where the time of an engine's steps goes: a stopwatch for `model.phases`, and what it shows."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.metrics import HeadMetrics, StepStats
from model.phases import Phase

PARTS = (
    "attention",
    "routing",
    "packing",
    "transfer",
    "experts",
    "unpacking",
    "logits",
    "sampling",
    "host",
)
"""Of a step. host: scheduling, building tensors, publishing, and the decoder's inputs."""


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


@dataclass(frozen=True)
class Step:
    """One step, and the decoder's phases in it."""

    stats: StepStats
    phases: Mapping[Phase, float]

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by PARTS; they sum to the step's whole time."""
        stats = self.stats
        parts = {str(name): s for name, s in self.phases.items() if name in PARTS}
        in_decoder_s = sum(parts.values())
        parts["sampling"] = stats.sampling_s
        parts["host"] = stats.forward_s + stats.host_s - in_decoder_s
        return parts


class StepRecorder(HeadMetrics):
    """A head's metrics that also keep every step."""

    def __init__(self, stopwatch: Stopwatch | None) -> None:
        """stopwatch: told the phases of the steps, or None."""
        super().__init__()
        self.steps: list[Step] = []
        self._stopwatch = stopwatch

    def observe(self, stats: StepStats) -> None:
        super().observe(stats)
        self.steps.append(Step(stats, self._stopwatch.take() if self._stopwatch else {}))


def mean_parts(steps: Sequence[Step]) -> dict[str, float]:
    """Seconds of a step by PARTS, the mean over steps; parts that never occur are left out."""
    sums: dict[str, float] = defaultdict(float)
    for step in steps:
        for name, seconds in step.parts.items():
            sums[name] += seconds
    return {name: sums[name] / len(steps) for name in PARTS if name in sums}
