"""How many heads and expert workers there should be, and which experts deserve another copy.

Pure: whoever gathers signals asks `decide` every second or so and does what it says; so far only
the tests' simulator does. Both sides are decided together, since more of the side that is hidden
behind the other helps nobody: of a step, T_a is what heads compute, T_e what workers compute, T_c
one way between them. While T_a < T_e + 2 T_c heads wait for experts, and it is the experts that
must grow.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cluster.signals import Expert, HeadLoad, Signals, WorkerLoad

HOT = 1.5
"""An expert is hot that is busier than this many times the average of its layer."""

RELIEF = 0.05
"""Copies must free this part of the busiest worker's time, else a whole worker comes."""

CALM = 0.25
"""Waits are short below this part of the bound above which they are too long."""


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
    """A side shrinks to what keeps it below this. Below half of high, so that neither a side that
    loses one of two nor an expert that loses one of two copies passes high."""
    max_wait_s: float = 1.0
    """A sequence that waits longer to be admitted shows that heads are short, seconds."""
    max_queue_s: float = 0.02
    """Calls that lie longer at a worker show that workers are short, seconds. A few times what a
    layer takes."""
    up_after_s: float = 5.0
    """How long pressure must last, seconds: longer than one long prompt takes."""
    down_after_s: float = 300.0
    """How long calm must last, seconds: new heads and workers take minutes to load, so giving
    them up for a short pause costs more than it saves."""
    cooldown_s: float = 30.0
    """Between two changes of a side, seconds: the first must show in the signals."""
    zero_after_s: float | None = None
    """Everything ends when no request has come for so long, seconds; the first one wakes it, and
    waits for the start. None: never."""


@dataclass(frozen=True)
class Side:
    """What is remembered of heads, or of workers."""

    target: int
    pressed_since: float | None = None
    calm_since: float | None = None
    changed_at: float = -math.inf


