"""A long prompt is read beside the event loop, and only while there is a place for its request."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.ingress.prompts import LONG, is_long
from cluster.schema import ChatCompletionRequest, CompletionRequest
from model.tokenizer import Tokenizer
from tests.api_fakes import (
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    Api,
    Caller,
    assert_error,
    body_for,
    never_ends,
)

TEXT = "the wind " * (LONG // 8)
MESSAGES = [{"role": "user", "content": TEXT}]
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "clock", "arguments": "x" * LONG},
}


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    api = Api(tiny_folder)
    api.configure(max_model_len=10 * LONG)
    return api


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """Who has tokenised, each time."""
    threads: list[threading.Thread] = []
    encode = Tokenizer.encode

    def observed(self: Tokenizer, text: str) -> list[int]:
        threads.append(threading.current_thread())
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", observed)
    return threads


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": TEXT, "max_tokens": 1}),
        (COMPLETIONS, {"prompt": ["a", TEXT], "max_tokens": 1}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 1}),
        ("/v1/responses", {"input": TEXT, "max_output_tokens": 1}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": MESSAGES}),
        ("/tokenize", {"prompt": TEXT}),
        ("/tokenize", {"messages": MESSAGES}),
    ],
)
def test_a_long_prompt_does_not_hold_the_event_loop(
    api: Api, readers: list[threading.Thread], path: str, body: dict[str, Any]
) -> None:
    response = api.post(path, body)
    assert response.status_code == 200, response.text
    assert readers
    assert threading.current_thread() not in readers
    assert api.num_in_progress == 0


def test_a_long_text_to_classify_does_not_hold_the_event_loop(
    api: Api, readers: list[threading.Thread]
) -> None:
    api.configure(labels=("a", "b", "c"))
    assert api.post(CLASSIFY, {"input": TEXT}).status_code == 200
    assert readers
    assert threading.current_thread() not in readers


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_short_prompt_is_not_worth_a_thread(
    api: Api, readers: list[threading.Thread], path: str
) -> None:
    assert api.post(path, body_for(path)).status_code == 200
    assert set(readers) == {threading.current_thread()}


def test_a_long_prompt_without_a_place_is_refused_unread(
    api: Api, readers: list[threading.Thread]
) -> None:
    api.engine.script = never_ends

    async def overload() -> None:
        callers = [Caller(api, COMPLETIONS, body_for(COMPLETIONS)) for _ in range(2)]
        await callers[-1].until(lambda: len(api.engine.journals) == 2)
        readers.clear()
        refused = await api.ask("POST", COMPLETIONS, json={"prompt": TEXT})
        assert_error(refused, 429, code="overloaded", kind="rate_limit_error")
        assert readers == []
        for caller in callers:
            await caller.hang_up()

    asyncio.run(overload())
    assert api.num_in_progress == 0


def test_a_long_prompt_that_is_refused_gives_its_place_back(api: Api) -> None:
    for _ in range(3):  # there are two places
        refused = api.post(COMPLETIONS, {"prompt": TEXT, "max_tokens": 20 * LONG})
        assert_error(refused, 400, param="max_tokens")
    assert api.num_in_progress == 0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"content": "x"}, False),
        ({"content": "x" * LONG}, True),
        ({"content": [{"type": "text", "text": "x" * LONG}]}, True),
        ({"role": "assistant", "tool_calls": [CALL]}, True),
    ],
)
def test_a_conversation_is_as_long_as_all_that_it_holds(
    fields: dict[str, Any], expected: bool
) -> None:
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", **fields}]})
    assert is_long(body) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [([5] * 100, False), ([5] * LONG, True), (["x" * 50] * 10, False), (["x" * 500] * 10, True)],
)
def test_prompts_are_as_long_as_all_of_them(prompt: list[Any], expected: bool) -> None:
    assert is_long(CompletionRequest.model_validate({"prompt": prompt})) == expected
