"""Scaling grows the side that is exposed, keeps its bounds and its temper, and says why."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscale import Decision, Scaling, Side, State, decide
from cluster.signals import HeadLoad, Signals, WorkerLoad

SETTINGS = Scaling(max_heads=8, min_workers=2, max_workers=16)
NUM_HEADS, NUM_WORKERS = 2, 4
LONG_AGO = -1000.0

shares = st.floats(0, 1)
counts = st.integers(0, 9)


def seen(head_facts: dict[str, float], utilisation: float = 0.5, queue_s: float = 0.0) -> Signals:
    """Heads with little to do, that wait as long for experts as they compute, unless told."""
    facts: dict[str, float] = {"kv_fill": 0.5, "step_fill": 0.5, "num_waiting": 0}
    facts |= {"own_s": 0.5, "away_s": 0.5} | head_facts
    return Signals(
        heads=(HeadLoad(**facts),) * NUM_HEADS,  # type: ignore[arg-type]
        workers=(WorkerLoad(utilisation=utilisation, queue_s=queue_s),) * NUM_WORKERS,
    )


def patient_state(*, is_pressed: bool = True) -> State:
    """Pressure, or calm, has lasted for long."""
    since = {"pressed_since": LONG_AGO} if is_pressed else {"calm_since": LONG_AGO}
    return State(Side(NUM_HEADS, **since), Side(NUM_WORKERS, **since))


def decided(signals: Signals, state: State | None = None, scaling: Scaling = SETTINGS) -> Decision:
    return decide(state or patient_state(), signals, scaling, now=0.0)[0]


MUST_WAIT = {"own_s": 0.2, "away_s": 0.8}
"""For experts or the network, whichever: the workers' utilisation tells."""
NEED_NOT_WAIT = {"own_s": 0.8, "away_s": 0.2}


# --- which side grows ---


def test_a_full_kv_cache_always_asks_for_heads() -> None:
    for exposed in (MUST_WAIT, NEED_NOT_WAIT):
        assert decided(seen({"kv_fill": 0.95, **exposed})).num_heads == 3  # 2 * 0.95 / 0.65


@pytest.mark.parametrize("symptom", [{"step_fill": 0.95}, {"num_waiting": 1}])
@pytest.mark.parametrize(
    ("exposed", "utilisation", "heads_grow", "workers_grow"),
    [
        (NEED_NOT_WAIT, 0.8, True, False),
        (MUST_WAIT, 0.8, False, True),
        (MUST_WAIT, 0.1, True, False),
    ],
)
def test_what_queues_at_the_heads_grows_the_exposed_side(
    symptom: dict[str, float],
    exposed: dict[str, float],
    utilisation: float,
    heads_grow: bool,
    workers_grow: bool,
) -> None:
    decision = decided(seen({**symptom, **exposed}, utilisation))
    assert (decision.num_heads > NUM_HEADS) == heads_grow
    assert (decision.num_workers > NUM_WORKERS) == workers_grow


@pytest.mark.parametrize(("utilisation", "queue_s"), [(0.9, 0.0), (0.7, 0.05)])
def test_busy_workers_are_joined_by_more_only_where_heads_wait_for_them(
    utilisation: float, queue_s: float
) -> None:
    assert decided(seen(MUST_WAIT, utilisation, queue_s)).num_workers > NUM_WORKERS
    assert decided(seen(NEED_NOT_WAIT, utilisation, queue_s)).num_workers == NUM_WORKERS


def test_growth_aims_at_the_target_and_at_most_doubles() -> None:
    kv = seen({"kv_fill": 1.0})
    assert decided(kv, scaling=replace(SETTINGS, target=0.7)).num_heads == 3
    assert decided(kv, scaling=replace(SETTINGS, target=0.1)).num_heads == 2 * NUM_HEADS


# --- laws ---


