"""How many heads and expert workers there should be.

Pure: the controller asks `decide` every few seconds and does what it says. Both sides are decided
together, since more of the side that is hidden behind the other helps nobody: of a step, T_a is
what heads compute, T_e what workers compute, T_c one way between them. While T_a < T_e + 2 T_c
heads wait for experts, and it is the experts that must grow.

Which worker holds what, copies of hot experts included, follows from their number: see `planning`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.signals import Signals

MEMORIES = 3
"""A burst fades to a third of its weight so many times within the time that calm must last."""

CALM = 0.25
"""Calls queue briefly below this part of the bound above which they queue too long."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Bounds and patience. Between high and low nothing changes: that is what stops flapping."""

    min_heads: int = 1
    max_heads: int
    min_workers: int
    """As many as take all experts: the caller knows their memory."""
    max_workers: int
    high: float = 0.85
    """Fill or utilisation above which a side grows. Above it queues grow faster than load."""
    target: float = 0.65
    """Fill or utilisation that growth aims at: room for a third more."""
    low: float = 0.4
    """A side shrinks to what keeps it below this. Below half of high, so that a side that loses
    one of two does not pass high."""
    max_queue_s: float = 0.02
    """Calls that wait longer at a worker show that workers are short, seconds. A few times what a
    layer takes."""
    up_after_s: float = 5.0
    """How long pressure must last, seconds: longer than one long prompt takes."""
    down_after_s: float = 300.0
    """How long calm must last, seconds: new heads and workers take minutes to load, so giving
    them up for a short pause costs more than it saves."""
    cooldown_s: float = 30.0
    """Between two changes of a side, seconds: the first must show in the signals."""
    sleep_after_s: float | None = None
    """How long no head must have had anything to do before all are let go, seconds. None: never."""


@dataclass(frozen=True)
class Side:
    """What is remembered of heads, or of workers."""

    target: int
    pressed_since: float | None = None
    calm_since: float | None = None
    changed_at: float = -math.inf
    mean_fill: float = 0.0
    """Over the last while, the latest counting most: a side that works in bursts may shrink."""
    looked_at: float | None = None
    """When that was; None before the first look."""


