"""What replies say of tokens, streamed or not: their text, likelihood, ids, and what was cached."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.schema import ChatCompletion, ChatCompletionChunk, Completion
from tests.api_fakes import (
    BOTH,
    CHAT,
    COMPLETIONS,
    DONE,
    EITHER_WAY,
    EOS,
    LETTER_C,
    Api,
    Script,
    body_for,
    logprobs_of,
)

TEXT = "é風🌬 the wind"
"""Its first characters are of byte tokens, of which none is a character by itself."""


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


def says(api: Api, text: str, *, at_once: int = 1) -> list[int]:
    """Have the head say a text and end, some ids at a time. Returns the ids with the end's."""
    ids = [*api.tokenizer.encode(text), EOS]
    api.engine.script = in_groups(ids, at_once)
    return ids


def in_groups(ids: list[int], at_once: int) -> Script:
    """As a head that guesses ahead sends them."""
    return lambda journal: [
        tuple(ids[first : first + at_once]) for first in range(0, len(ids), at_once)
    ]


def ask(api: Api, path: str, *, stream: bool = False, **fields: Any) -> dict[int, dict[str, Any]]:
    """The choices of a reply by index; those of a stream put together."""
    body = body_for(path, **fields)
    if not stream:
        choices = api.post(path, body).json()["choices"]
        return {choice["index"]: with_text(choice) for choice in choices}
    *chunks, done = api.events(path, body)
    assert done == DONE
    whole: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        choice = with_text(choice)
        if choice["index"] in whole:
            add(whole[choice["index"]], choice)
        else:
            whole[choice["index"]] = choice
    return whole


def with_text(choice: dict[str, Any]) -> dict[str, Any]:
    """With the text under one name, whatever the endpoint calls it."""
    message = choice.pop("message", None) or choice.pop("delta", None)
    return choice if message is None else {**choice, "text": message["content"] or ""}


def add(whole: Any, more: dict[str, Any]) -> None:
    """Texts and lists grow, and what comes later holds."""
    for name, value in more.items():
        if name == "logprobs" and value is not None and whole[name] is not None:
            for each in value:
                whole[name][each] += value[each]
        elif name == "text" or (name == "token_ids" and whole[name] is not None):
            whole[name] += value
        elif value is not None:
            whole[name] = value


# --- completions ---


@EITHER_WAY
def test_no_logprobs_are_null(api: Api, stream: bool) -> None:
    for path, off in ((COMPLETIONS, None), (COMPLETIONS, False), (CHAT, False), (CHAT, None)):
        assert ask(api, path, stream=stream, logprobs=off)[0]["logprobs"] is None


@EITHER_WAY
@pytest.mark.parametrize(("asked", "num_entries"), [(0, 1), (1, 2), (2, 2), (5, 5)])
def test_a_completion_has_the_likeliest_tokens_and_the_drawn_one(
    api: Api, stream: bool, asked: int, num_entries: int
) -> None:
    ids = says(api, "the wind")
    logprobs = ask(api, COMPLETIONS, stream=stream, logprobs=asked)[0]["logprobs"]
    assert logprobs["token_logprobs"] == [logprobs_of(i, 0).logprob for i in ids]
    for token, own, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == own
        assert len(top) == num_entries or not token  # all control tokens are spelled alike


@BOTH
@EITHER_WAY
@pytest.mark.parametrize("at_once", [1, 3, 99])
def test_the_tokens_join_to_the_text(api: Api, path: str, stream: bool, at_once: int) -> None:
    """Byte by byte where a token is not a whole character, and the end token adds nothing."""
    ids = says(api, TEXT, at_once=at_once)
    choice = ask(api, path, stream=stream, logprobs=path == CHAT or 0, max_tokens=40)[0]
    if path == COMPLETIONS:
        tokens = choice["logprobs"]["tokens"]
        data = [
            bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
            if token.startswith("bytes:")
            else token.encode()
            for token in tokens
        ]
    else:
        tokens = [each["token"] for each in choice["logprobs"]["content"]]
        data = [bytes(each["bytes"]) for each in choice["logprobs"]["content"]]
    assert len(tokens) == len(ids)
    assert tokens[-1] == ""
    assert b"".join(data).decode() == choice["text"]
    assert sum(token.startswith("bytes:\\x") for token in tokens) == len("é風🌬".encode())