@given(kv=shares, step=shares, num_waiting=counts, used=shares, queue_s=shares, own=shares)
def test_bounds_hold_whatever_is_seen(
    kv: float, step: float, num_waiting: int, used: float, queue_s: float, own: float
) -> None:
    facts = {"kv_fill": kv, "step_fill": step, "num_waiting": num_waiting, "own_s": own}
    scaling = Scaling(min_heads=2, max_heads=3, min_workers=3, max_workers=5)
    for is_pressed in (True, False):
        decision = decided(
            seen(facts, used, queue_s), patient_state(is_pressed=is_pressed), scaling
        )
        assert 2 <= decision.num_heads <= 3
        assert 3 <= decision.num_workers <= 5


@given(
    load=st.tuples(shares, shares, counts),
    more=st.tuples(shares, shares, counts),
    exposed=st.sampled_from([NEED_NOT_WAIT, MUST_WAIT]),
    used=shares,
    is_pressed=st.booleans(),
)
def test_more_load_on_heads_never_lowers_either_target(
    load: tuple[float, float, float],
    more: tuple[float, float, float],
    exposed: dict[str, float],
    used: float,
    is_pressed: bool,
) -> None:
    names = ("kv_fill", "step_fill", "num_waiting")
    less = dict(zip(names, load, strict=True))
    at_least = {name: max(less[name], m) for name, m in zip(names, more, strict=True)}
    state = patient_state(is_pressed=is_pressed)
    low = decided(seen({**less, **exposed}, used), state)
    high = decided(seen({**at_least, **exposed}, used), state)
    assert high.num_heads >= low.num_heads
    assert high.num_workers >= low.num_workers


@given(used=shares, more=shares, queue_s=shares, more_s=shares, is_pressed=st.booleans())
def test_more_load_on_workers_never_lowers_their_target(
    used: float, more: float, queue_s: float, more_s: float, is_pressed: bool
) -> None:
    state = patient_state(is_pressed=is_pressed)
    low = decided(seen(MUST_WAIT, used, queue_s), state)
    high = decided(seen(MUST_WAIT, max(used, more), max(queue_s, more_s)), state)
    assert high.num_workers >= low.num_workers


@given(
    facts=st.lists(st.tuples(shares, shares, shares), min_size=20, max_size=60),
    cooldown_s=st.sampled_from([0.0, 7.0, 30.0]),
)
def test_between_two_changes_of_a_side_lies_the_cool_down(
    facts: list[tuple[float, float, float]], cooldown_s: float
) -> None:
    scaling = replace(SETTINGS, cooldown_s=cooldown_s, up_after_s=0.0, down_after_s=0.0)
    state = State.of(num_heads=NUM_HEADS, num_workers=NUM_WORKERS)
    changed: dict[str, float] = {"heads": -math.inf, "workers": -math.inf}
    for now, (kv, own, used) in enumerate(facts):
        before = state
        signals = seen({"kv_fill": kv, "own_s": own}, used)
        _, state = decide(state, signals, scaling, now=float(now))
        for side in changed:
            if getattr(before, side).target != getattr(state, side).target:
                assert now - changed[side] >= cooldown_s
                changed[side] = now


# --- patience ---


def test_a_short_peak_changes_nothing() -> None:
    state = State.of(num_heads=NUM_HEADS, num_workers=NUM_WORKERS)
    for now in (0.0, 4.0):
        decision, state = decide(state, seen({"kv_fill": 0.95}), SETTINGS, now=now)
        assert not decision.is_change
    assert "pressure for 4 of 5 s" in decision.reason
    _, state = decide(state, seen({"kv_fill": 0.7}), SETTINGS, now=5.0)
    decision, _ = decide(state, seen({"kv_fill": 0.95}), SETTINGS, now=6.0)
    assert not decision.is_change


