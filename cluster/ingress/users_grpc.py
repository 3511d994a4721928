"""The users' gRPC door (protos/maestrale.proto): Generate and Chat, health and reflection.

Requests become the bodies that HTTP takes, so bounds, defaults and messages of errors are the same.
It runs on the ASGI app's event loop, over the same Answerer: both doors share one limit.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import ValidationError

from cluster.errors import ConfigurationError
from cluster.ingress.answerer import Answerer
from cluster.ingress.auth import ANYBODY, Access, key_in
from cluster.ingress.clients import client_key
from cluster.ingress.door import invalid
from cluster.ingress.errors import as_request_error
from cluster.ingress.prepare import Work
from cluster.ingress.request_log import HUNG_UP
from cluster.ingress.text import TextDelta
from cluster.log import RequestLogger, about_request
from cluster.metrics import IngressMetrics
from cluster.network import is_loopback
from cluster.schema import ChatCompletionRequest, CompletionRequest, ModelRequest
from protos import maestrale_pb2, maestrale_pb2_grpc

logger = RequestLogger(logging.getLogger(__name__))

Body = TypeVar("Body", bound=ModelRequest)

SERVICE = maestrale_pb2.DESCRIPTOR.services_by_name["Maestrale"].full_name

MAX_DETAILS = 1_000
"""Bytes of an error's text. gRPC sends it as metadata, of which callers take 8 KiB, and bytes that
are not ASCII as three each."""

HEALTH_PERIOD_S = 1.0
"""How often watchers of the health are told of a change."""

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""By HTTP status; INTERNAL for others."""

_FINISH = {
    None: maestrale_pb2.FINISH_NONE,
    "stop": maestrale_pb2.FINISH_STOP,
    "length": maestrale_pb2.FINISH_LENGTH,
}


def credentials_of(certificate: Path, key: Path) -> grpc.ServerCredentials:
    """What callers see of us by TLS, of a certificate chain and its private key, PEM files.

    Raises ConfigurationError when one of them cannot be read.
    """
    try:
        return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    except OSError as error:
        raise ConfigurationError(f"gRPC's certificate cannot be read: {error}") from error