@dataclass(frozen=True)
class State:
    """What one decision hands to the next. A restarted controller begins with what it finds."""

    heads: Side
    workers: Side
    idle_since: float | None = None
    """Since when nobody has had anything to do, or waited for a head."""

    @property
    def is_asleep(self) -> bool:
        """Nobody is wanted. Whoever is asked for a head begins anew."""
        return self.heads.target == 0

    @classmethod
    def of(cls, *, num_heads: int, num_workers: int) -> "State":
        """The beginning: so many there are."""
        return cls(Side(num_heads), Side(num_workers))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How many there should be from now on."""

    num_heads: int
    num_workers: int
    is_change: bool
    reason: str
    """For people: a sentence on heads, one on workers, with the numbers."""


def decide(
    state: State, signals: Signals, settings: Scaling, *, now: float
) -> tuple[Decision, State]:
    """How many there should be, and what to remember for the next call.

    now: seconds, of a clock that only runs forward.
    """
    heads, workers = signals.heads, signals.workers
    is_idle = not signals.is_awaited and not any(head.is_used for head in heads)
    idle_since = _since(state.idle_since, is_idle, now)
    if idle_since is not None and settings.sleep_after_s is not None:
        idle_s = now - idle_since
        if idle_s >= settings.sleep_after_s:
            return Decision(
                num_heads=0,
                num_workers=0,
                is_change=not state.is_asleep,
                reason=f"Heads and workers go: there was no request for {idle_s:.0f} s.",
            ), State(Side(0), Side(0), idle_since)
    kv_fill = _mean(head.kv_fill for head in heads)
    step_fill = _mean(head.step_fill for head in heads)
    num_waiting = sum(head.num_waiting for head in heads)
    busiest = max((worker.utilisation for worker in workers), default=0.0)
    queue_s = max((worker.queue_s for worker in workers), default=0.0)
    own_s = sum(head.own_s for head in heads)
    away_s = sum(head.away_s for head in heads)
    must_wait = own_s < away_s
    # Waiting for the network alone is not cured by more workers.
    short_of_experts = must_wait and busiest >= settings.target
    short_of_steps = step_fill > settings.high or num_waiting > 0

    head_side, head_verb = _settle(
        state.heads,
        is_pressed=kv_fill > settings.high or (short_of_steps and not short_of_experts),
        is_calm=num_waiting == 0,
        fill=max(kv_fill, step_fill),
        bounds=(settings.min_heads, settings.max_heads),
        num_there=len(heads),
        settings=settings,
        now=now,
    )
    worker_side, worker_verb = _settle(
        state.workers,
        is_pressed=short_of_experts
        and (busiest > settings.high or queue_s > settings.max_queue_s or short_of_steps),
        is_calm=queue_s <= CALM * settings.max_queue_s,
        fill=busiest,
        bounds=(settings.min_workers, settings.max_workers),
        num_there=len(workers),
        settings=settings,
        now=now,
    )
    exposed = "experts" if must_wait else "heads"
    decision = Decision(
        num_heads=head_side.target,
        num_workers=worker_side.target,
        is_change=(head_side.target, worker_side.target)
        != (state.heads.target, state.workers.target),
        reason=(
            f"Heads {head_verb}: KV {kv_fill:.0%} full, steps {step_fill:.0%} full, {num_waiting} "
            f"sequences wait. Workers {worker_verb}: the busiest computes {busiest:.0%} of the "
            f"time, calls queue for {1000 * queue_s:.0f} ms. Exposed: {exposed} (heads' own "
            f"{own_s:.2f} s against {away_s:.2f} s for experts and transfer)."
        ),
    )
    return decision, State(head_side, worker_side, idle_since)


def _settle(
    side: Side,
    *,
    is_pressed: bool,
    is_calm: bool,
    fill: float,
    bounds: tuple[int, int],
    num_there: int,
    settings: Scaling,
    now: float,
) -> tuple[Side, str]:
    """One side's next state under hysteresis, cool-down and bounds, and a verb that says it.

    is_calm: nothing but the fill speaks against shrinking.
    """
    least, most = bounds
    target = side.target
    side = replace(side, mean_fill=_mean_fill(side, fill, settings, now), looked_at=now)
    if not least <= target <= most:
        bound = min(max(target, least), most)
        return _changed(side, bound, now), f"go {target} -> {bound}, the bound"
    # To grow aims at the target fill, to shrink stays below the low mark.
    grown = max(num_there + 1, math.ceil(num_there * fill / settings.target))
    grown = max(target, min(grown, 2 * num_there, most))
    shrunk = max(math.ceil(num_there * side.mean_fill / settings.low), least)
    # More there than wanted are still to go, and share the load until they have.
    is_calm = is_calm and not is_pressed and 0 < num_there <= target and shrunk < target
    side = replace(
        side,
        pressed_since=_since(side.pressed_since, is_pressed, now),
        calm_since=_since(side.calm_since, is_calm, now),
    )
    if is_pressed and num_there < target:
        return side, f"stay {target} under pressure: {target - num_there} still to come"
    for since, after_s, goal, what in (
        (side.pressed_since, settings.up_after_s, grown, "pressure"),
        (side.calm_since, settings.down_after_s, shrunk, "calm"),
    ):
        if since is None:
            continue
        if now - since < after_s:
            return side, f"stay {target}: {what} for {now - since:.0f} of {after_s:.0f} s"
        if (left_s := side.changed_at + settings.cooldown_s - now) > 0:
            return side, f"stay {target}: {what}, but for {left_s:.0f} s after a change"
        if goal == target:
            return side, f"stay {target}, the upper bound, under pressure"
        return _changed(side, goal, now), f"go {target} -> {goal}"
    return side, f"stay {target}"


def _mean_fill(side: Side, fill: float, settings: Scaling, now: float) -> float:
    """With the fill of now, which counts more the longer ago the last look was."""
    if side.looked_at is None or not settings.down_after_s:
        return fill
    fading = math.exp(-MEMORIES * (now - side.looked_at) / settings.down_after_s)
    return fading * side.mean_fill + (1 - fading) * fill


def _changed(side: Side, target: int, now: float) -> Side:
    return replace(side, target=target, pressed_since=None, calm_since=None, changed_at=now)


def _since(since: float | None, holds: bool, now: float) -> float | None:
    """Since when something holds without a break."""
    if not holds:
        return None
    return now if since is None else since


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