@dataclass(frozen=True)
class State:
    """What one decision hands to the next. A restarted controller begins with what it finds."""

    heads: Side
    workers: Side
    copies: Mapping[Expert, int]
    """Experts that are to have more than one copy, and how many."""
    idle_since: float | None = None

    @classmethod
    def of(cls, *, num_heads: int, num_workers: int) -> "State":
        """The beginning: so many there are."""
        return cls(Side(num_heads), Side(num_workers), {})


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What there should be from now on."""

    num_heads: int
    num_workers: int
    copies: Mapping[Expert, int]
    drain: tuple[str, ...]
    """Heads and workers to drain; any other one that drains is to take work again."""
    is_change: bool
    reason: str
    """For people: a sentence on heads, one on workers, with the numbers."""


def decide(
    state: State, signals: Signals, settings: Scaling, *, now: float
) -> tuple[Decision, State]:
    """What there should be, and what to remember for the next call.

    now: seconds, of a clock that only runs forward.
    """
    heads = [head for head in signals.heads if not head.is_draining]
    workers = [worker for worker in signals.workers if not worker.is_draining]
    is_idle = not signals.num_pending and not any(head.num_open for head in signals.heads)
    idle_since = (now if state.idle_since is None else state.idle_since) if is_idle else None

    slept = _zero(state, settings, is_idle=is_idle, idle_since=idle_since, now=now)
    after, reason = slept or _scaled(state, heads, workers, signals, settings, now)
    after = replace(after, idle_since=idle_since)
    decision = Decision(
        num_heads=after.heads.target,
        num_workers=after.workers.target,
        copies=after.copies,
        drain=_surplus(
            after.heads.target, ((h.is_draining, h.num_open, h.name) for h in signals.heads)
        )
        + _surplus(
            after.workers.target, ((w.is_draining, w.utilisation, w.name) for w in signals.workers)
        ),
        is_change=(after.heads.target, after.workers.target, after.copies)
        != (state.heads.target, state.workers.target, state.copies),
        reason=reason,
    )
    return decision, after


def _zero(
    state: State, settings: Scaling, *, is_idle: bool, idle_since: float | None, now: float
) -> tuple[State, str] | None:
    """Going to sleep, sleeping and waking up; None when the ordinary rules hold."""
    is_asleep = state.heads.target == 0
    if not is_idle and is_asleep:
        num_heads, num_workers = max(1, settings.min_heads), max(1, settings.min_workers)
        woken = State(Side(num_heads, changed_at=now), Side(num_workers, changed_at=now), {})
        return woken, f"A request has come: waking {num_heads} heads, {num_workers} workers."
    if settings.zero_after_s is None or idle_since is None:
        return None
    if is_asleep:
        return state, "Asleep: no request has come."
    if (idle_s := now - idle_since) < settings.zero_after_s:
        return None
    asleep = State(Side(0, changed_at=now), Side(0, changed_at=now), {})
    return asleep, f"No request for {idle_s:.0f} s: heads and workers go."


def _scaled(
    state: State,
    heads: list[HeadLoad],
    workers: list[WorkerLoad],
    signals: Signals,
    settings: Scaling,
    now: float,
) -> tuple[State, str]:
    """The ordinary rules, for both sides."""
    kv_fill = _mean(head.kv_fill for head in heads)
    step_fill = _mean(head.step_fill for head in heads)
    wait_s = max((head.wait_s for head in heads), default=0.0)
    busiest = max((worker.utilisation for worker in workers), default=0.0)
    queue_s = max((worker.queue_s for worker in workers), default=0.0)
    own_s = sum(head.own_s for head in heads)
    away_s = sum(head.experts_s + head.transfer_s for head in heads)
    must_wait = own_s < away_s
    # Waiting for the network alone is not cured by more workers.
    short_of_experts = must_wait and busiest >= settings.target
    short_of_steps = step_fill > settings.high or wait_s > settings.max_wait_s

    head_side, _, head_verb = _settle(
        state.heads,
        is_pressed=kv_fill > settings.high or (short_of_steps and not short_of_experts),
        is_calm=wait_s <= CALM * settings.max_wait_s,
        fill=max(kv_fill, step_fill),
        bounds=(settings.min_heads, settings.max_heads),
        num_there=(len(heads), len(signals.heads)),
        settings=settings,
        now=now,
    )
    worker_side, may_grow, worker_verb = _settle(
        state.workers,
        is_pressed=short_of_experts
        and (busiest > settings.high or queue_s > settings.max_queue_s or short_of_steps),
        is_calm=queue_s <= CALM * settings.max_queue_s,
        fill=busiest,
        bounds=(settings.min_workers, settings.max_workers),
        num_there=(len(workers), len(signals.workers)),
        settings=settings,
        now=now,
    )
    copies = state.copies
    num_workers = state.workers.target
    if may_grow and (hot := _hot(workers, settings)):
        copies = {**copies, **{expert: copies.get(expert, 1) + 1 for expert in hot}}
        worker_side = Side(num_workers, changed_at=now)
        named = ", ".join(f"{expert_id} of layer {layer}" for layer, expert_id in hot[:3])
        worker_verb = (
            f"stay {num_workers} but hold another copy of {len(hot)} experts over {HOT:g} times as "
            f"busy as their layers' average ({named}{', ...' if len(hot) > 3 else ''})"
        )
    elif worker_side.target < num_workers <= settings.max_workers and copies:
        # What was added last goes first.
        copies = {}
        worker_side = Side(num_workers, changed_at=now)
        worker_verb = f"stay {num_workers} but give up the further copies of experts"
    exposed = "experts" if must_wait else "heads"
    reason = (
        f"Heads {head_verb}: KV {kv_fill:.0%} full, steps {step_fill:.0%} full, longest wait "
        f"{wait_s:.1f} s. Workers {worker_verb}: the busiest computes {busiest:.0%} of the time, "
        f"calls queue for {1000 * queue_s:.0f} ms. Exposed: {exposed} (heads' own {own_s:.2f} s "
        f"against {away_s:.2f} s for experts and transfer)."
    )
    return replace(state, heads=head_side, workers=worker_side, copies=copies), reason


def _settle(
    side: Side,
    *,
    is_pressed: bool,
    is_calm: bool,
    fill: float,
    bounds: tuple[int, int],
    num_there: tuple[int, int],
    settings: Scaling,
    now: float,
) -> tuple[Side, bool, str]:
    """One side's next state under hysteresis, cool-down and bounds.

    is_calm:   nothing but the fill speaks against shrinking.
    num_there: those that take work, and those that drain with them.
    Returns the state, whether it may grow now (bounds aside), and a verb that says what happens.
    """
    least, most = bounds
    num_active, num_all = num_there
    target = side.target
    if not least <= target <= most:
        bound = min(max(target, least), most)
        return Side(bound, changed_at=now), False, f"go {target} -> {bound}, the bound"
    # To grow aims at the target fill, to shrink stays below the low mark.
    grown = max(num_active + 1, math.ceil(num_active * fill / settings.target))
    grown = max(target, min(grown, 2 * num_active, most))
    shrunk = max(math.ceil(num_active * fill / settings.low), least, 1)
    is_calm = is_calm and not is_pressed and num_active > 0 and shrunk < target
    side = replace(
        side,
        pressed_since=_since(side.pressed_since, is_pressed, now),
        calm_since=_since(side.calm_since, is_calm, now),
    )
    if is_pressed and num_all < target:
        return side, False, f"stay {target} under pressure: {target - num_all} still to come"
    for since, after_s, goal, what in (
        (side.pressed_since, settings.up_after_s, grown, "pressure"),
        (side.calm_since, settings.down_after_s, shrunk, "calm"),
    ):
        if since is None:
            continue
        if now - since < after_s:
            return side, False, f"stay {target}: {what} for {now - since:.0f} of {after_s:.0f} s"
        if (left_s := side.changed_at + settings.cooldown_s - now) > 0:
            return side, False, f"stay {target}: {what}, but for {left_s:.0f} s after a change"
        if goal == target:
            return side, is_pressed, f"stay {target}, the upper bound, under pressure"
        return Side(goal, changed_at=now), is_pressed, f"go {target} -> {goal}"
    return side, False, f"stay {target}"


def _hot(workers: list[WorkerLoad], settings: Scaling) -> list[Expert]:
    """The hot experts of which a further copy would help: of each layer, the busiest at most.

    Empty where nobody has room and time for them, or where they are not what keeps workers busy.
    """
    load: dict[Expert, float] = defaultdict(float)
    holders: dict[Expert, set[str]] = defaultdict(set)
    for worker in workers:
        for expert, utilisation in worker.experts.items():
            load[expert] += utilisation
            holders[expert].add(worker.name)
    each = {expert: load[expert] / len(holders[expert]) for expert in load}
    used = {worker.name: worker.utilisation for worker in workers}
    free = {w.name: math.inf if w.free_bytes is None else w.free_bytes for w in workers}
    chosen = []
    for layer in sorted({layer for layer, _ in load}):
        of_layer = [expert for expert in load if expert[0] == layer]
        hottest = max(of_layer, key=lambda expert: (each[expert], expert))
        if each[hottest] <= HOT * _mean(load[expert] for expert in of_layer):
            continue
        shared = load[hottest] / (len(holders[hottest]) + 1)
        takers = [
            worker
            for worker in workers
            if worker.name not in holders[hottest]
            and used[worker.name] + shared <= settings.target
            and free[worker.name] >= worker.expert_bytes
        ]
        if not takers:
            continue
        taker = min(takers, key=lambda worker: (used[worker.name], worker.name))
        used[taker.name] += shared
        free[taker.name] -= taker.expert_bytes
        for name in holders[hottest]:
            used[name] -= each[hottest] - shared
        chosen.append(hottest)
    relief = max(worker.utilisation for worker in workers) - max(used.values())
    return chosen if relief >= RELIEF else []


def _surplus(target: int, candidates: Iterable[tuple[bool, float, str]]) -> tuple[str, ...]:
    """Names beyond the target: those that drain already first, then those with least to do."""
    ranked = sorted((not is_draining, load, name) for is_draining, load, name in candidates)
    return tuple(name for _, _, name in ranked[: max(0, len(ranked) - target)])


def _since(since: float | None, holds: bool, now: float) -> float | None:
    """Since when something holds without a break."""
    if not holds:
        return None
    return now if since is None else since


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
