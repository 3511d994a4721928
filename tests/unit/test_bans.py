"""Who fails is left alone for a while, longer each time, and forgiven in the end."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.head.bans import FIRST_BAN_S, LONGEST_BAN_S, Bans


def test_a_ban_ends() -> None:
    bans = Bans()
    assert bans.active(0.0) == frozenset()
    bans.ban("a", 10.0)
    assert bans.active(10.0) == {"a"}
    assert bans.active(10.0 + FIRST_BAN_S) == frozenset()


def test_each_ban_is_twice_as_long_as_the_one_before() -> None:
    bans, now = Bans(), 0.0
    for times in range(12):
        length = min(FIRST_BAN_S * 2**times, LONGEST_BAN_S)
        assert bans.ban("a", now) == length
        assert bans.ban("b", now) == length
        assert bans.active(now + 0.99 * length) == {"a", "b"}
        now += length
        assert bans.active(now) == frozenset()


def test_who_has_behaved_for_as_long_as_the_longest_ban_starts_anew() -> None:
    bans = Bans()
    for _ in range(3):
        bans.ban("a", 0.0)
    ended = 4 * FIRST_BAN_S
    assert bans.ban("a", ended + LONGEST_BAN_S + 0.01) == FIRST_BAN_S


@given(failures=st.lists(st.tuples(st.floats(0, 30), st.sampled_from("abc"), st.booleans())))
def test_looking_changes_nothing(failures: list[tuple[float, str, bool]]) -> None:
    """Whoever asks more often gets the same bans."""
    seldom, often, now = Bans(), Bans(), 0.0
    for pause, worker, looks in failures:
        now += pause
        if looks:
            often.active(now - pause / 2)
            often.active(now)
        assert seldom.ban(worker, now) == often.ban(worker, now)
    assert seldom.active(now + 1) == often.active(now + 1)