def test_offsets_say_where_a_token_begins_in_the_text(api: Api) -> None:
    says(api, TEXT)
    choice = ask(api, COMPLETIONS, logprobs=0, echo=True, prompt="a small hill", max_tokens=40)[0]
    logprobs = choice["logprobs"]
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"].startswith(token, offset)


@BOTH
@EITHER_WAY
def test_what_is_impossible_is_a_number_that_json_has(api: Api, path: str, stream: bool) -> None:
    says(api, "the wind")
    asked = {"logprobs": 12} if path == COMPLETIONS else {"logprobs": True, "top_logprobs": 12}
    logprobs = ask(api, path, stream=stream, **asked)[0]["logprobs"]
    if path == COMPLETIONS:
        top = list(logprobs["top_logprobs"][0].values())
    else:
        top = [each["logprob"] for each in logprobs["content"][0]["top_logprobs"]]
    assert min(top) == -9999.0
    assert top == sorted(top, reverse=True)


# --- chat ---


@EITHER_WAY
@pytest.mark.parametrize("asked", [None, 0, 1, 5])
def test_chat_has_exactly_the_likeliest_tokens(api: Api, stream: bool, asked: int | None) -> None:
    ids = says(api, "the wind")
    choice = ask(api, CHAT, stream=stream, logprobs=True, top_logprobs=asked)[0]
    content = choice["logprobs"]["content"]
    assert [each["token"] for each in content] == ["the", " wind", ""]  # no space at the beginning
    assert [each["logprob"] for each in content] == [logprobs_of(i, 0).logprob for i in ids]
    for each in content:
        assert len(each["top_logprobs"]) == (asked or 0)
        assert set(each) == {"token", "logprob", "bytes", "top_logprobs"}
        if asked == 5:
            own = {name: each[name] for name in ("token", "logprob", "bytes")}
            assert each["top_logprobs"][1] == own


# --- the prompt ---


@EITHER_WAY
@pytest.mark.parametrize("prompt", ["the wind", [1, 5, 70, 71]])
@pytest.mark.parametrize("max_tokens", [0, 20])
def test_an_echo_begins_with_the_prompt_and_its_tokens(
    api: Api, stream: bool, prompt: str | list[int], max_tokens: int
) -> None:
    ids = says(api, "and went", at_once=3)
    choices = ask(
        api,
        COMPLETIONS,
        stream=stream,
        prompt=prompt,
        echo=True,
        logprobs=2,
        max_tokens=max_tokens,
        n=2,
        return_token_ids=True,
    )
    tokenizer = api.tokenizer
    prompt_ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    shown = tokenizer.decode(prompt_ids)
    for choice in choices.values():
        logprobs = choice["logprobs"]
        assert choice["text"] == "".join(logprobs["tokens"])
        assert choice["text"] == (shown + " and went" if max_tokens else shown)
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert None not in logprobs["token_logprobs"][1:]
        assert logprobs["text_offset"][-1] + len(logprobs["tokens"][-1]) == len(choice["text"])
        assert {len(each) for each in logprobs.values()} == {
            len(prompt_ids) + (len(ids) if max_tokens else 0)
        }
        assert choice["prompt_token_ids"] == prompt_ids
        assert choice["token_ids"] == (ids if max_tokens else [])
        assert choice["finish_reason"] == ("stop" if max_tokens else "length")


@EITHER_WAY
def test_an_echo_without_logprobs_is_text_alone(api: Api, stream: bool) -> None:
    choice = ask(api, COMPLETIONS, stream=stream, echo=True, prompt="a hill", stop="hill")[0]
    assert (choice["text"], choice["logprobs"]) == ("a hill a ", None)  # no stop in the prompt
    assert choice["stop_reason"] == "hill"


