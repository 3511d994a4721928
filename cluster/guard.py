"""At a gRPC server's door: who may come in, and what is refused, counted and logged rarely.

And its counterpart: how a caller shows the shared token. Costs nothing per message of a stream.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from cluster.log import RareWarnings
from cluster.security import CALLERS, ROLES, Role, Security, identity_of

logger = logging.getLogger(__name__)

_TOKEN_KEY = "maestrale-token"
_METRICS = "Metrics"
_LENDER = "/maestrale.lender.v1.Lender/"
"""Who lacks the files of the model may be anybody."""

Deserializer = Callable[[bytes], Any]


class Guard(grpc.ServerInterceptor):  # type: ignore[misc]
    """Lets in who proves to belong to the cluster, in the right role. Thread-safe.

    Reasons for refusals: no_token, wrong_token, wrong_role, handshake, garbage, unknown_method.
    """

    def __init__(
        self,
        security: Security,
        observe_refusal: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """observe_refusal: called with the reason of every refusal, from any thread."""
        self._security = security
        self._observe = observe_refusal
        self._warnings = RareWarnings(logger)
        self._handshakes = _Handshakes(clock)

    def begin_handshake(self) -> None:
        """A connection has begun its TLS handshake. Called by gRPC, from any thread."""
        for _ in range(self._handshakes.begin()):
            self._note("handshake", "a peer did not get through the TLS handshake, or never called")

    def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        """The method's handler behind the checks, or one that only refuses. Called by gRPC."""
        method = str(details.method)
        if self._security.token is not None:
            given = dict(details.invocation_metadata).get(_TOKEN_KEY)
            if given is None:
                return self._refusing(method, "no_token", "this cluster's shared token is missing")
            if not _is_same(given, self._security.token):
                return self._refusing(method, "wrong_token", "this is not our cluster's token")
        handler = continuation(details)
        if handler is None:
            self._note("unknown_method", f"somebody called {method}, which is not here")
            return None
        kind = _kind_of(handler)
        behaviour = getattr(handler, kind)

        def guarded(request: Any, context: grpc.ServicerContext) -> Any:
            if self._security.tls is not None:
                self._handshakes.succeed(context.peer())
                self._check_role(self._security.tls.role, method, context)
            deserialize = handler.request_deserializer
            if deserialize is not None and handler.request_streaming:
                request = self._all_parsed(method, deserialize, request, context)
            elif deserialize is not None:
                request = self._parsed(method, deserialize, request, context)
                if request is None:
                    context.abort(
                        grpc.StatusCode.INTERNAL, f"a message for {method} does not parse"
                    )
            return behaviour(request, context)

        return getattr(grpc, f"{kind}_rpc_method_handler")(
            guarded, response_serializer=handler.response_serializer
        )

    def _check_role(self, own: Role, method: str, context: grpc.ServicerContext) -> None:
        """Abort the call unless the peer's certificate lets it call this method here."""
        is_for_all = method.endswith(f"/{_METRICS}") or method.startswith(_LENDER)
        wanted = ROLES if is_for_all else (CALLERS[own],)
        names = context.auth_context().get("x509_subject_alternative_name", [])
        shown = [name.decode("utf-8", errors="replace") for name in names]
        if not {identity_of(role) for role in wanted} & set(shown):
            self._refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                "wrong_role",
                f"a {own} takes {method} from {' or '.join(wanted)}, not from {shown}",
            )

    def _refusing(self, method: str, reason: str, message: str) -> grpc.RpcMethodHandler:
        """A handler that refuses before it reads a message, whatever the method's kind."""

        def refuse(_messages: Iterator[bytes], context: grpc.ServicerContext) -> NoReturn:
            code = grpc.StatusCode.UNAUTHENTICATED
            self._refuse(context, code, reason, f"{method} refused: {message}")

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _refuse(
        self, context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, message: str
    ) -> NoReturn:
        self._note(reason, f"{context.peer()}: {message}")
        context.abort(code, message)
        raise AssertionError("abort raises")

    def _parsed(
        self, method: str, deserialize: Deserializer, data: bytes, context: grpc.ServicerContext
    ) -> Any:
        """A message, or None, after which the call ends with INTERNAL and is counted.

        Not left to gRPC, whose server keeps some 16 KB for ever of each call that it ends so.
        """
        try:
            return deserialize(data)
        except DecodeError:
            message = f"a message of {len(data)} bytes for {method} does not parse"
            self._note("garbage", f"{context.peer()}: {message}")
            context.set_code(grpc.StatusCode.INTERNAL)
            context.set_details(message)
            return None

    def _all_parsed(
        self,
        method: str,
        deserialize: Deserializer,
        stream: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> Iterator[Any]:
        """The messages of a stream, up to the first that does not parse."""
        for data in stream:
            message = self._parsed(method, deserialize, data, context)
            if message is None:
                return
            yield message

    def _note(self, reason: str, message: str) -> None:
        self._observe(reason)
        self._warnings.warn(reason, message)


class _Handshakes:
    """TLS handshakes that have begun, and the peers that came to call. Thread-safe.

    gRPC tells of a handshake's beginning and of calls, but not of a handshake that failed: that is
    one after which nobody new calls. All our processes call as soon as they are connected.
    """

    GRACE_S = 20.0
    MAX_PEERS = 1_024
    """Remembered, the newest; many more than are connected at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: deque[float] = deque()
        """When they began, of those after which nobody has called yet."""
        self._peers: dict[str, None] = {}

    def begin(self) -> int:
        """Note one more; returns how many earlier ones have come to nothing since the last."""
        now = self._clock()
        num_failed = 0
        with self._lock:
            while self._open and now - self._open[0] > self.GRACE_S:
                self._open.popleft()
                num_failed += 1
            self._open.append(now)
        return num_failed

    def succeed(self, peer: str) -> None:
        """A peer calls: if it is new, then a handshake has led to it."""
        with self._lock:
            if peer in self._peers:
                return
            self._peers[peer] = None
            if len(self._peers) > self.MAX_PEERS:
                del self._peers[next(iter(self._peers))]
            if self._open:
                self._open.popleft()


class WithToken(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """Shows the token with each call of a blocking channel."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_with_token(details, self._token), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(_with_token(details, self._token), request)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(_with_token(details, self._token), requests)


def aio_interceptors(token: str) -> list[grpc.aio.ClientInterceptor]:
    """What shows the token with each call of an asyncio channel, which wants one for each kind."""
    return [_UnaryWithToken(token), _StreamWithToken(token)]


class _UnaryWithToken(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(_with_token(details, self._token), request)


class _StreamWithToken(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await continuation(_with_token(details, self._token), requests)


def _with_token(details: Any, token: str) -> grpc.aio.ClientCallDetails:
    """A call's details with the token among its metadata; good for both kinds of channels."""
    return grpc.aio.ClientCallDetails(
        method=details.method,
        timeout=details.timeout,
        metadata=grpc.aio.Metadata(*(details.metadata or ()), (_TOKEN_KEY, token)),
        credentials=details.credentials,
        wait_for_ready=details.wait_for_ready,
    )


def _is_same(given: str | bytes, token: str) -> bool:
    """In a time that does not tell how much of it was right."""
    data = given.encode() if isinstance(given, str) else given
    return secrets.compare_digest(data, token.encode())


def _kind_of(handler: grpc.RpcMethodHandler) -> str:
    """Such as unary_stream: one request, a stream of responses."""
    sides = (handler.request_streaming, handler.response_streaming)
    return "_".join("stream" if is_stream else "unary" for is_stream in sides)
