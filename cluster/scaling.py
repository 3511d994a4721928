"""From what heads and workers report to a decision on their numbers, one look after the other.

What is decided is `autoscale`'s business; this remembers what its next decision needs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from cluster.autoscale import Decision, Scaling, State, decide
from cluster.config import ServeConfig
from cluster.follow import HeadReport
from cluster.signals import Observer, WorkerTotals


class Scaler:
    """Asked every few seconds. Pure: told what there is and what time it is."""

    def __init__(self, knows_heads_at: float) -> None:
        """knows_heads_at: when all heads have been heard of that there were before. A controller
        that starts anew must not take heads for gone that it has yet to hear.
        """
        self.is_awaited = False
        """A request waits for a head. Until one is there, nobody sleeps."""
        self._knows_heads_at = knows_heads_at
        self._observer = Observer()
        self._state: State | None = None

    def decide(
        self,
        heads: Iterable[HeadReport],
        workers: Mapping[int, WorkerTotals],
        config: ServeConfig,
        *,
        num_workers: int,
        is_placed: bool,
        is_asleep: bool,
        now: float,
    ) -> Decision | None:
        """How many heads and workers there should be; None while that cannot be told.

        heads: all that were heard of lately. workers: as `Observer.look` has them.
        num_workers: how many are wanted so far. is_placed: all experts have been.
        is_asleep: what was decided last, unless a request has woken them since.
        """
        reports = {head.name: head for head in heads}
        ready = {name: head.totals for name, head in reports.items() if head.address}
        self.is_awaited = self.is_awaited and not ready
        are_starting = bool(reports) and not ready and not is_asleep
        signals = replace(
            self._observer.look(ready, workers, now), is_awaited=self.is_awaited or are_starting
        )
        if self._state is not None and self._state.is_asleep and not is_asleep:
            self._state = None  # woken before all had gone
        if self._state is None and is_placed and now >= self._knows_heads_at:
            num_heads = max(config.num_heads, len(reports))
            self._state = State.of(num_heads=num_heads, num_workers=num_workers)
        if self._state is None:
            return None
        decision, self._state = decide(self._state, signals, _bounds(config), now=now)
        return decision


def _bounds(config: ServeConfig) -> Scaling:
    return Scaling(
        min_heads=config.num_heads,
        max_heads=config.most_heads,
        min_workers=config.num_workers,
        max_workers=config.most_workers,
        up_after_s=config.scale_up_after_s,
        down_after_s=config.scale_down_after_s,
        cooldown_s=min(Scaling.cooldown_s, config.scale_down_after_s),
        sleep_after_s=config.sleep_after_s,
    )
