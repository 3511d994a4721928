"""How often a request is tried again."""

import pytest

from cluster.errors import (
    HeadDrainsError,
    HeadFailedError,
    HeadLostError,
    HeadUnavailableError,
    RequestError,
)
from cluster.ingress.tries import MAX_LOST, MAX_LOST_IN_A_ROW, SUSPECT_FROM, Tries
from cluster.placement import HeadInfo

HEAD = HeadInfo("head-1", "memory")
LOST = HeadLostError("head-1 at memory: socket closed")


def test_a_request_that_gets_nowhere_is_given_up_after_a_few_heads() -> None:
    tries = Tries()
    for num_lost in range(1, MAX_LOST_IN_A_ROW):
        assert tries.again_after(LOST, HEAD) == "lost"
        assert tries.is_suspect == (num_lost >= SUSPECT_FROM)
    with pytest.raises(HeadUnavailableError, match=r"socket closed.*3 heads"):
        tries.again_after(LOST, HEAD)


def test_a_request_that_gets_on_is_given_up_later() -> None:
    tries = Tries()
    for _ in range(MAX_LOST - 1):
        assert tries.again_after(LOST, HEAD) == "lost"
        tries.progress()
        assert not tries.is_suspect
    with pytest.raises(HeadUnavailableError, match=f"{MAX_LOST} heads"):
        tries.again_after(LOST, HEAD)


def test_what_a_head_says_that_failed_is_tried_once_more() -> None:
    tries = Tries()
    failure = HeadFailedError("head-1: no room")
    assert tries.again_after(failure, HEAD) == "failed"
    assert (tries.failure, tries.failed_at) == (failure, HEAD)
    again = HeadFailedError("head-2: no room")
    with pytest.raises(HeadFailedError, match="head-2"):
        tries.again_after(again, HeadInfo("head-2", "memory"))


def test_a_parameter_at_fault_is_the_callers_whoever_says_so() -> None:
    tries, error = Tries(), RequestError(400, "the grammar is too costly", param="grammar")
    assert tries.again_after(LOST, HEAD) == "lost"
    with pytest.raises(RequestError) as raised:
        tries.again_after(error, HEAD)
    assert raised.value is error


def test_heads_that_drain_do_not_count() -> None:
    tries = Tries()
    for _ in range(100):
        assert tries.again_after(HeadDrainsError("head-1 is about to stop"), HEAD) == "moved"
    assert not tries.is_suspect


def test_what_is_neither_is_raised() -> None:
    error = HeadUnavailableError("there was no head")
    with pytest.raises(HeadUnavailableError) as raised:
        Tries().again_after(error, HEAD)
    assert raised.value is error
