"""Per request: a name in the log, a count and a time in the metrics, and an answer when nothing
else gave one. ASGI middleware, the outermost of ours but for what tells browsers that they may read
the answer.

The reply's X-Request-Id is not ours to give: Serve's proxy puts one on every reply.
"""

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.ingress.errors import error_response
from cluster.log import about_request
from cluster.metrics import IngressMetrics

HUNG_UP = 499
"""Status of a request whose caller was gone before it had one."""


class RequestLog:
    """Names and observes every request, and answers those that failed unexpectedly."""

    def __init__(self, app: ASGIApp, *, metrics: IngressMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Serve's proxy gives an id to those that come without
        with about_request(Headers(scope=scope).get("x-request-id", "")):
            await self._observe(scope, receive, send)

    async def _observe(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = HUNG_UP  # what it stays when the caller does so before an answer
        is_gone = False

        async def noted(message: Message) -> None:
            nonlocal status, is_gone
            try:
                await send(message)
            except OSError:  # how ASGI says that the caller has hung up
                is_gone = True
                raise
            if message["type"] == "http.response.start":
                status = message["status"]

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if is_gone:
                return  # nobody is left to answer, and nothing is wrong
            if status != HUNG_UP:
                raise  # the answer has begun: Serve can only break it off
            await error_response(error, scope["path"])(scope, receive, noted)
        finally:
            route = scope.get("route")  # unknown paths share one label
            endpoint = getattr(route, "path", "other")
            self._metrics.observe_request(endpoint, status, time.perf_counter() - started)
