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


def head(number: int = 0, **fields: float) -> HeadLoad:
    """A head with little to do, that waits as long for experts as it computes itself."""
    facts: dict[str, float] = {"kv_fill": 0.5, "step_fill": 0.5, "wait_s": 0, "num_open": 1}
    facts |= {"own_s": 0.5, "experts_s": 0.25, "transfer_s": 0.25} | fields
    return HeadLoad(name=f"head-{number}", **facts)  # type: ignore[arg-type]


def worker(number: int = 0, utilisation: float = 0.5, **fields: object) -> WorkerLoad:
    """A worker that computes one expert of its own in each of two layers, and has no room."""
    experts = {(layer, number): utilisation / 2 for layer in range(2)}
    facts: dict[str, object] = {"queue_s": 0.0, "experts": experts, "expert_bytes": 10}
    facts |= {"free_bytes": 0} | fields
    return WorkerLoad(name=f"worker-{number}", utilisation=utilisation, **facts)  # type: ignore[arg-type]


def seen(head_facts: dict[str, float], utilisation: float = 0.5, queue_s: float = 0.0) -> Signals:
    return Signals(
        heads=tuple(head(number, **head_facts) for number in range(NUM_HEADS)),
        workers=tuple(
            worker(number, utilisation, queue_s=queue_s) for number in range(NUM_WORKERS)
        ),
    )


def patient_state(*, is_pressed: bool = True) -> State:
    """Pressure, or calm, has lasted for long."""
    since = {"pressed_since": LONG_AGO} if is_pressed else {"calm_since": LONG_AGO}
    return State(Side(NUM_HEADS, **since), Side(NUM_WORKERS, **since), {})  # type: ignore[arg-type]


def decided(signals: Signals, state: State | None = None, scaling: Scaling = SETTINGS) -> Decision:
    return decide(state or patient_state(), signals, scaling, now=0.0)[0]


EXPERTS_EXPOSED = {"own_s": 0.2, "experts_s": 0.6, "transfer_s": 0.2}
HEADS_EXPOSED = {"own_s": 0.8, "experts_s": 0.1, "transfer_s": 0.1}
NETWORK_EXPOSED = {"own_s": 0.2, "experts_s": 0.1, "transfer_s": 0.7}


# --- which side grows ---


def test_a_full_kv_cache_always_asks_for_heads() -> None:
    for exposed in (EXPERTS_EXPOSED, HEADS_EXPOSED, NETWORK_EXPOSED):
        assert decided(seen({"kv_fill": 0.95, **exposed})).num_heads == 3  # 2 * 0.95 / 0.65


