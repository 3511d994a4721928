"""What a head tells an ingress beside tokens: that it lives, and how busy it is."""

import pytest

from cluster import rpc
from cluster.head.engine import Event
from cluster.head.service import StreamOutbox
from protos import head_pb2


def outbox() -> StreamOutbox:
    loads = iter(range(1, 100))
    return StreamOutbox(lambda: head_pb2.Load(num_requests=next(loads)))


def test_the_first_message_says_how_busy_the_head_is() -> None:
    first = next(iter(outbox()))
    assert not first.events
    assert first.load.num_requests == 1


def test_events_go_out_without_delay_and_without_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "HEAD_BEAT_S", 600.0)
    box = outbox()
    messages = iter(box)
    next(messages)
    box.put([Event(3, (7,)), Event(4, (8,))])
    box.put([Event(3, (9,))])
    both, one = next(messages), next(messages)
    assert [list(event.token_ids) for event in both.events] == [[7], [8]]
    assert [event.request_id for event in one.events] == [3]
    assert not both.HasField("load")
    box.beat()
    assert next(messages).load.num_requests == 2


def test_a_head_with_nothing_to_say_says_so_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "HEAD_BEAT_S", 0.01)
    messages = iter(outbox())
    assert [next(messages).load.num_requests for _ in range(3)] == [1, 2, 3]


def test_a_busy_head_says_how_busy_along_with_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "HEAD_BEAT_S", 0.0)
    box = outbox()
    messages = iter(box)
    next(messages)
    box.put([Event(3, (7,))])
    message = next(messages)
    while not message.events:  # beats come first: they are due at once
        message = next(messages)
    assert message.HasField("load")


def test_a_closed_outbox_ends() -> None:
    box = outbox()
    box.close()
    assert list(box) == []
