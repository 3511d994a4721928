"""Totals become loads: what has happened between two looks, whichever reports were lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.signals import HeadLoad, HeadTotals, Observer, WorkerLoad, WorkerTotals
from cluster.step_stats import StepStats


def step(**facts: float) -> StepStats:
    values: dict[str, object] = dict.fromkeys(StepStats.__dataclass_fields__, 0)
    values |= {"num_blocks": 10, "num_free_blocks": 4, "fill": 0.5, "num_waiting": 3}
    phases = {"attention": 0.25, "experts": 0.5, "transfer": 0.125, "outside": 9.0}
    values |= {"phases": phases, "forward_s": 1.0, "sampling_s": 0.5, "host_s": 0.25}
    return StepStats(**(values | facts))  # type: ignore[arg-type]


def test_a_head_tells_its_own_time_from_the_time_it_waits() -> None:
    totals = HeadTotals().after(step()).after(step(fill=0.25, num_free_blocks=5, num_waiting=0))
    assert totals == HeadTotals(
        num_steps=2, fill=0.75, own_s=2.25, away_s=1.25, kv_fill=0.5, num_waiting=0
    )


def test_the_first_look_knows_nothing_but_how_it_is_now() -> None:
    head = HeadTotals(num_steps=9, fill=9, own_s=9, away_s=9, kv_fill=0.5, num_waiting=2)
    worker = WorkerTotals(busy_s=9, num_calls=9, queued_s=9)
    signals = Observer().look({"head": head}, {7: worker}, now=100.0)
    assert signals.heads == (HeadLoad(kv_fill=0.5, step_fill=0, num_waiting=2, own_s=0, away_s=0),)
    assert signals.workers == (WorkerLoad(utilisation=0, queue_s=0),)


def test_a_look_tells_what_has_happened_since_the_last() -> None:
    observer = Observer()
    observer.look({"head": HeadTotals(num_steps=1, fill=1, own_s=1, away_s=1)}, {}, now=10.0)
    head = HeadTotals(num_steps=5, fill=3, own_s=1.5, away_s=3, kv_fill=0.25)
    signals = observer.look({"head": head}, {7: WorkerTotals()}, now=11.0)
    assert signals.heads == (
        HeadLoad(kv_fill=0.25, step_fill=0.5, num_waiting=0, own_s=0.5, away_s=2),
    )
    later = WorkerTotals(busy_s=1, num_calls=4, queued_s=2)
    signals = observer.look({}, {7: later}, now=13.0)
    assert (signals.heads, signals.workers) == ((), (WorkerLoad(utilisation=0.5, queue_s=0.5),))


def test_a_worker_that_comes_back_counts_anew() -> None:
    observer = Observer()
    observer.look({}, {7: WorkerTotals(busy_s=50, num_calls=9, queued_s=9)}, now=0.0)
    signals = observer.look({}, {8: WorkerTotals(busy_s=1, num_calls=1, queued_s=1)}, now=2.0)
    assert signals.workers == (WorkerLoad(utilisation=0, queue_s=0),)


@given(st.lists(st.tuples(st.floats(0.01, 9), st.floats(0, 9)), min_size=1, max_size=9))
def test_nobody_computes_more_than_all_of_the_time(looks: list[tuple[float, float]]) -> None:
    observer, now, busy_s = Observer(), 0.0, 0.0
    for seconds, more_s in looks:
        now, busy_s = now + seconds, busy_s + more_s
        (load,) = observer.look({}, {1: WorkerTotals(busy_s=busy_s)}, now).workers
        assert 0 <= load.utilisation <= 1


def test_two_looks_at_once_are_no_division_by_zero() -> None:
    observer = Observer()
    observer.look({}, {1: WorkerTotals()}, now=5.0)
    (load,) = observer.look({}, {1: WorkerTotals(busy_s=1)}, now=5.0).workers
    assert load.utilisation == pytest.approx(0)