@pytest.mark.parametrize("symptom", [{"step_fill": 0.95}, {"wait_s": 1.5}])
@pytest.mark.parametrize(
    ("exposed", "utilisation", "heads_grow", "workers_grow"),
    [
        (HEADS_EXPOSED, 0.8, True, False),
        (EXPERTS_EXPOSED, 0.8, False, True),
        (NETWORK_EXPOSED, 0.1, True, False),
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
    assert decided(seen(EXPERTS_EXPOSED, utilisation, queue_s)).num_workers > NUM_WORKERS
    assert decided(seen(HEADS_EXPOSED, utilisation, queue_s)).num_workers == NUM_WORKERS


def test_growth_aims_at_the_target_and_at_most_doubles() -> None:
    kv = seen({"kv_fill": 1.0})
    assert decided(kv, scaling=replace(SETTINGS, target=0.7)).num_heads == 3
    assert decided(kv, scaling=replace(SETTINGS, target=0.1)).num_heads == 2 * NUM_HEADS


# --- hot experts ---


def hot_cluster(**cool: object) -> Signals:
    """Worker 0 is busy with one expert; the others have time, and room unless told otherwise."""
    busy = worker(0, 0.9, experts={(0, 0): 0.85, (1, 0): 0.05})
    others = (worker(number, 0.1, **{"free_bytes": 10, **cool}) for number in (1, 2, 3))
    return Signals(heads=(head(0, **EXPERTS_EXPOSED),) * NUM_HEADS, workers=(busy, *others))


def test_a_hot_expert_gets_a_copy_where_there_is_room_and_time() -> None:
    decision = decided(hot_cluster())
    assert (decision.num_workers, decision.copies) == (NUM_WORKERS, {(0, 0): 2})
    assert "another copy of 1 experts" in decision.reason
    assert "(0 of layer 0)" in decision.reason


@pytest.mark.parametrize("cool", [{"free_bytes": 9}, {"utilisation": 0.6}])
def test_without_room_or_time_elsewhere_a_worker_comes_instead(cool: dict[str, float]) -> None:
    utilisation = cool.pop("utilisation", 0.1)
    signals = hot_cluster(**cool)
    others = tuple(replace(w, utilisation=utilisation) for w in signals.workers[1:])
    decision = decided(replace(signals, workers=(signals.workers[0], *others)))
    assert decision.num_workers > NUM_WORKERS
    assert decision.copies == {}


def test_the_bound_on_workers_does_not_keep_a_hot_expert_from_a_copy() -> None:
    decision = decided(hot_cluster(), scaling=replace(SETTINGS, max_workers=NUM_WORKERS))
    assert decision.copies == {(0, 0): 2}


def test_experts_that_are_hot_but_little_used_are_not_worth_a_copy() -> None:
    busy = worker(0, 0.9, experts={(0, 0): 0.06, (1, 0): 0.84})
    others = tuple(
        worker(number, 0.85, experts={(0, number): 0.01, (1, number): 0.84}, free_bytes=10)
        for number in (1, 2)
    )
    idle = worker(3, 0.0, experts={}, free_bytes=10)
    signals = Signals(heads=(head(0, **EXPERTS_EXPOSED),), workers=(busy, *others, idle))
    decision = decided(signals)
    assert (decision.num_workers > NUM_WORKERS, decision.copies) == (True, {})


def test_every_layer_may_copy_its_busiest_expert_while_there_is_room() -> None:
    busy = worker(0, 0.9, experts={(layer, 0): 0.3 for layer in range(3)})
    others = tuple(
        worker(n, 0.03, experts={(layer, n): 0.01 for layer in range(3)}, free_bytes=10)
        for n in (1, 2)
    )
    signals = Signals(heads=(head(0, **EXPERTS_EXPOSED),), workers=(busy, *others))
    state = replace(patient_state(), workers=Side(3, pressed_since=LONG_AGO))
    assert decided(signals, state).copies == {(0, 0): 2, (1, 0): 2}


def test_an_even_load_has_no_hot_expert() -> None:
    signals = seen(EXPERTS_EXPOSED, 0.9)
    roomy = tuple(replace(each, free_bytes=None) for each in signals.workers)
    assert decided(replace(signals, workers=roomy)).copies == {}


def test_copies_go_before_workers() -> None:
    calm = replace(patient_state(is_pressed=False), copies={(0, 0): 2})
    decision, after = decide(calm, seen({}, 0.05), SETTINGS, now=0.0)
    assert (decision.num_workers, decision.copies) == (NUM_WORKERS, {})
    state = replace(after, workers=replace(after.workers, calm_since=LONG_AGO))
    later, _ = decide(state, seen({}, 0.05), SETTINGS, now=SETTINGS.cooldown_s)
    assert later.num_workers == SETTINGS.min_workers


# --- laws ---


@given(kv=shares, step=shares, wait_s=st.floats(0, 99), used=shares, queue_s=shares, own=shares)
def test_bounds_hold_whatever_is_seen(
    kv: float, step: float, wait_s: float, used: float, queue_s: float, own: float
) -> None:
    facts = {"kv_fill": kv, "step_fill": step, "wait_s": wait_s, "own_s": own}
    scaling = Scaling(min_heads=2, max_heads=3, min_workers=3, max_workers=5)
    for is_pressed in (True, False):
        decision = decided(
            seen(facts, used, queue_s), patient_state(is_pressed=is_pressed), scaling
        )
        assert 2 <= decision.num_heads <= 3
        assert 3 <= decision.num_workers <= 5


@given(
    load=st.tuples(shares, shares, st.floats(0, 2)),
    more=st.tuples(shares, shares, st.floats(0, 2)),
    exposed=st.sampled_from([HEADS_EXPOSED, EXPERTS_EXPOSED, NETWORK_EXPOSED]),
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
    names = ("kv_fill", "step_fill", "wait_s")
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
    low = decided(seen(EXPERTS_EXPOSED, used, queue_s), state)
    high = decided(seen(EXPERTS_EXPOSED, max(used, more), max(queue_s, more_s)), state)
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


def test_heads_that_are_still_to_come_are_waited_for() -> None:
    state = replace(patient_state(), heads=Side(3, pressed_since=LONG_AGO))
    decision = decided(seen({"kv_fill": 0.95}), state)
    assert decision.num_heads == 3
    assert "1 still to come" in decision.reason


# --- draining ---


def test_those_with_least_to_do_are_drained() -> None:
    heads = (head(0, num_open=3, kv_fill=0.1, step_fill=0.1), head(1, num_open=1, kv_fill=0.1))
    signals = Signals(
        heads=heads, workers=tuple(worker(n, 0.05 + 0.01 * n) for n in range(NUM_WORKERS))
    )
    heads = tuple(replace(each, step_fill=0.1) for each in heads)
    decision = decided(replace(signals, heads=heads), patient_state(is_pressed=False))
    assert decision.num_heads == 1
    assert set(decision.drain) == {"head-1", "worker-0", "worker-1"}


def test_one_that_drains_goes_on_draining_and_is_the_first_to_come_back() -> None:
    draining = replace(head(0, num_open=5), is_draining=True)
    signals = Signals(heads=(draining, head(1, num_open=1)), workers=seen({}).workers)
    state = State.of(num_heads=1, num_workers=NUM_WORKERS)
    assert decided(signals, state).drain == ("head-0",)
    assert decided(signals, replace(state, heads=Side(2))).drain == ()


# --- to zero and back ---

SLEEPY = replace(SETTINGS, zero_after_s=60.0)
IDLE = Signals(heads=(head(0, num_open=0), head(1, num_open=0)), workers=seen({}).workers)


def test_an_idle_cluster_sleeps_and_wakes_with_the_first_request() -> None:
    state = State.of(num_heads=NUM_HEADS, num_workers=NUM_WORKERS)
    for now in (0.0, 59.0):
        decision, state = decide(state, IDLE, SLEEPY, now=now)
        assert decision.num_heads == NUM_HEADS
    decision, state = decide(state, IDLE, SLEEPY, now=60.0)
    assert (decision.num_heads, decision.num_workers) == (0, 0)
    assert len(decision.drain) == NUM_HEADS + NUM_WORKERS
    nobody = Signals(heads=(), workers=())
    decision, state = decide(state, nobody, SLEEPY, now=1000.0)
    assert (decision.is_change, decision.reason) == (False, "Asleep: no request has come.")
    decision, _ = decide(state, replace(nobody, num_pending=1), SLEEPY, now=1001.0)
    assert (decision.num_heads, decision.num_workers) == (1, SLEEPY.min_workers)


def test_a_request_starts_the_time_anew() -> None:
    state = State.of(num_heads=NUM_HEADS, num_workers=NUM_WORKERS)
    _, state = decide(state, IDLE, SLEEPY, now=0.0)
    _, state = decide(state, replace(IDLE, num_pending=1), SLEEPY, now=59.0)
    decision, _ = decide(state, IDLE, SLEEPY, now=61.0)
    assert decision.num_heads > 0


def test_without_the_option_nothing_sleeps_and_a_sleeper_wakes() -> None:
    state = State.of(num_heads=0, num_workers=0)
    decision = decided(Signals(heads=(), workers=()), state)
    assert (decision.num_heads, decision.num_workers) == (1, SETTINGS.min_workers)
    state = State.of(num_heads=NUM_HEADS, num_workers=NUM_WORKERS)
    for now in (0.0, 100_000.0):
        decision, state = decide(state, IDLE, SETTINGS, now=now)
    assert decision.num_heads >= 1