def test_logprobs_of_a_prompt_are_by_id(api: Api) -> None:
    reply = api.post(COMPLETIONS, {"prompt": [[1, 70, 80], [1, 5]], "prompt_logprobs": 3}).json()
    first, second = (choice["prompt_logprobs"] for choice in reply["choices"])
    assert first[0] is None
    assert [list(each) for each in first[1:]] == [["69", "70", "68"], ["79", "80", "78"]]
    assert first[1]["70"] == {"logprob": -0.5, "rank": 2, "decoded_token": "C"}
    assert first[1]["69"] == {"logprob": -0.25, "rank": 1, "decoded_token": "B"}
    assert len(second) == 2
    assert reply["choices"][0]["logprobs"] is None
    completion = Completion.model_validate(reply)
    assert completion.choices[0].prompt_logprobs is not None
    assert completion.choices[0].prompt_logprobs[1] is not None
    assert completion.choices[0].prompt_logprobs[1][70].rank == 2


def test_the_number_of_likeliest_is_that_of_each_field(api: Api) -> None:
    body = {"prompt": [1, 70], "prompt_logprobs": 0, "echo": True, "logprobs": 3}
    (choice,) = api.post(COMPLETIONS, body).json()["choices"]
    assert list(choice["prompt_logprobs"][1]) == ["70"]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 3


def test_a_conversations_prompt_is_told_once(api: Api) -> None:
    body = body_for(CHAT, prompt_logprobs=1, return_token_ids=True, n=2)
    reply = api.post(CHAT, body).json()
    ChatCompletion.model_validate(reply)
    prompt_ids = list(api.engine.journals[0].prompt_ids)
    assert reply["prompt_token_ids"] == prompt_ids
    assert len(reply["prompt_logprobs"]) == len(prompt_ids)
    assert [choice["token_ids"] for choice in reply["choices"]] == [
        journal.emitted_ids for journal in api.engine.journals
    ]
    *chunks, _ = api.events(CHAT, {**body, "prompt_logprobs": None})
    told = [chunk["prompt_token_ids"] for chunk in chunks]
    assert told == [prompt_ids] + [None] * (len(chunks) - 1)


# --- the best ---


def test_the_best_answers_have_the_likeliest_tokens_on_average(api: Api) -> None:
    """However long they are: even ids are likelier than odd ones."""
    answers = ([70, 71], [70] * 9, [71])
    api.engine.script = lambda journal: [*answers[journal.params.choice], EOS]
    for n, texts in ((1, ["C" * 9]), (2, ["C" * 9, "CD"]), (3, ["CD", "C" * 9, "D"])):
        choices = ask(api, COMPLETIONS, best_of=3, n=n)
        assert [choices[index]["text"] for index in range(n)] == texts
        assert choices[0]["logprobs"] is None


# --- why it ended ---


@pytest.mark.parametrize(
    ("fields", "text", "finish", "reason", "num_tokens"),
    [
        ({}, "one two C three", "stop", None, 6),
        ({"ignore_eos": True, "max_tokens": 6}, "one two C three", "length", None, 6),
        ({"stop": ["three", "zero"]}, "one two C ", "stop", "three", 5),
        ({"stop": "C"}, "one two ", "stop", "C", 4),
        ({"stop": "C", "include_stop_str_in_output": True}, "one two C", "stop", "C", 4),
        ({"stop": "o C", "include_stop_str_in_output": True}, "one two C", "stop", "o C", 4),
        ({"stop_token_ids": [LETTER_C]}, "one two ", "stop", LETTER_C, 4),
        (
            {"stop_token_ids": [LETTER_C], "include_stop_str_in_output": True},
            "one two C",
            "stop",
            LETTER_C,
            4,
        ),
        ({"stop_token_ids": [EOS]}, "one two C three", "stop", None, 6),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, "one two C three", "stop", EOS, 6),
    ],
)
def test_a_reply_says_what_stopped_it_and_counts_no_token_after_that(
    api: Api,
    fields: dict[str, Any],
    text: str,
    finish: str,
    reason: str | int | None,
    num_tokens: int,
) -> None:
    """However many tokens come at once."""
    encode = api.tokenizer.encode
    ids = [*encode("one two"), encode(" ")[-1], LETTER_C, *encode("three"), EOS]
    assert len(ids) == 6
    for path, stream, at_once in product((COMPLETIONS, CHAT), (False, True), (1, 2, 3, 99)):
        api.engine.script = in_groups([*ids, LETTER_C, LETTER_C], at_once)
        asked = {"logprobs": path == CHAT or 0, "return_token_ids": True, **fields}
        choice = ask(api, path, stream=stream, **asked)[0]
        space = " " if path == COMPLETIONS else ""
        assert (choice["text"], choice["finish_reason"]) == (space + text, finish)
        assert choice["stop_reason"] == reason
        assert choice["token_ids"] == ids[:num_tokens]
        assert len(api.engine.journals[-1].emitted_ids) == num_tokens
        logprobs = choice["logprobs"]
        tokens = logprobs.get("tokens") or [each["token"] for each in logprobs["content"]]
        assert choice["text"].startswith("".join(tokens))
        # a token that the stop string cuts in two is not reported
        assert len(tokens) >= num_tokens - 1


