"""How long to wait follows how long it took: near for what is known, generous for what is not."""

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