@asynccontextmanager
async def serving(
    answerer: Answerer,
    metrics: IngressMetrics,
    address: str,
    *,
    access: Access = ANYBODY,
    credentials: grpc.ServerCredentials | None = None,
    drain_s: float = 10.0,
) -> AsyncIterator[int]:
    """Serve at an address until the block is left; gives the port. Several processes of one machine
    may serve at the same: the kernel hands each connection to one of them.

    address:     IP address and port; port 0 takes a free one.
    access:      who may ask. Health and reflection are for everybody, as /health is.
    credentials: None serves in the clear.
    drain_s:     how long calls may go on when the block is left.
    Raises ConfigurationError when nothing can listen there.
    """
    server = grpc.aio.server(
        interceptors=[_Parser()],
        options=[
            ("grpc.max_receive_message_length", answerer.settings.max_body_bytes),
            # A caller that is cut off answers no ping: its requests then end.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ],
    )
    maestrale_pb2_grpc.add_MaestraleServicer_to_server(
        UsersDoor(answerer, metrics, access, is_local=is_loopback(_host_of(address))), server
    )
    told_health = _Health(answerer)
    health_pb2_grpc.add_HealthServicer_to_server(told_health, server)
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        port = (
            server.add_insecure_port(address)
            if credentials is None
            else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        raise ConfigurationError(f"gRPC cannot listen on {address}: {error}") from error
    await server.start()
    logger.info("gRPC listens on %s", address)
    try:
        yield port
    finally:
        told_health.end()
        await server.stop(drain_s)


class UsersDoor(maestrale_pb2_grpc.MaestraleServicer):
    """The calls. Owned by the event loop.

    They write instead of yielding: a cancelled call ends here and now, and its request with it,
    whereas a generator would wait for the garbage collector.
    """

    def __init__(
        self, answerer: Answerer, metrics: IngressMetrics, access: Access, *, is_local: bool
    ) -> None:
        """is_local: whether only this machine can reach the door."""
        self._answerer = answerer
        self._metrics = metrics
        self._access = access
        self._is_local = is_local

    async def Generate(  # noqa: N802 (gRPC's name)
        self, request: maestrale_pb2.GenerateRequest, context: Any
    ) -> None:
        """Continue a prompt."""

        async def work(client: Callable[[ModelRequest], str]) -> Work:
            fields = _fields(request)
            prompt = fields.pop(request.WhichOneof("prompt") or "", "")
            fields["prompt"] = prompt if isinstance(prompt, str) else prompt.get("token_ids", [])
            body = _checked(CompletionRequest, fields)
            return await self._answerer.completion(body, client(body))

        await self._answer(context, "Generate", work)

    async def Chat(  # noqa: N802
        self, request: maestrale_pb2.ChatRequest, context: Any
    ) -> None:
        """Answer a conversation."""

        async def work(client: Callable[[ModelRequest], str]) -> Work:
            fields = _fields(request)
            fields["messages"] = [
                {"role": message.role, "content": message.content} for message in request.messages
            ]
            body = _checked(ChatCompletionRequest, fields)
            return await self._answerer.chat(body, client(body))

        await self._answer(context, "Chat", work)

    async def _answer(
        self,
        context: Any,
        method: str,
        work_for: Callable[[Callable[[ModelRequest], str]], Awaitable[Work]],
    ) -> None:
        """One call, with its id, which over HTTP Serve gives, and a line in the metrics."""
        given = dict(context.invocation_metadata() or ())
        request_id = _request_id_of(given.get("x-request-id"))
        with about_request(request_id):
            await self._answer_named(context, method, work_for, given, request_id)

    async def _answer_named(
        self,
        context: Any,
        method: str,
        work_for: Callable[[Callable[[ModelRequest], str]], Awaitable[Work]],
        given: dict[str, Any],
        request_id: str,
    ) -> None:
        started, status = time.perf_counter(), HUNG_UP
        try:
            await context.send_initial_metadata((("x-request-id", request_id),))
            key = key_in(given)
            refused = self._access.refusal(key, self._is_local)
            if refused is not None:
                raise refused
            bearer = None if key is None else f"Bearer {key}"
            work = await work_for(lambda body: client_key(bearer, body.user))
            num_tokens = 0
            async with aclosing(self._answerer.deltas(work)) as deltas:
                async for _, delta in deltas:
                    num_tokens += len(delta.token_ids)
                    await context.write(_delta(work, delta, num_tokens))
            status = 200
        except grpc.aio.BaseError as error:
            logger.info("a caller is gone: %s", error)
        except Exception as error:
            refusal = as_request_error(error)
            status = refusal.status
            code = _CODES.get(status, grpc.StatusCode.INTERNAL)
            trailers = tuple((key.lower(), value) for key, value in refusal.headers.items())
            await context.abort(code, _details(refusal.message), trailers)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.observe_request(f"/{SERVICE}/{method}", status, seconds)


class _Parser(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # untyped
    """Refuses a request that does not parse. gRPC itself would log a traceback for each."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The same handler, parsing by itself. Called by gRPC."""
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        behave = handler.unary_stream or handler.unary_unary

        async def parse_and_behave(data: bytes, context: Any) -> Any:
            try:
                request = handler.request_deserializer(data)
            except DecodeError:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"a message of {len(data)} bytes for {details.method} does not parse",
                )
            return await behave(request, context)

        kind = "unary_stream" if handler.response_streaming else "unary_unary"
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            parse_and_behave, response_serializer=handler.response_serializer
        )


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    """The standard health service: serving while a head can answer and the door is open."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._ended = asyncio.Event()

    def end(self) -> None:
        """Serve no more: tell the watchers so, and let them go, for whom draining would wait."""
        self._ended.set()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", SERVICE):
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                _details(f"there is {SERVICE}, no service {request.service!r}"),
            )
        return self._response(request.service)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> None:
        told = None
        while True:
            response = self._response(request.service)
            if response != told:
                await context.write(response)
                told = response
            if self._ended.is_set():
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(HEALTH_PERIOD_S):
                    await self._ended.wait()

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in ("", SERVICE):
            status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        elif self._answerer.engine.readiness().ready and not self._ended.is_set():
            status = health_pb2.HealthCheckResponse.SERVING
        else:
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=status)


def _request_id_of(given: str | None) -> str:
    """What a call is named: as its caller says, if that is sane."""
    return given if given and _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _details(message: str) -> str:
    """As much of an error's text as is sure to arrive."""
    return message.encode(errors="replace")[:MAX_DETAILS].decode(errors="ignore")


def _host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _fields(request: Message) -> dict[str, Any]:
    """Those of a body over HTTP: of the request those that are set, its options among them."""
    fields: dict[str, Any] = MessageToDict(request, preserving_proto_field_name=True)
    return {**fields.pop("options", {}), **fields}


def _checked(kind: type[Body], fields: dict[str, Any]) -> Body:
    """The body. Raises what FastAPI raises for one that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid(error, {}) from error


def _delta(work: Work, delta: TextDelta, num_tokens: int) -> maestrale_pb2.Delta:
    """num_tokens: of the answer so far, with these."""
    message = maestrale_pb2.Delta(
        text=delta.text, token_ids=delta.token_ids, finish=_FINISH[delta.finish]
    )
    if isinstance(delta.stop_reason, str):
        message.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        message.stop_token_id = delta.stop_reason
    if delta.finish is not None:
        usage = work.usage(num_tokens)
        details = usage.prompt_tokens_details
        message.usage.prompt_tokens = usage.prompt_tokens
        message.usage.completion_tokens = usage.completion_tokens
        message.usage.cached_tokens = details.cached_tokens if details else 0
    return message
