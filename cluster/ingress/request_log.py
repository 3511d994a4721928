"""Per request: an id that the caller sees, a count and a time in the metrics, and an answer when
nothing else gave one. ASGI middleware, the outermost of ours.
"""

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.ingress.errors import error_response
from cluster.metrics import IngressMetrics

HUNG_UP = 499
"""Status of a request whose caller was gone before it had one."""
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id_of(given: str | None) -> str:
    """What a request is called: as its caller says, if that is sane."""
    return given if given and _SANE_ID.fullmatch(given) else uuid.uuid4().hex


class RequestLog:
    """Gives every reply its X-Request-Id (the caller's own, if sane) and observes it."""

    def __init__(self, app: ASGIApp, *, metrics: IngressMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope).get("x-request-id"))
        started = time.perf_counter()
        status = HUNG_UP  # what it stays when the caller does so before an answer
        is_gone = False

        async def tagged(message: Message) -> None:
            nonlocal status, is_gone
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            try:
                await send(message)
            except OSError:  # how ASGI says that the caller has hung up
                is_gone = True
                raise
            if message["type"] == "http.response.start":
                status = message["status"]

        try:
            await self._app(scope, receive, tagged)
        except Exception as error:
            if is_gone:
                return  # nobody is left to answer, and nothing is wrong
            if status != HUNG_UP:
                raise  # the answer has begun: Serve can only break it off
            await error_response(error, scope["path"])(scope, receive, tagged)
        finally:
            route = scope.get("route")  # unknown paths share one label
            endpoint = getattr(route, "path", "other")
            self._metrics.observe_request(endpoint, status, time.perf_counter() - started)
