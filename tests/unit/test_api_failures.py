"""Whatever fails or hangs up, callers get one clear answer and nothing is left running."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import HeadFailedError, HeadUnavailableError, RequestError
from cluster.ingress.errors import UNFINISHED
from cluster.ingress.journal import Journal
from cluster.ingress.sse import KEEP_ALIVE
from tests.api_fakes import (
    BOTH,
    COMPLETIONS,
    DEADLINE_S,
    DONE,
    EITHER_WAY,
    LETTER_C,
    Api,
    Caller,
    Script,
    assert_error,
    body_for,
    fails_after,
    never_ends,
    story,
)


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


# --- failures of the engine ---


@BOTH
@EITHER_WAY
def test_a_failure_before_the_first_token_is_a_503(api: Api, path: str, stream: bool) -> None:
    api.engine.script = fails_after(0, HeadUnavailableError("head-1 is gone"))
    response = api.post(path, body_for(path, stream=stream))
    message = assert_error(response, 503, kind="service_unavailable")
    assert message == UNFINISHED
    assert int(response.headers["retry-after"]) >= 1
    assert api.num_in_progress == 0


@BOTH
@EITHER_WAY
@pytest.mark.parametrize("num_told", [0, 2])
def test_a_503_names_no_host_and_no_error_of_ours_but_the_log_does(
    api: Api, path: str, stream: bool, num_told: int, caplog: pytest.LogCaptureFixture
) -> None:
    detail = "head-1 at 10.0.0.7:4711: worker-3: RuntimeError('out of memory')"
    api.engine.script = fails_after(num_told, HeadFailedError(detail))
    text = api.post(path, body_for(path, stream=stream)).text
    assert UNFINISHED in text
    for word in ("head-1", "10.0.0.7", "worker-3", "RuntimeError"):
        assert word not in text
    assert detail in caplog.text


@BOTH
@EITHER_WAY
def test_a_refusal_by_the_head_is_the_callers_400(api: Api, path: str, stream: bool) -> None:
    api.engine.script = fails_after(0, RequestError(400, "too long for the head"))
    message = assert_error(api.post(path, body_for(path, stream=stream)), 400)
    assert message == "too long for the head"


@BOTH
@EITHER_WAY
@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
    ],
)
def test_a_form_that_the_head_refuses_is_named_as_the_caller_did(
    api: Api, path: str, stream: bool, form: dict[str, Any], param: str
) -> None:
    api.engine.script = fails_after(0, RequestError(400, "it allows no answer", param="grammar"))
    assert_error(api.post(path, body_for(path, stream=stream, **form)), 400, param=param)


@BOTH
def test_a_plain_reply_that_cannot_be_finished_is_a_503(api: Api, path: str) -> None:
    api.engine.script = fails_after(3, HeadUnavailableError("head-1 is gone"))
    assert_error(api.post(path, body_for(path)), 503, kind="service_unavailable")


@BOTH
def test_a_failure_in_a_stream_is_said_in_the_stream(api: Api, path: str) -> None:
    api.engine.script = fails_after(2, HeadUnavailableError("head-1 is gone"))
    *chunks, error, done = api.events(path, body_for(path))
    assert done == DONE
    assert error == {
        "error": {
            "message": UNFINISHED,
            "type": "service_unavailable",
            "param": None,
            "code": None,
        }
    }
    assert len(chunks) >= 2
    assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks)
    assert api.num_in_progress == 0


def test_a_failure_of_one_choice_ends_all(api: Api) -> None:
    def script(journal: Journal) -> Iterator[int | Exception]:
        yield LETTER_C
        if journal.params.choice == 1:
            yield HeadUnavailableError("head-1 is gone")
        # the others stay silent

    api.engine.script = script
    response = api.post(COMPLETIONS, body_for(COMPLETIONS, n=3))
    assert_error(response, 503, kind="service_unavailable")
    assert len(api.engine.aborted) == 3
    *_, error, done = api.events(COMPLETIONS, body_for(COMPLETIONS, n=3))
    assert error["error"]["message"] == UNFINISHED
    assert done == DONE
    assert len(api.engine.aborted) == 6


SECRET = ValueError("the password is hunter2")


def assert_says_nothing(text: str) -> None:
    for word in ("hunter2", "password", "ValueError", "Traceback", ".py"):
        assert word not in text


@BOTH
@EITHER_WAY
def test_an_unexpected_error_is_a_500_without_a_word_of_it(
    api: Api, path: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    api.engine.script = fails_after(0, SECRET)
    with caplog.at_level(logging.ERROR):
        response = api.post(path, body_for(path, stream=stream))
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert_says_nothing(response.text)
    assert "hunter2" in caplog.text  # but in the log
    assert api.num_in_progress == 0


@BOTH
def test_an_unexpected_error_in_a_stream_is_an_event_without_a_word_of_it(
    api: Api, path: str
) -> None:
    api.engine.script = fails_after(2, SECRET)
    *_, error, done = api.events(path, body_for(path))
    assert error["error"]["type"] == "server_error"
    assert_says_nothing(json.dumps(error))
    assert done == DONE


@BOTH
@EITHER_WAY
@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"X-Request-Id": "req-7"}, "request req-7: "),
        ({"X-Request-Id": "50%s <b>"}, "request 50?s??b?: "),
        ({"X-Request-Id": "x" * 500}, f"request {'x' * 128}: "),
        ({}, ""),
    ],
    ids=["named", "insane", "long", "unnamed"],
)
def test_lines_about_a_request_name_it(
    api: Api,
    path: str,
    stream: bool,
    headers: dict[str, str],
    named: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    api.engine.script = fails_after(0, HeadUnavailableError("head-1 is gone"))
    with caplog.at_level(logging.WARNING):
        api.post(path, body_for(path, stream=stream), headers=headers)
    assert f"{named}a request is answered with 503: head-1 is gone" in caplog.messages


# --- callers that hang up ---


@BOTH
@pytest.mark.parametrize("n", [1, 3])
def test_hanging_up_on_a_plain_request_aborts_it_at_the_head(api: Api, path: str, n: int) -> None:
    api.engine.script = never_ends

    async def hang_up() -> None:
        caller = Caller(api, path, body_for(path, n=n))
        await caller.until(lambda: sum(len(j.emitted_ids) for j in api.engine.journals) == 2 * n)
        await caller.hang_up()

    asyncio.run(hang_up())
    assert len(api.engine.aborted) == n
    assert api.num_in_progress == 0
    assert api.num_requests(path, 499) == 1


@BOTH
@pytest.mark.parametrize("n", [1, 3])
def test_hanging_up_on_a_stream_aborts_it_at_the_head(api: Api, path: str, n: int) -> None:
    api.engine.script = never_ends

    async def hang_up() -> None:
        caller = Caller(api, path, body_for(path, n=n, stream=True))
        await caller.until(lambda: sum(len(j.emitted_ids) for j in api.engine.journals) == 2 * n)
        await caller.until(lambda: len(caller.sent) >= 2)
        await caller.hang_up()

    asyncio.run(hang_up())
    assert len(api.engine.aborted) == n
    assert api.num_in_progress == 0


@BOTH
def test_a_stream_whose_caller_can_no_longer_be_reached_is_aborted_at_the_head(
    api: Api, path: str
) -> None:
    """As newer ASGI servers tell it: sending fails."""
    api.engine.script = lambda journal: [LETTER_C] * 50

    async def hang_up() -> None:
        caller = Caller(api, path, body_for(path, stream=True, max_tokens=40), spec_version="2.4")
        await caller.until(lambda: len(caller.sent) >= 4)
        await caller.hang_up()
        await caller.until(lambda: api.engine.aborted)

    asyncio.run(hang_up())
    assert api.num_in_progress == 0


@BOTH
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_hanging_up_on_a_stream_before_its_first_token_aborts_it_at_the_head(
    api: Api, path: str, spec_version: str
) -> None:
    """Under load that is when callers lose their patience; nobody must compute for them."""
    api.engine.script = lambda journal: []

    async def hang_up() -> None:
        caller = Caller(api, path, body_for(path, stream=True), spec_version=spec_version)
        await caller.until(lambda: api.engine.journals)
        caller.leave()
        try:
            await caller.until(lambda: api.engine.aborted)
        finally:
            await caller.cancel()

    asyncio.run(hang_up())
    assert api.num_in_progress == 0


@BOTH
@EITHER_WAY
@pytest.mark.parametrize(
    ("script", "spec_version"),
    [(never_ends, "2.3"), (story, "2.3"), (story, "2.4")],
    ids=["silent", "served", "served, newer ASGI"],
)
def test_hanging_up_at_any_moment_leaves_nothing_behind(
    api: Api, path: str, stream: bool, script: Script, spec_version: str
) -> None:
    """A turn of the event loop earlier or later: the request is aborted, or it was served."""
    api.engine.script = script
    body = body_for(path, n=2, stream=stream)

    async def hang_up_after(num_turns: int) -> None:
        caller = Caller(api, path, body, spec_version=spec_version)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await caller.hang_up()
        await caller.until(
            lambda: len(api.engine.closed) == len(api.engine.journals) and api.num_in_progress == 0
        )

    for num_turns in range(50):
        asyncio.run(hang_up_after(num_turns))
    assert api.engine.journals


@BOTH
@EITHER_WAY
def test_a_cancelled_request_is_aborted_at_the_head(api: Api, path: str, stream: bool) -> None:
    """As Serve ends requests whose caller is gone, and servers at their shutdown."""
    api.engine.script = lambda journal: []

    async def cancel() -> None:
        caller = Caller(api, path, body_for(path, stream=stream))
        await caller.until(lambda: api.engine.journals)
        await caller.cancel()

    asyncio.run(cancel())
    assert len(api.engine.aborted) == 1
    assert api.num_in_progress == 0


@BOTH
@EITHER_WAY
@pytest.mark.parametrize(
    "script",
    [
        story,
        fails_after(0, HeadUnavailableError("gone")),
        fails_after(2, HeadUnavailableError("gone")),
        fails_after(0, SECRET),
    ],
    ids=["served", "failed at once", "failed later", "unexpected"],
)
def test_a_place_is_free_again_after_every_outcome(
    api: Api, path: str, stream: bool, script: Script
) -> None:
    api.engine.script = script
    for _ in range(5):  # there are two places
        assert api.post(path, body_for(path, stream=stream)).status_code != 429
    assert api.num_in_progress == 0
    assert len(api.engine.closed) == len(api.engine.journals) == 5


# --- silence ---


def silent(num_tokens: int) -> Script:
    """Some ids, then nothing."""
    return lambda journal: [LETTER_C] * num_tokens


@BOTH
@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_silent_stream_is_kept_alive_by_comments(api: Api, path: str, num_tokens: int) -> None:
    """Before its first token, too: what stands between would give up on the connection."""
    api.configure(sse_keep_alive_s=0.01)
    api.engine.script = silent(num_tokens)

    async def listen() -> None:
        caller = Caller(api, path, body_for(path, stream=True))
        await caller.until(lambda: caller.bodies.count(KEEP_ALIVE) >= 3, patience_s=DEADLINE_S)
        await caller.hang_up()
        assert caller.sent[0]["type"] == "http.response.start"
        assert caller.sent[0]["status"] == 200
        assert caller.bodies[-1] == KEEP_ALIVE

    asyncio.run(listen())
    assert len(api.engine.aborted) == 1
    assert api.num_in_progress == 0


@BOTH
def test_a_failure_after_a_long_silence_is_said_in_the_stream(api: Api, path: str) -> None:
    """The status had to be told before anything was known."""
    api.configure(sse_keep_alive_s=0.001)
    goes_on = asyncio.Event()

    async def generate(journal: Journal) -> AsyncGenerator[tuple[int, ...], None]:
        await goes_on.wait()
        raise HeadUnavailableError("head-1 is gone")
        yield (LETTER_C,)

    api.engine.generate = generate  # type: ignore[method-assign]

    async def listen() -> None:
        caller = Caller(api, path, body_for(path, stream=True))
        await caller.until(lambda: KEEP_ALIVE in caller.bodies, patience_s=DEADLINE_S)
        goes_on.set()
        await caller.until(lambda: caller.bodies[-1] == b"", patience_s=DEADLINE_S)
        *_, error, done = (body for body in caller.bodies if body not in (KEEP_ALIVE, b""))
        assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == UNFINISHED
        assert done == b"data: [DONE]\n\n"

    asyncio.run(listen())


@BOTH
@EITHER_WAY
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_caller_who_hangs_up_leaves_no_trace_in_the_log(
    api: Api, path: str, stream: bool, spec_version: str, caplog: pytest.LogCaptureFixture
) -> None:
    api.configure(sse_keep_alive_s=0.001)
    api.engine.script = silent(2)
    errors: list[BaseException | None] = []

    async def hang_up() -> None:
        caller = Caller(api, path, body_for(path, stream=stream), spec_version=spec_version)
        await caller.until(lambda: api.engine.journals and api.engine.journals[0].emitted_ids)
        await caller.hang_up()
        errors.append(caller.error)

    with caplog.at_level(logging.WARNING):
        asyncio.run(hang_up())
    assert errors == [None]
    assert caplog.text == ""
    assert len(api.engine.aborted) == 1
