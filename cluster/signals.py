"""What heads and workers tell of their load, and what has happened since the last look.

They tell totals since their start, so that a report that is lost loses nothing. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.step_stats import StepStats


@dataclass(frozen=True, kw_only=True)
class HeadTotals:
    """What a head has done since its start, and how it is now."""

    num_steps: int = 0
    fill: float = 0.0
    """Of all steps together: StepStats.fill."""
    own_s: float = 0.0
    """Seconds of StepStats.parts that are neither experts nor transfer."""
    away_s: float = 0.0
    """Those that are: waiting for workers, whatever they did meanwhile."""
    kv_fill: float = 0.0
    """Part of its KV blocks that is taken now."""
    num_waiting: int = 0
    """Sequences that wait to be admitted now."""
    num_requests: int = 0
    """Requests in progress now, those that make no step included."""

    def after(self, stats: StepStats) -> "HeadTotals":
        """These, and one more step."""
        parts = stats.parts
        away_s = parts.get("experts", 0.0) + parts.get("transfer", 0.0)
        return HeadTotals(
            num_steps=self.num_steps + 1,
            fill=self.fill + stats.fill,
            own_s=self.own_s + sum(parts.values()) - away_s,
            away_s=self.away_s + away_s,
            kv_fill=1 - stats.num_free_blocks / stats.num_blocks,
            num_waiting=stats.num_waiting,
        )


@dataclass(frozen=True, kw_only=True)
class WorkerTotals:
    """What an expert worker has done since its start."""

    busy_s: float = 0.0
    """Seconds in which it computed."""
    num_calls: int = 0
    queued_s: float = 0.0
    """Seconds that all of them together waited for their computation to begin."""


@dataclass(frozen=True, kw_only=True)
class HeadLoad:
    """How one head has fared since the last look; where it made no step, all but `kv_fill`,
    `num_waiting` and `num_requests` is 0.
    """

    kv_fill: float
    step_fill: float
    """How full its steps were on average."""
    num_waiting: int
    own_s: float
    """T_a: what it computed itself, seconds."""
    away_s: float
    """T_e + 2 T_c: what it waited for workers and the network, seconds."""
    num_requests: int = 0

    @property
    def is_used(self) -> bool:
        """Whether it has had anything to do."""
        return self.num_requests > 0 or self.own_s > 0


@dataclass(frozen=True, kw_only=True)
class WorkerLoad:
    """How one expert worker has fared since the last look."""

    utilisation: float
    """Part of the time in which it computed."""
    queue_s: float
    """Mean time that calls waited for their computation to begin, seconds."""


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Everything that a decision rests on."""

    heads: tuple[HeadLoad, ...]
    """Of heads that are ready."""
    workers: tuple[WorkerLoad, ...]
    """Of workers that have loaded what they are to hold."""
    is_awaited: bool = False
    """Heads are starting, or a request waits for one."""


class Observer:
    """Makes loads of totals: looks now and then, and remembers what it saw last."""

    def __init__(self) -> None:
        self._heads: Mapping[str, HeadTotals] = {}
        self._workers: Mapping[int, WorkerTotals] = {}
        self._looked_at = 0.0

    def look(
        self, heads: Mapping[str, HeadTotals], workers: Mapping[int, WorkerTotals], now: float
    ) -> Signals:
        """heads: by name. workers: by incarnation, for a restarted one counts anew.
        now: seconds, of a clock that only runs forward.

        Who is seen for the first time has done nothing since the last look, as far as is known.
        """
        seconds = now - self._looked_at
        signals = Signals(
            heads=tuple(_head_load(self._heads.get(name, h), h) for name, h in heads.items()),
            workers=tuple(
                _worker_load(self._workers.get(incarnation, w), w, seconds)
                for incarnation, w in workers.items()
            ),
        )
        self._heads, self._workers, self._looked_at = dict(heads), dict(workers), now
        return signals


def _head_load(before: HeadTotals, after: HeadTotals) -> HeadLoad:
    num_steps = after.num_steps - before.num_steps
    return HeadLoad(
        kv_fill=after.kv_fill,
        step_fill=(after.fill - before.fill) / max(1, num_steps),
        num_waiting=after.num_waiting,
        own_s=after.own_s - before.own_s,
        away_s=after.away_s - before.away_s,
        num_requests=after.num_requests,
    )


def _worker_load(before: WorkerTotals, after: WorkerTotals, seconds: float) -> WorkerLoad:
    num_calls = after.num_calls - before.num_calls
    return WorkerLoad(
        # a report may be older or newer than the look: never more than all of the time
        utilisation=min(1.0, (after.busy_s - before.busy_s) / seconds) if seconds > 0 else 0.0,
        queue_s=(after.queued_s - before.queued_s) / max(1, num_calls),
    )
