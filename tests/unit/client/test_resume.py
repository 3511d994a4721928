"""A stream that breaks off goes on: the caller sees what it would have seen undisturbed."""

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import errors
from cluster.ingress.journal import Journal
from tests.api_fakes import EOS, USER, Api, tools_folder
from tests.client_fakes import (
    DONE,
    Packets,
    Server,
    Way,
    event,
    events_response,
    text_chunk,
)

STORY = "the wind 🌬 blew STOP over čas, and so it went"


class CutApi:
    """The HTTP API over a scripted engine, whose connections break off after given bytes."""

    def __init__(
        self, api: Api, cuts: list[int] | None = None, seed: int = 0, text: str = STORY
    ) -> None:
        """cuts: one for each connection. seed: of how many ids come at once, each time anew.
        text: what the model says.
        """
        self._api = api
        self._cuts = list(cuts or ())
        self._rng = random.Random(seed)
        self._api.engine.script = self._script
        self._api.engine.journals.clear()
        self._ids = [*api.tokenizer.encode(text), EOS]
        self._thread = ThreadPoolExecutor(1)  # asynchronous tests have a loop in theirs
        self.bodies: list[bytes] = []
        self.num_bytes = 0
        """Of the last answer, were it whole."""

    def _script(self, journal: Journal) -> Iterator[tuple[int, ...]]:
        place = len(journal.emitted_ids)
        while place < len(self._ids):
            num_now = self._rng.randint(1, 3)
            yield tuple(self._ids[place : place + num_now])
            place += num_now

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(request.content)
        asked = {"content": request.content, "headers": request.headers}
        answer = self._thread.submit(
            lambda: asyncio.run(self._api.ask("POST", request.url.path, **asked))
        ).result()
        self.num_bytes = len(answer.content)
        cut = self._cuts.pop(0) if self._cuts else self.num_bytes
        # half of them close the connection properly, but too early
        error = httpx.ReadError("reset") if cut % 2 and cut < self.num_bytes else None
        body = Packets([answer.content[:cut]], error)
        return httpx.Response(answer.status_code, headers=answer.headers, stream=body)


@pytest.fixture(scope="module")
def api(tiny_folder: Path) -> Api:
    api = Api(tiny_folder)
    api.configure(max_model_len=512)
    return api


