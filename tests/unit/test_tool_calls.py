"""Calls are told as they are written, however the text is cut; what is no call stays text."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ingress.tool_calls import CallReader, CallRules, new_call_id

RULES = CallRules(frozenset({"weather", "time"}))
MARKER = "[TOOL_CALLS]"

Calls = list[tuple[str, str]]


def read(pieces: list[str], rules: CallRules = RULES) -> tuple[str, Calls]:
    """Content, and name and arguments of each call."""
    reader = CallReader(rules)
    content, deltas = "", []
    for more, calls in [*map(reader.push, pieces), reader.flush()]:
        content += more
        deltas += calls
    found: list[list[str]] = []
    for delta in deltas:
        if delta.id is not None:
            assert re.fullmatch(r"[a-zA-Z0-9]{9}", delta.id)
            assert delta.name is not None
            found.append([delta.name, ""])
        else:
            assert delta.name is None
        assert delta.index == len(found) - 1
        found[-1][1] += delta.arguments
    assert reader.num_calls == len(found)
    return content, [(name, arguments) for name, arguments in found]


ARGUMENTS = '{"city": "Nice }]\\"\\\\", "at": [{"n": {}}, 2]}'
ONE = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
WITH_ID = f'{{"name":"time","arguments":{ARGUMENTS}, "id": "abcdefghi"}}'

ANSWERS: list[tuple[str, str, Calls]] = [
    ("Hello [TOOL", "Hello [TOOL", []),
    (f"{MARKER} [{ONE}]", "", [("weather", ARGUMENTS)]),
    (f"Let me see. {MARKER}[{ONE}]", "Let me see. ", [("weather", ARGUMENTS)]),
    (f"{MARKER} [{ONE}, {WITH_ID}]\n", "", [("weather", ARGUMENTS), ("time", ARGUMENTS)]),
    # cut off by max_tokens
    (f"{MARKER} [{ONE[:-9]}", "", [("weather", ARGUMENTS[:-8])]),
    (f"{MARKER} [{ONE}, {ONE[:12]}", f" {ONE[:12]}", [("weather", ARGUMENTS)]),
    (f"{MARKER} [{ONE}, ", "", [("weather", ARGUMENTS)]),
    # with more than is known, and others in another form behind it
    (f'{MARKER} [{ONE[:-1]}, "type": "function"}}]', "", [("weather", ARGUMENTS)]),
    (
        f'{MARKER} [{ONE[:-1]}, "id": 5}}, {{"name": "time"}}]',
        "",
        [("weather", ARGUMENTS), ("time", "{}")],
    ),
    (
        f'{MARKER} [{ONE}, {{"arguments": {{}}, "name": "time"}}]',
        "",
        [("weather", ARGUMENTS), ("time", "{}")],
    ),
    # in another order, without a list
    (f'{MARKER} {{"arguments": {{"a": 1}}, "name": "time"}}', "", [("time", '{"a": 1}')]),
    (f'{MARKER} [{{"name": "time"}}]', "", [("time", "{}")]),
    (
        f'{MARKER} {{"name": "time", "arguments": {{"a": "\\ud800é"}}}}',
        "",
        [("time", '{"a": "\\ud800é"}')],
    ),
    # what is no call
    (f"{MARKER} is what I would write", f"{MARKER} is what I would write", []),
    (f"{MARKER} no {MARKER} [{ONE}]", f"{MARKER} no ", [("weather", ARGUMENTS)]),
    (f"{MARKER} [{ONE[:20]}", f"{MARKER} [{ONE[:20]}", []),
    (f"{MARKER} [1, 2]", f"{MARKER} [1, 2]", []),
    (f"{MARKER} [{ONE}, wind]", " wind]", [("weather", ARGUMENTS)]),
    (f'{MARKER} [{ONE}, {{"name": "x"}}]', ' {"name": "x"}]', [("weather", ARGUMENTS)]),
    (f"{MARKER} [{ONE}]\nThat is all.", "\nThat is all.", [("weather", ARGUMENTS)]),
    (f"{MARKER} []", f"{MARKER} []", []),
    (f'{MARKER} [{{"name": ["time"]}}]', f'{MARKER} [{{"name": ["time"]}}]', []),
    (
        f'{MARKER} [{{"name": "unknown", "arguments": {{}}}}]',
        f'{MARKER} [{{"name": "unknown", "arguments": {{}}}}]',
        [],
    ),
    (MARKER, MARKER, []),
]


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
def test_an_answer_is_parted_the_same_however_it_is_cut(
    text: str, content: str, calls: Calls
) -> None:
    for pieces in ([text], list(text), [text[i : i + 5] for i in range(0, len(text), 5)]):
        assert read(pieces) == (content, calls)


@given(
    arguments=st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text())),
    cuts=st.lists(st.integers(1, 9), min_size=1),
    ensure_ascii=st.booleans(),
)
def test_any_arguments_come_out_as_they_were_written(
    arguments: dict[str, Any], cuts: list[int], ensure_ascii: bool
) -> None:
    written = json.dumps(arguments, ensure_ascii=ensure_ascii)
    text = f'{MARKER} [{{"name": "weather", "arguments": {written}}}]'
    pieces, at = [], 0
    while at < len(text):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(text[at : at + size])
        at += size
    assert read(pieces) == ("", [("weather", written)])


@given(text=st.lists(st.sampled_from([MARKER, "[", "{", "}", '"', ONE, ", ", "wind"])).map("".join))
def test_no_answer_breaks_the_reader_and_no_text_without_marker_is_lost(text: str) -> None:
    content, calls = read(list(text))
    assert (content, calls) == read([text])
    if MARKER not in text:
        assert (content, calls) == (text, [])


def test_arguments_are_told_while_they_are_written() -> None:
    reader = CallReader(RULES)
    reader.push(f'{MARKER} [{{"name": "weather", "arguments": ')
    told = [reader.push(piece)[1] for piece in ('{"city', '": "N', 'ice"')]
    assert [delta.arguments for deltas in told for delta in deltas][-3:] == [
        '{"city',
        '": "N',
        'ice"',
    ]


def test_only_one_call_is_one_call() -> None:
    more = f'{MARKER} [{ONE[:-1]}, "id": 5}}, {{"name": "time"}}]'
    assert read([more], replace(RULES, only_one=True)) == ("", [("weather", ARGUMENTS)])
    rules = replace(RULES, only_one=True)
    assert read([f"{MARKER} [{ONE}, {WITH_ID}]"], rules) == ("", [("weather", ARGUMENTS)])
    assert read([f'{MARKER} [{{"name": "time"}}, {{"name": "time"}}]'], rules) == (
        "",
        [("time", "{}")],
    )


def test_behind_a_marker_in_the_prompt_the_answer_is_calls() -> None:
    rules = replace(RULES, begins_with_calls=True)
    assert read([f"[{ONE}]"], rules) == ("", [("weather", ARGUMENTS)])
    assert read(["[1]"], rules) == ("[1]", [])


def test_ids_differ() -> None:
    assert len({new_call_id() for _ in range(100)}) == 100
