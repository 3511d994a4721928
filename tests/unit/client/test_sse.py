"""The event decoder keeps the WHATWG rules, however the bytes are cut into packets."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.client.sse import EventDecoder


def decode(*packets: bytes) -> list[str]:
    decoder = EventDecoder()
    return [event for packet in packets for event in decoder.feed(packet)]


TEXT = "wind, brezza 🌬, čas\u2028next\u2029\x85\x0b\x0c\x1c line"
"""Holds characters of one to four bytes, and line ends of str.splitlines that are none here."""

EVERYTHING = (
    "\ufeffdata: first\r\n\r\n"
    ": comment\r\r"
    "event: named\ndata: a\r\ndata:b\rdata\n\n"
    "id: 7\nretry: 10\n\n"
    f"data: {TEXT}\n\n"
    "data:\n\n"
    "data: [DONE]\n\n"
    "data: cut off by the end"
).encode()
EVERY_EVENT = ["first", "a\nb\n", TEXT, "", "[DONE]"]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(places), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


# --- what an event is ---


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_every_line_end_ends_a_line(end: str) -> None:
    assert decode(f"data: a{end}data: b{end}{end}data: c{end}{end}".encode()) == ["a\nb", "c"]


def test_line_ends_may_be_mixed() -> None:
    assert decode(b"data: a\r\ndata: b\rdata: c\n\r\ndata: d\r\r") == ["a\nb\nc", "d"]


def test_line_ends_of_other_alphabets_are_text() -> None:
    assert decode(f"data: {TEXT}\n\n".encode()) == [TEXT]


def test_one_space_after_the_colon_is_not_data() -> None:
    assert decode(b"data:a\n\ndata: b\n\ndata:  c \n\n") == ["a", "b", " c "]


def test_a_colon_in_the_value_is_data() -> None:
    assert decode(b'data: {"a": 1}\n\n') == ['{"a": 1}']


def test_a_comment_is_no_event() -> None:
    assert decode(b": keep-alive\n\n:\n\n:data: a\n\n") == []


def test_a_comment_does_not_part_an_event() -> None:
    assert decode(b"data: a\n: keep-alive\ndata: b\n\n") == ["a\nb"]


def test_an_event_without_data_is_no_event() -> None:
    assert decode(b"event: ping\nid: 1\nretry: 5\n\n\n\n") == []


@pytest.mark.parametrize("line", [b"data", b"data:", b"data: "])
def test_empty_data_is_an_event(line: bytes) -> None:
    assert decode(line + b"\n\n") == [""]


@pytest.mark.parametrize("line", [b"Data: a", b" data: a", b"dataset: a", b"other"])
def test_other_fields_are_read_over(line: bytes) -> None:
    assert decode(line + b"\ndata: b\n\n") == ["b"]


def test_only_the_first_byte_order_mark_is_dropped() -> None:
    mark = b"\xef\xbb\xbf"
    assert decode(mark + b"data: a\n\n" + mark + b"data: b\n\n") == ["a"]
    assert decode(mark + mark + b"data: a\n\ndata: b\n\n") == ["b"]


def test_bytes_that_are_not_utf8_become_replacement_characters() -> None:
    assert decode(b"data: a\xff\xe2\x82\n\ndata: b\n\n") == ["a\ufffd\ufffd", "b"]


def test_an_event_cut_off_by_the_end_is_not_returned() -> None:
    assert decode(b"data: a\n\ndata: b\n") == ["a"]


def test_an_event_is_returned_with_its_last_byte() -> None:
    """Nothing may wait for the byte after a CR, which may be seconds away."""
    decoder = EventDecoder()
    assert decoder.feed(b"data: a\r\n\r") == ["a"]
    assert decoder.feed(b"\n") == []
    assert decoder.feed(b"data: b\r\r") == ["b"]


def test_an_empty_packet_changes_nothing() -> None:
    assert decode(b"data: a\r", b"", b"\ndata: b\r", b"", b"\n\r", b"", b"\n") == ["a\nb"]


# --- how the bytes are cut ---


@pytest.mark.parametrize("place", range(len(EVERYTHING) + 1))
def test_a_cut_at_any_byte_gives_the_same_events(place: int) -> None:
    assert decode(EVERYTHING[:place], EVERYTHING[place:]) == EVERY_EVENT


def test_single_bytes_give_the_same_events() -> None:
    assert decode(*cut(EVERYTHING, list(range(len(EVERYTHING))))) == EVERY_EVENT


@given(data=st.data())
def test_any_stream_cut_anyhow_gives_the_same_events(data: st.DataObject) -> None:
    pieces = [b"data", b":", b" ", b"\r", b"\n", b"\r\n", b"id", "€".encode(), b"\xef\xbb\xbf"]
    stream = b"".join(
        data.draw(st.lists(st.one_of(st.sampled_from(pieces), st.binary(max_size=3)), max_size=40))
    )
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    assert decode(*cut(stream, places)) == decode(stream)


@given(
    events=st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))),
    end=st.sampled_from(["\n", "\r", "\r\n"]),
    packet=st.integers(1, 9),
)
def test_what_is_written_is_read(events: list[str], end: str, packet: int) -> None:
    stream = "".join(f"data: {event}{end}{end}" for event in events).encode()
    packets = [stream[start : start + packet] for start in range(0, len(stream), packet)]
    assert decode(*packets) == events