REQUESTS: list[dict[str, Any]] = [
    {"prompt": "the wind"},
    {"prompt": "the wind", "echo": True, "return_token_ids": True},
    {"prompt": [5, 6, 7], "stop": ["wind X", "w STOP o"], "max_tokens": 60},
    {"prompt": "a", "stop": "STOP", "include_stop_str_in_output": True, "seed": 3},
    {"prompt": "a", "max_tokens": 9, "stream_options": {"include_usage": True}},
    {"messages": [USER], "stop": "🌬 b"},
    {
        "messages": [USER],
        "return_token_ids": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
]


def stream(client: Any, asked: dict[str, Any]) -> Any:
    methods = client.chat.completions if "messages" in asked else client.completions
    return methods.create(**{"max_tokens": 400, **asked}, stream=True)


def joined_calls(deltas: list[Any]) -> list[tuple[str, str]]:
    """Name and arguments of every call of a tool."""
    calls: dict[int, list[str]] = {}
    for call in [call for each in deltas for call in getattr(each, "tool_calls", None) or ()]:
        if call.id:
            assert call.index not in calls
            calls[call.index] = [call.function.name, ""]
        calls[call.index][1] += call.function.arguments
    return [(name, arguments) for name, arguments in calls.values()]


def whole(chunks: list[Any]) -> dict[str, Any]:
    """All that a stream has told, however it was cut into chunks."""
    choices = [choice for chunk in chunks for choice in chunk.choices]
    deltas = [choice.delta if hasattr(choice, "delta") else choice for choice in choices]
    prompt_ids = [
        getattr(each, "prompt_token_ids", None)
        for chunk in chunks
        for each in (chunk, *chunk.choices)
    ]
    return {
        "text": "".join(
            getattr(each, "content", None) or getattr(each, "text", "") for each in deltas
        ),
        "calls": joined_calls(deltas),
        "roles": [each.role for each in deltas if getattr(each, "role", None)],
        "finish": [
            (each.finish_reason, each.stop_reason) for each in choices if each.finish_reason
        ],
        "ids": [each for choice in choices for each in choice.token_ids or ()],
        "has_ids": {choice.token_ids is not None for choice in choices[-1:]},
        "prompt_ids": [each for each in prompt_ids if each is not None],
        "last_usage": chunks[-1].usage,
        "num_ids": len({chunk.id for chunk in chunks}),
    }


@pytest.mark.parametrize("asked", REQUESTS, ids=range(len(REQUESTS)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(cuts=st.lists(st.integers(0, 5_000), max_size=4), seed=st.integers(0, 99))
def test_wherever_it_breaks_off_the_whole_is_the_undisturbed_one(
    way: Way,
    api: Api,
    slept_s: list[float],
    asked: dict[str, Any],
    cuts: list[int],
    seed: int,
) -> None:
    undisturbed = whole(list(stream(way.client(CutApi(api), max_retries=0), asked)))
    assert undisturbed["text"]
    server = CutApi(api, cuts, seed)
    chunks = list(stream(way.client(server, max_retries=9), asked))
    assert whole(chunks) == undisturbed
    seeds = {journal.params.seed for journal in api.engine.journals}
    assert len(seeds) == 1
    assert asked.get("seed") in {None, *seeds}


@pytest.mark.parametrize("asked", [REQUESTS[4], REQUESTS[5]], ids=["completion", "chat"])
def test_no_place_to_break_off_is_different(
    way: Way, api: Api, slept_s: list[float], asked: dict[str, Any]
) -> None:
    server = CutApi(api)
    undisturbed = whole(list(stream(way.client(server, max_retries=1), asked)))
    for cut in range(0, server.num_bytes, 61):
        chunks = list(stream(way.client(CutApi(api, [cut]), max_retries=1), asked))
        assert whole(chunks) == undisturbed


def test_a_call_of_a_tool_goes_on_where_it_stood(
    way: Way, tiny_folder: Path, tmp_path: Path, slept_s: list[float]
) -> None:
    api = Api(tools_folder(tiny_folder, tmp_path))
    api.configure(max_model_len=1_000, max_body_bytes=100_000)
    call = '{"name": "clock", "arguments": {"city": "Nice 🌬"}}'
    text = f"[TOOL_CALLS] [{call}, {call}]"
    tool = {"type": "function", "function": {"name": "clock"}}
    asked = {"messages": [USER], "tools": [tool]}
    server = CutApi(api, text=text)
    undisturbed = whole(list(stream(way.client(server, max_retries=1), asked)))
    assert undisturbed["calls"] == [("clock", '{"city": "Nice 🌬"}')] * 2
    assert undisturbed["finish"] == [("tool_calls", None)]
    for cut in range(0, server.num_bytes, 419):
        chunks = list(stream(way.client(CutApi(api, [cut], cut, text), max_retries=1), asked))
        assert whole(chunks) == undisturbed


# --- what is asked for ---


def test_what_goes_on_is_asked_for_like_the_first_time(
    way: Way, api: Api, slept_s: list[float]
) -> None:
    server = CutApi(api, [1_200])
    client = way.client(server, max_retries=1)
    list(stream(client, {"prompt": "a", "min_tokens": 3, "extra_body": {"top_k": 5}}))
    first, second = (httpx.Response(200, content=body).json() for body in server.bodies)
    ids = second.pop("resume_token_ids")
    assert ids
    assert first == second
    assert first["return_token_ids"] is True
    assert api.engine.journals[1].emitted_ids[: len(ids)] == ids
    assert len(slept_s) == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"n": 2},
        {"best_of": 2},
        {"logprobs": 0},
        {"prompt": ["a", "b"]},
        {"prompt": [[1], [2]]},
    ],
)
def test_what_cannot_go_on_is_not_prepared_for_it(way: Way, asked: dict[str, Any]) -> None:
    server = Server(events_response(Packets([event(text_chunk("a"))])))
    given_ = {"prompt": "a", **asked}
    chunks = way.client(server, max_retries=2).completions.create(**given_, stream=True)
    assert next(chunks).choices[0].text == "a"
    with pytest.raises(errors.APIStreamError, match=r"before \[DONE\], after 1 chunks"):
        next(chunks)
    assert server.body == {**given_, "stream": True}
    assert len(server.requests) == 1


