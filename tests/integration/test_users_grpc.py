"""The users' gRPC door over a scripted engine: the same answers and refusals as over HTTP."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.app import free_port
from cluster.certs import write_certificates
from cluster.config import ServeConfig
from cluster.errors import ConfigurationError, HeadUnavailableError
from cluster.ingress.answerer import Answerer
from cluster.ingress.api import create_app
from cluster.ingress.auth import Access, ApiKey
from cluster.ingress.deployment import grpc_door
from cluster.ingress.users_grpc import MAX_DETAILS, SERVICE, credentials_of, serving
from cluster.security import identity_of
from protos import maestrale_pb2, maestrale_pb2_grpc
from tests.api_fakes import (
    CHAT,
    COMPLETIONS,
    DEADLINE_S,
    LOADING,
    MODEL_ID,
    READY,
    USER,
    Api,
    fails_after,
    never_ends,
    text_side,
)

T = TypeVar("T")
Stub = maestrale_pb2_grpc.MaestraleStub
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


@asynccontextmanager
async def channel_to(
    api: Api, folder: Path, host: str = "127.0.0.1"
) -> AsyncIterator[grpc.aio.Channel]:
    """host: what the door listens on; the channel comes by loopback all the same."""
    answerer = Answerer(api.engine, *text_side(folder), api.settings, api.metrics)
    async with (
        serving(answerer, api.metrics, f"{host}:0", access=api.access) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


@pytest.fixture
def call(api: Api, tiny_folder: Path) -> Callable[[Callable[[grpc.aio.Channel], Any]], Any]:
    """Runs a coroutine with a channel to the door."""

    def run(work: Callable[[grpc.aio.Channel], Coroutine[Any, Any, T]]) -> T:
        async def with_channel() -> T:
            async with channel_to(api, tiny_folder) as channel, asyncio.timeout(DEADLINE_S):
                return await work(channel)

        return asyncio.run(with_channel())

    return run


Call = Callable[[Callable[[grpc.aio.Channel], Any]], Any]


def generate(**fields: Any) -> maestrale_pb2.GenerateRequest:
    return ParseDict({"text": "the wind", **fields}, maestrale_pb2.GenerateRequest())


def chat(*messages: dict[str, str], **fields: Any) -> maestrale_pb2.ChatRequest:
    return ParseDict({"messages": messages, **fields}, maestrale_pb2.ChatRequest())


def answer(call: Call, request: Any, **options: Any) -> list[maestrale_pb2.Delta]:
    """All that the door says to a request."""

    async def ask(channel: grpc.aio.Channel) -> list[maestrale_pb2.Delta]:
        stub = Stub(channel)
        is_chat = isinstance(request, maestrale_pb2.ChatRequest)
        method = stub.Chat if is_chat else stub.Generate
        return [delta async for delta in method(request, **options)]

    return call(ask)


def refusal(call: Call, request: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        answer(call, request)
    return caught.value


async def code_of(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """How a request ends."""
    try:
        async for _ in Stub(channel).Generate(generate()):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def until(condition: Callable[[], object], what: str) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 (it is no event's to tell)
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"waited {DEADLINE_S} s for {what}")


def test_a_prompt_is_continued_as_over_http(api: Api, call: Call) -> None:
    api.engine.num_reused = 2
    deltas = answer(call, generate(options={"max_tokens": 20}))
    over_http = api.post(COMPLETIONS, {"prompt": "the wind", "max_tokens": 20}).json()
    (choice,), usage = over_http["choices"], over_http["usage"]
    assert len(deltas) > 1
    assert "".join(delta.text for delta in deltas) == choice["text"]
    *others, last = deltas
    assert {delta.finish for delta in others} == {maestrale_pb2.FINISH_NONE}
    assert last.finish == maestrale_pb2.FINISH_STOP
    assert last.usage.prompt_tokens == usage["prompt_tokens"]
    assert last.usage.completion_tokens == usage["completion_tokens"]
    assert last.usage.cached_tokens == 2
    assert [id for delta in deltas for id in delta.token_ids] == api.engine.journals[0].emitted_ids


def test_a_conversation_is_answered_as_over_http(api: Api, call: Call) -> None:
    messages = [{"role": "system", "content": "be brief"}, USER]
    deltas = answer(call, chat(*messages, model=MODEL_ID))
    over_http = api.post(CHAT, {"messages": messages}).json()
    text = "".join(delta.text for delta in deltas)
    assert text == over_http["choices"][0]["message"]["content"]


def test_token_ids_and_options_reach_the_engine(api: Api, call: Call) -> None:
    options = {
        "max_tokens": 9,
        "min_tokens": 1,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "seed": -(2**62),
        "stop_token_ids": [11],
        "structured_outputs": {"regex": "a+"},
        "priority": 3,
        "cache_salt": "salt",
    }
    request = maestrale_pb2.GenerateRequest(options=ParseDict(options, maestrale_pb2.Options()))
    request.token_ids.token_ids[:] = [1, 5, 8]
    answer(call, request, metadata=(("authorization", "Bearer sesame"),))
    api.post(
        COMPLETIONS,
        {"prompt": [1, 5, 8], **options},
        headers={"authorization": "Bearer sesame"},
    )
    ours, https = api.engine.journals
    assert ours.prompt_ids == (1, 5, 8)
    assert (ours.params, ours.grammar) == (https.params, https.grammar)
    assert (ours.client, ours.priority, ours.cache_salt) == (https.client, 3, "salt")


def test_what_is_left_out_has_https_defaults(api: Api, call: Call) -> None:
    answer(call, generate(options={"seed": 1}))
    api.post(COMPLETIONS, {"prompt": "the wind", "seed": 1})
    ours, https = api.engine.journals
    assert ours.params == https.params


def test_the_stop_string_is_told(call: Call) -> None:
    last = answer(call, generate(options={"stop": ["wind"], "max_tokens": 20}))[-1]
    assert (last.finish, last.stop_string) == (maestrale_pb2.FINISH_STOP, "wind")


def test_an_answer_that_is_cut_says_length(call: Call) -> None:
    assert answer(call, generate(options={"max_tokens": 1}))[-1].finish == (
        maestrale_pb2.FINISH_LENGTH
    )


@pytest.mark.parametrize(
    ("request_", "path", "body", "code"),
    [
        (generate(text=""), COMPLETIONS, {"prompt": ""}, "INVALID_ARGUMENT"),
        (
            generate(options={"temperature": 3}),
            COMPLETIONS,
            {"prompt": "the wind", "temperature": 3.0},
            "INVALID_ARGUMENT",
        ),
        (
            generate(options={"structured_outputs": {"json": "{"}}, model="gpt"),
            COMPLETIONS,
            {"prompt": "the wind", "model": "gpt"},
            "NOT_FOUND",
        ),
        (
            maestrale_pb2.GenerateRequest(token_ids=maestrale_pb2.TokenIds()),
            COMPLETIONS,
            {"prompt": []},
            "INVALID_ARGUMENT",
        ),
        (maestrale_pb2.GenerateRequest(), COMPLETIONS, {"prompt": ""}, "INVALID_ARGUMENT"),
        (chat(), CHAT, {"messages": []}, "INVALID_ARGUMENT"),
        (chat(USER, USER), CHAT, {"messages": [USER, USER]}, "INVALID_ARGUMENT"),
    ],
)
def test_a_refusal_has_https_words(
    api: Api, call: Call, request_: Any, path: str, body: dict[str, Any], code: str
) -> None:
    error = refusal(call, request_)
    assert error.code() == grpc.StatusCode[code]
    assert error.details() == api.post(path, body).json()["error"]["message"]
    assert api.engine.journals == []


@pytest.mark.parametrize("letter", ["m", "\N{GRINNING FACE}"])
def test_a_refusal_of_a_long_text_is_short_enough_to_arrive(call: Call, letter: str) -> None:
    error = refusal(call, generate(model=letter * 4_000))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert MAX_DETAILS - 4 < len((error.details() or "").encode()) <= MAX_DETAILS


def test_before_a_head_is_ready_the_door_is_unavailable(api: Api, call: Call) -> None:
    api.engine.state = LOADING
    error = refusal(call, generate())
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "not ready yet" in (error.details() or "")
    assert dict(error.trailing_metadata() or ())["retry-after"] == "2"


def test_a_failure_within_an_answer_ends_it_with_its_reason(api: Api, call: Call) -> None:
    api.engine.script = fails_after(2, HeadUnavailableError("the head is gone"))

    async def ask(channel: grpc.aio.Channel) -> str:
        text = ""
        with pytest.raises(grpc.aio.AioRpcError, match="no head replica could finish") as caught:
            async for delta in Stub(channel).Generate(generate()):
                text += delta.text
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        return text

    assert call(ask) == "CC"


def test_an_unexpected_failure_tells_no_secret(api: Api, call: Call) -> None:
    api.engine.script = fails_after(0, ValueError("the password is hunter2"))
    error = refusal(call, generate())
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "hunter2" not in (error.details() or "")


def test_a_body_over_the_limit_is_refused(api: Api, call: Call) -> None:
    error = refusal(call, generate(text="x" * (api.settings.max_body_bytes + 1)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert api.engine.journals == []


@pytest.mark.parametrize(
    "method", [f"/{SERVICE}/Generate", f"/{SERVICE}/Chat", "/grpc.health.v1.Health/Check"]
)
def test_garbage_is_refused_without_a_traceback(
    call: Call, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def send(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(method)(b"\xff" * 9)
        return caught.value

    error = call(send)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == f"a message of 9 bytes for {method} does not parse"
    assert caplog.records == []


def test_requests_beyond_the_limit_are_refused(api: Api, call: Call) -> None:
    api.engine.script = never_ends

    async def crowd(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
        stub = Stub(channel)
        holding = [stub.Generate(generate()) for _ in range(api.settings.max_concurrent_requests)]
        for each in holding:
            await each.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(generate()).read()
        for each in holding:
            each.cancel()
        await until(lambda: api.num_in_progress == 0, "the places to be given back")
        return caught.value

    error = call(crowd)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "which is the limit" in (error.details() or "")


def test_cancelling_a_call_aborts_its_request(api: Api, call: Call) -> None:
    api.engine.script = never_ends

    async def leave(channel: grpc.aio.Channel) -> None:
        asked = Stub(channel).Generate(generate())
        await asked.read()
        asked.cancel()
        await until(lambda: api.engine.aborted, "the request to be aborted")

    call(leave)
    assert api.num_in_progress == 0
    assert api.num_requests(f"/{SERVICE}/Generate", 499) == 1


def test_a_deadline_ends_a_call_and_its_request(api: Api, call: Call) -> None:
    api.engine.script = never_ends

    async def wait(channel: grpc.aio.Channel) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in Stub(channel).Generate(generate(), timeout=0.5):
                pass
        await until(lambda: api.engine.aborted, "the request to be aborted")
        return caught.value.code()

    assert call(wait) == grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_call_in_progress_is_finished_when_the_door_closes(api: Api, tiny_folder: Path) -> None:
    goes_on = asyncio.Event()
    steps = api.engine.generate

    async def generate_slowly(journal: Any) -> AsyncIterator[tuple[int, ...]]:
        async for ids in steps(journal):
            yield ids
            await goes_on.wait()

    api.engine.generate = generate_slowly  # type: ignore[method-assign,assignment]

    async def stop_meanwhile() -> str:
        answerer = Answerer(api.engine, *text_side(tiny_folder), api.settings, api.metrics)
        door = AsyncExitStack()
        port = await door.enter_async_context(serving(answerer, api.metrics, "127.0.0.1:0"))
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            asyncio.timeout(DEADLINE_S),
        ):
            deltas = aiter(Stub(channel).Generate(generate(options={"max_tokens": 20})))
            text = (await anext(deltas)).text
            closing = asyncio.create_task(door.aclose())
            await asyncio.sleep(0)  # it has begun
            goes_on.set()
            text += "".join([delta.text async for delta in deltas])
            await closing
            return text

    assert asyncio.run(stop_meanwhile()) == " the wind"


async def named(channel: grpc.aio.Channel, request_id: str) -> str:
    """How a call with this id is named in its reply."""
    asked = Stub(channel).Generate(generate(), metadata=(("x-request-id", request_id),))
    metadata = await asked.initial_metadata()
    async for _ in asked:
        pass
    return str(metadata["x-request-id"])


def test_a_reply_bears_the_callers_request_id(api: Api, call: Call) -> None:
    assert call(lambda channel: named(channel, "mine-1")) == "mine-1"
    assert api.num_requests(f"/{SERVICE}/Generate", 200) == 1


@pytest.mark.parametrize("given", ["a b", "x" * 129, "<b>", 'a"b'])
def test_a_request_id_that_is_not_sane_is_replaced(call: Call, given: str) -> None:
    ids = {call(lambda channel: named(channel, given)) for _ in range(2)}
    assert len(ids) == 2
    assert all(each.isalnum() for each in ids)


def test_the_health_is_that_of_the_service(api: Api, call: Call) -> None:
    async def check(channel: grpc.aio.Channel) -> list[Any]:
        health = health_pb2_grpc.HealthStub(channel)
        found = []
        for state in (READY, LOADING):
            api.engine.state = state
            for name in ("", SERVICE):
                request = health_pb2.HealthCheckRequest(service=name)
                found.append((await health.Check(request)).status)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="other" * 3_000))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        return found

    assert call(check) == [SERVING, SERVING, NOT_SERVING, NOT_SERVING]


def test_watchers_of_the_health_are_told_of_a_change(api: Api, call: Call) -> None:
    api.engine.state = LOADING

    async def watch(channel: grpc.aio.Channel) -> list[Any]:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        found = [(await watching.read()).status]
        api.engine.state = READY
        found.append((await watching.read()).status)
        watching.cancel()
        return found

    assert call(watch) == [NOT_SERVING, SERVING]


def test_watchers_of_the_health_are_told_of_the_end_and_do_not_hold_it_up(
    api: Api, tiny_folder: Path
) -> None:
    answerer = Answerer(api.engine, *text_side(tiny_folder), api.settings, api.metrics)

    async def watch() -> list[Any]:
        async with asyncio.timeout(DEADLINE_S), AsyncExitStack() as door:
            port = await door.enter_async_context(serving(answerer, api.metrics, "127.0.0.1:0"))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                health = health_pb2_grpc.HealthStub(channel)
                watching = health.Watch(health_pb2.HealthCheckRequest())
                found = [(await watching.read()).status]
                closing = asyncio.create_task(door.aclose())
                found.append((await watching.read()).status)
                assert await watching.read() is grpc.aio.EOF
                await closing
        return found

    assert asyncio.run(watch()) == [SERVING, NOT_SERVING]


def test_a_key_is_asked_for_where_there_are_keys(api: Api, call: Call) -> None:
    api.admit(Access.with_keys([ApiKey("sesame")], allow_open=False, allowed_origins=()))
    error = refusal(call, generate())
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert "no API key" in (error.details() or "")
    for metadata in (("authorization", "Bearer sesame"), ("x-api-key", "sesame")):
        assert len(answer(call, generate(), metadata=(metadata,))) > 1
    one, other = api.engine.journals
    assert one.client == other.client


def test_without_keys_only_loopback_is_answered(api: Api, tiny_folder: Path) -> None:
    api.admit(Access(allow_open=False))

    async def ask(host: str) -> grpc.StatusCode:
        async with channel_to(api, tiny_folder, host) as channel, asyncio.timeout(DEADLINE_S):
            return await code_of(channel)

    assert asyncio.run(ask("127.0.0.1")) == grpc.StatusCode.OK
    assert asyncio.run(ask("0.0.0.0")) == grpc.StatusCode.PERMISSION_DENIED


def test_calls_are_encrypted_where_there_is_a_certificate(
    api: Api, tiny_folder: Path, tmp_path: Path
) -> None:
    write_certificates(tmp_path, roles=["head"])
    shown = credentials_of(tmp_path / "head.pem", tmp_path / "head-key.pem")
    trusted = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
    name = [("grpc.ssl_target_name_override", identity_of("head"))]
    answerer = Answerer(api.engine, *text_side(tiny_folder), api.settings, api.metrics)

    async def ask() -> tuple[grpc.StatusCode, grpc.StatusCode]:
        async with (
            serving(answerer, api.metrics, "127.0.0.1:0", credentials=shown) as port,
            grpc.aio.secure_channel(f"127.0.0.1:{port}", trusted, options=name) as encrypted,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as plain,
            asyncio.timeout(DEADLINE_S),
        ):
            return await code_of(encrypted), await code_of(plain)

    assert asyncio.run(ask()) == (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)


def test_a_certificate_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"certificate cannot be read: .*nowhere\.pem"):
        credentials_of(tmp_path / "nowhere.pem", tmp_path / "nowhere.pem")


def test_reflection_names_the_service(call: Call) -> None:
    async def reflect(channel: grpc.aio.Channel) -> set[str]:
        asked = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await asked.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await asked.read()
        await asked.done_writing()
        return {service.name for service in reply.list_services_response.service}

    assert {SERVICE, "grpc.health.v1.Health"} <= call(reflect)


def test_the_app_opens_the_door_while_it_runs(api: Api, tiny_folder: Path) -> None:
    port = free_port("127.0.0.1")
    beside = grpc_door(ServeConfig(grpc_port=port), api.metrics, api.access)
    app = create_app(api.engine, *text_side(tiny_folder), api.settings, api.metrics, beside=beside)

    async def run() -> grpc.StatusCode:
        async with (
            app.router.lifespan_context(app),
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            asyncio.timeout(DEADLINE_S),
        ):
            return await code_of(channel)

    assert asyncio.run(run()) == grpc.StatusCode.OK


def test_processes_of_one_machine_may_share_a_port(api: Api, tiny_folder: Path) -> None:
    answerer = Answerer(api.engine, *text_side(tiny_folder), api.settings, api.metrics)

    async def share() -> tuple[int, int]:
        async with (
            serving(answerer, api.metrics, "127.0.0.1:0") as one,
            serving(answerer, api.metrics, f"127.0.0.1:{one}") as other,
        ):
            return one, other

    one, other = asyncio.run(share())
    assert one == other
