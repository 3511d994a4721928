"""What a controller asks of scaling: when it knows enough, and how it sleeps and wakes."""

from cluster.autoscale import Decision
from cluster.config import ServeConfig
from cluster.follow import HeadReport
from cluster.scaling import Scaler
from cluster.signals import HeadTotals

CONFIG = ServeConfig(num_heads=2, num_workers=3, sleep_after_s=60)
READY = HeadReport("ready", address="a:1")
STARTING = HeadReport("starting")


def look(
    scaler: Scaler,
    now: float,
    *heads: HeadReport,
    is_placed: bool = True,
    is_asleep: bool = False,
) -> Decision | None:
    return scaler.decide(
        heads, {}, CONFIG, num_workers=3, is_placed=is_placed, is_asleep=is_asleep, now=now
    )


def fell_asleep(scaler: Scaler) -> None:
    """At 60 s."""
    look(scaler, 0.0, READY)
    decision = look(scaler, 60.0, READY)
    assert decision is not None
    assert (decision.num_heads, decision.num_workers) == (0, 0)


def test_nothing_is_decided_before_all_is_known() -> None:
    scaler = Scaler(knows_heads_at=12.0)
    assert look(scaler, 5.0) is None
    assert look(scaler, 12.0, is_placed=False) is None
    decision = look(scaler, 12.0, READY)
    assert decision is not None
    assert (decision.num_heads, decision.num_workers) == (2, 3)


def test_heads_that_go_do_not_wake_it() -> None:
    """Their last report has no address, as that of heads that start."""
    scaler = Scaler(knows_heads_at=0.0)
    fell_asleep(scaler)
    for now, heads in ((65.0, [STARTING]), (70.0, [])):
        decision = look(scaler, now, *heads, is_asleep=True)
        assert decision is not None
        assert (decision.num_heads, decision.is_change) == (0, False)


def test_a_woken_service_begins_anew() -> None:
    scaler = Scaler(knows_heads_at=0.0)
    fell_asleep(scaler)
    assert look(scaler, 65.0, is_placed=False) is None
    decision = look(scaler, 70.0, STARTING)
    assert decision is not None
    assert (decision.num_heads, decision.num_workers) == (2, 3)


def test_it_stays_awake_as_long_as_a_request_waits_or_heads_start() -> None:
    scaler = Scaler(knows_heads_at=0.0)
    scaler.is_awaited = True
    for now, heads in ((0.0, []), (600.0, []), (1200.0, [STARTING]), (1800.0, [READY])):
        decision = look(scaler, now, *heads)
        assert decision is not None
        assert decision.num_heads == 2, now
    assert not scaler.is_awaited
    decision = look(scaler, 1860.0, READY)
    assert decision is not None
    assert decision.num_heads == 0


def test_a_head_that_computes_counts_as_used() -> None:
    scaler = Scaler(knows_heads_at=0.0)
    for number in range(20):
        totals = HeadTotals(num_steps=number, own_s=0.1 * number)
        decision = look(scaler, 30.0 * number, HeadReport("ready", address="a:1", totals=totals))
        assert decision is not None
        assert decision.num_heads == 2