def test_without_retries_nothing_is_added_and_nothing_goes_on(way: Way) -> None:
    server = Server(events_response(Packets([])))
    with pytest.raises(errors.APIStreamError):
        list(way.client(server, max_retries=0).completions.create(prompt="a", stream=True))
    assert server.body == {"prompt": "a", "stream": True}
    assert len(server.requests) == 1


# --- what cannot go on ---


def ids_chunk(text: str, *ids: int) -> bytes:
    chunk = text_chunk(text)
    chunk["choices"][0]["token_ids"] = list(ids)
    return event(chunk)


def goes_on(num_ids: int, *packets: bytes) -> httpx.Response:
    return events_response(Packets(list(packets)), **{"X-Resumed-Tokens": str(num_ids)})


def test_a_stream_gives_up_after_so_many_breaks_without_a_chunk(
    way: Way, slept_s: list[float]
) -> None:
    server = Server(
        goes_on(0, ids_chunk("a", 1)),
        goes_on(1),
        goes_on(1, ids_chunk("b", 2)),
        goes_on(2),
        goes_on(2),
    )
    chunks = way.client(server, max_retries=2).completions.create(prompt="a", stream=True)
    assert [next(chunks).choices[0].text, next(chunks).choices[0].text] == ["a", "b"]
    with pytest.raises(errors.APIStreamError, match=r"3 times without a chunk between"):
        next(chunks)
    assert list(chunks) == []
    assert len(server.requests) == 5
    first, longer = (0.375, 0.5), (0.75, 1.0)  # waits grow only while nothing comes
    for (least, most), slept in zip([first, longer, first, longer], slept_s, strict=True):
        assert least <= slept <= most


def test_a_server_that_begins_anew_is_not_read(way: Way, slept_s: list[float]) -> None:
    anew = Packets([ids_chunk("a", 1), DONE])
    server = Server(goes_on(0, ids_chunk("a", 1)), events_response(anew))
    chunks = way.client(server, max_retries=2).completions.create(prompt="a", stream=True)
    next(chunks)
    with pytest.raises(errors.APIStreamError, match="would begin anew"):
        next(chunks)
    assert (anew.num_read, anew.is_closed) == (0, True)


def test_a_server_that_tells_no_ids_is_not_asked_to_go_on(way: Way) -> None:
    server = Server(events_response(Packets([event(text_chunk("a"))])))
    chunks = way.client(server, max_retries=2).completions.create(prompt="a", stream=True)
    next(chunks)
    with pytest.raises(errors.APIStreamError, match="broke off"):
        next(chunks)
    assert len(server.requests) == 1


def test_a_refusal_to_go_on_is_the_reason(way: Way, slept_s: list[float]) -> None:
    refusal = httpx.Response(404, json={"error": {"message": "no such model"}})
    server = Server(goes_on(0, ids_chunk("a", 1)), refusal)
    chunks = way.client(server, max_retries=2).completions.create(prompt="a", stream=True)
    next(chunks)
    with pytest.raises(errors.APIStreamError, match="could not go on: no such model") as caught:
        next(chunks)
    assert isinstance(caught.value.__cause__, errors.NotFoundError)


def test_an_error_in_the_stream_is_the_servers_last_word(way: Way) -> None:
    server = Server(goes_on(0, ids_chunk("a", 1), event({"error": {"message": "lost"}}), DONE))
    chunks = way.client(server, max_retries=2).completions.create(prompt="a", stream=True)
    next(chunks)
    with pytest.raises(errors.APIStreamError, match=r"^lost$"):
        next(chunks)
    assert len(server.requests) == 1


def test_a_closed_stream_does_not_go_on(way: Way) -> None:
    server = Server(goes_on(0, ids_chunk("a", 1)))
    chunks = way.client(server, max_retries=2).completions.create(prompt="a", stream=True)
    next(chunks)
    chunks.close()
    assert list(chunks) == []
    assert len(server.requests) == 1