@pytest.mark.parametrize(("burst", "does_shrink"), [(0.6, True), (1.0, False)])
def test_workers_that_work_in_bursts_are_judged_by_the_mean(
    burst: float, does_shrink: bool
) -> None:
    """Every fourth look falls into a burst, which alone would keep them all."""
    state = State.of(num_heads=NUM_HEADS, num_workers=NUM_WORKERS)
    least = NUM_WORKERS
    for look in range(120):
        used = burst if look % 4 == 0 else burst / 6
        decision, state = decide(state, seen({}, used), SETTINGS, now=5.0 * look)
        least = min(least, decision.num_workers)
    assert (least < NUM_WORKERS) is does_shrink


def test_heads_that_are_still_to_come_are_waited_for() -> None:
    state = replace(patient_state(), heads=Side(3, pressed_since=LONG_AGO))
    decision = decided(seen({"kv_fill": 0.95}), state)
    assert decision.num_heads == 3
    assert "1 still to come" in decision.reason


def test_those_that_are_still_to_go_are_waited_for() -> None:
    state = replace(patient_state(is_pressed=False), workers=Side(3, calm_since=LONG_AGO))
    idle = seen({}, 0.05)
    decision, after = decide(state, idle, SETTINGS, now=0.0)
    assert decision.num_workers == 3
    gone = replace(idle, workers=idle.workers[:3])
    state = replace(after, workers=replace(after.workers, calm_since=LONG_AGO))
    assert decide(state, gone, SETTINGS, now=1.0)[0].num_workers == SETTINGS.min_workers


# --- sleep ---

SLEEPY = replace(SETTINGS, sleep_after_s=60.0)
IDLE = {"own_s": 0.0, "away_s": 0.0}


def looked(*looks: tuple[float, Signals], scaling: Scaling = SLEEPY) -> list[Decision]:
    """What is decided in a row, at these times."""
    state, decisions = State.of(num_heads=NUM_HEADS, num_workers=NUM_WORKERS), []
    for now, signals in looks:
        decision, state = decide(state, signals, scaling, now=now)
        decisions.append(decision)
    return decisions


def test_without_a_request_for_so_long_all_go_and_stay_away() -> None:
    idle, nobody = seen(IDLE), Signals(heads=(), workers=())
    awake, asleep, still = looked((0.0, idle), (60.0, idle), (65.0, nobody))
    assert awake.num_heads > 0
    assert (asleep.num_heads, asleep.num_workers, asleep.is_change) == (0, 0, True)
    assert "no request for 60 s" in asleep.reason
    assert (still.num_heads, still.num_workers, still.is_change) == (0, 0, False)


@pytest.mark.parametrize("use", [{"own_s": 0.01}, {"num_requests": 1}])
def test_any_use_puts_sleep_off(use: dict[str, float]) -> None:
    """Also a request that makes no step, since its rows wait for a worker."""
    idle, used = seen(IDLE), seen(IDLE | use)
    *_, early, late = looked((0.0, idle), (40.0, used), (45.0, idle), (100.0, idle), (105.0, idle))
    assert early.num_heads > 0
    assert late.num_heads == 0


def test_who_waits_for_heads_keeps_sleep_away() -> None:
    nobody = Signals(heads=(), workers=())
    awaited = replace(nobody, is_awaited=True)
    *_, decision = looked((0.0, awaited), (600.0, awaited), (605.0, seen(IDLE)))
    assert decision.num_heads > 0
    *_, decision = looked((0.0, nobody), (60.0, nobody))
    assert decision.num_heads == 0, "a controller that started anew while all slept"


def test_a_request_that_comes_while_heads_go_keeps_them() -> None:
    *_, decision = looked((0.0, seen(IDLE)), (60.0, seen(IDLE)), (65.0, seen(NEED_NOT_WAIT)))
    assert decision.num_heads == SETTINGS.min_heads
    assert decision.num_workers == SETTINGS.min_workers


def test_nobody_sleeps_unless_told_to() -> None:
    *_, decision = looked((0.0, seen(IDLE)), (1e6, seen(IDLE)), scaling=SETTINGS)
    assert decision.num_heads > 0