# --- usage ---


@BOTH
def test_cached_tokens_are_those_of_each_prompts_first_choice(api: Api, path: str) -> None:
    api.engine.num_reused = 2
    usage = api.post(path, body_for(path, n=3)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    if path == COMPLETIONS:
        usage = api.post(path, {"prompt": ["a", "b"], "n": 2}).json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


@BOTH
def test_usage_in_every_chunk_grows_to_the_whole(api: Api, path: str) -> None:
    body = body_for(path, n=2)
    usage = api.post(path, body).json()["usage"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = api.events(path, {**body, "stream_options": options})
    totals = [chunk["usage"]["total_tokens"] for chunk in chunks]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]
    assert last["usage"] == usage == chunks[-1]["usage"]
    assert last["choices"] == []


@BOTH
def test_usage_in_every_chunk_needs_usage(api: Api, path: str) -> None:
    body = body_for(path, stream_options={"continuous_usage_stats": True})
    *chunks, _ = api.events(path, body)
    assert all(chunk["usage"] is None for chunk in chunks)


# --- a stream is the reply ---

WORDS = ["the wind", "a small hill", "é", "🌬", "C", "CC", "one two three", "\n"]


@given(
    path=st.sampled_from([COMPLETIONS, CHAT]),
    words=st.lists(st.sampled_from(WORDS), max_size=4),
    at_once=st.integers(1, 5),
    stop=st.lists(st.sampled_from(["wind", "C", "hi", "é", "two t", " ", "CCC"]), max_size=2),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 3),
            "include_stop_str_in_output": st.booleans(),
            "return_token_ids": st.booleans(),
            "stop_token_ids": st.just([LETTER_C]),
            "max_tokens": st.integers(1, 30),
        },
    ),
    num_top=st.none() | st.integers(0, 3),
    echo=st.booleans(),
)
def test_a_stream_joins_to_the_plain_reply_whatever_is_asked(
    tiny_folder: Path,
    path: str,
    words: list[str],
    at_once: int,
    stop: list[str],
    fields: dict[str, Any],
    num_top: int | None,
    echo: bool,
) -> None:
    api = Api(tiny_folder)
    says(api, "".join(words), at_once=at_once)
    asked = {**fields, "stop": stop}
    if path == COMPLETIONS:
        asked |= {"logprobs": num_top, "echo": echo}
    elif num_top is not None:
        asked |= {"logprobs": True, "top_logprobs": num_top}
    plain = ask(api, path, **asked)
    streamed = ask(api, path, stream=True, **asked)
    for choice in plain.values():
        choice.pop("prompt_logprobs", None)
    for choice in streamed.values():
        choice.pop("prompt_logprobs", None)
    assert streamed == plain
    schema = Completion if path == COMPLETIONS else ChatCompletionChunk
    for chunk in api.events(path, body_for(path, **asked))[:-1]:
        schema.model_validate(chunk)
