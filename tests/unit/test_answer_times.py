"""How long to wait follows how long it took: near for what is known, generous for what is not."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from cluster.head.answer_times import FLOOR_S, TIMES_SLOWEST, AnswerTimes


def test_nothing_known_means_no_deadline() -> None:
    times = AnswerTimes()
    assert times.deadline_s(4) is None
    times.observe(100, 0.5)
    assert times.deadline_s(4) is None  # a call of one row says nothing of the time for 100, yet
    assert times.deadline_s(100) == TIMES_SLOWEST * 0.5


def test_the_deadline_is_a_multiple_of_the_slowest_recent_answer_but_not_below_the_floor() -> None:
    times = AnswerTimes()
    for seconds in (0.001, 0.3, 0.002):
        times.observe(5, seconds)
    deadline_s = times.deadline_s(4)
    assert deadline_s is not None
    assert TIMES_SLOWEST * 0.29 < deadline_s <= TIMES_SLOWEST * 0.3
    for _ in range(2_000):
        times.observe(5, 0.001)
    assert times.deadline_s(4) == FLOOR_S


def test_a_larger_call_than_any_before_gets_time_in_proportion() -> None:
    times = AnswerTimes()
    times.observe(1, 0.1)
    times.observe(2, 0.1)
    assert times.deadline_s(512) == TIMES_SLOWEST * 0.1 * 256


@given(
    answers=st.lists(st.tuples(st.integers(1, 600), st.floats(0, 5)), min_size=1),
    num_rows=st.integers(1, 600),
)
def test_an_answer_as_slow_as_the_last_is_never_late(
    answers: list[tuple[int, float]], num_rows: int
) -> None:
    times = AnswerTimes()
    for rows, seconds in answers:
        times.observe(rows, seconds)
    rows, seconds = answers[-1]
    deadline_s = times.deadline_s(rows)
    assert deadline_s is not None
    assert deadline_s >= max(FLOOR_S, seconds)
    later_s = times.deadline_s(num_rows)
    assert later_s is None or later_s >= FLOOR_S


def test_nothing_is_usual_before_an_answer_of_that_size() -> None:
    times = AnswerTimes()
    times.observe(4, 0.1)
    assert times.usual_s(2) is None
    assert times.usual_s(7) == 0.1


@given(
    seed=st.integers(0, 1_000),
    scale=st.floats(1e-3, 1.0),
    first=st.floats(0.1, 10.0),
)
def test_one_answer_in_twenty_is_slower_than_usual_whatever_the_first_was(
    seed: int, scale: float, first: float
) -> None:
    times, draw = AnswerTimes(), random.Random(seed)
    times.observe(1, scale * first)
    num_slower = 0
    for number in range(4_000):
        seconds = scale * draw.lognormvariate(0.0, 0.5)
        usual_s = times.usual_s(1)
        assert usual_s is not None
        num_slower += number >= 1_000 and seconds > usual_s
        times.observe(1, seconds)
    assert 0.03 < num_slower / 3_000 < 0.07


@given(st.lists(st.floats(0, 5), min_size=1))
def test_how_much_slower_an_answer_was_says_nothing_of_what_is_usual(seconds: list[float]) -> None:
    """So one that was not waited for to its end counts rightly."""
    whole, cut = AnswerTimes(), AnswerTimes()
    for each in seconds:
        usual_s = cut.usual_s(1)
        whole.observe(1, each)
        is_slower = usual_s is not None and each > usual_s
        cut.observe(1, math.nextafter(usual_s, math.inf) if usual_s and is_slower else each)
        assert whole.usual_s(1) == cut.usual_s(1)
