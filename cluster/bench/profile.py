"""Keeping the engine's steps, and where their time went."""

from collections import defaultdict
from collections.abc import Sequence

from cluster.metrics import HeadMetrics
from cluster.step_stats import PARTS, StepStats


class StepRecorder(HeadMetrics):
    """A head's metrics that also keep every step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[StepStats] = []

    def observe(self, stats: StepStats) -> None:
        super().observe(stats)
        self.steps.append(stats)


def mean_parts(steps: Sequence[StepStats]) -> dict[str, float]:
    """Seconds of a step by PARTS, the mean over steps; parts that never occur are left out."""
    sums: dict[str, float] = defaultdict(float)
    for step in steps:
        for name, seconds in step.parts.items():
            sums[name] += seconds
    return {name: sums[name] / len(steps) for name in PARTS if name in sums}
