"""One call of the API as plain data: what is sent, and how the answer is understood. No I/O."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx
from pydantic_core import to_json

from cluster.client.settings import Settings, checked_timeout
from cluster.schema import Reply

S = TypeVar("S")
A = TypeVar("A")
_OPTIONS = frozenset({"extra_headers", "extra_query", "extra_body", "timeout"})

RETRY_COUNT = "x-retry-count"
"""Header that tells the server how often a request was sent before."""


@dataclass(frozen=True, kw_only=True)
class Call(Generic[S, A]):
    """What to ask. S and A: what a blocking and an asynchronous client give for it."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, Any] = field(default_factory=dict)
    timeout: httpx.Timeout | None = None
    """None: the client's."""
    is_retried: bool = True

    def request(
        self, http: httpx.Client | httpx.AsyncClient, settings: Settings, num_retries: int
    ) -> httpx.Request:
        """The request to send, after so many that failed."""
        content, kind = None, {}
        if self.body is not None:
            content, kind = to_json(self.body), {"Content-Type": "application/json"}
        again = {RETRY_COUNT: str(num_retries)} if num_retries else {}
        # httpx's own names are merged whatever their case, ours must be, too
        headers = httpx.Headers({**kind, **settings.headers, **again})
        headers.update(self.headers)
        return http.build_request(
            self.method,
            settings.root + self.path,
            content=content,
            headers=headers,
            params=self.query or None,
            timeout=self.timeout or settings.timeout,
        )


@dataclass(frozen=True, kw_only=True)
class ReplyCall(Call[S, A]):
    """A call whose answer comes whole."""

    read: Callable[[httpx.Response], Any]
    """Raises APIError for an answer that is not the promised one."""


@dataclass(frozen=True, kw_only=True)
class StreamCall(Call[S, A]):
    """A call whose answer comes as a stream of chunks."""

    chunk: type[Reply]


def sent_as(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a call with a body, as `Call`'s fields."""
    body = {
        name: value for name, value in params.items() if name not in _OPTIONS and value is not None
    }
    body.update(params.get("extra_body") or {})
    return {"body": body, **options(params)}


def options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call, as `Call`'s fields."""
    asked: dict[str, Any] = {
        "headers": params.get("extra_headers") or {},
        "query": params.get("extra_query") or {},
    }
    if "timeout" in params:
        asked["timeout"] = checked_timeout(params["timeout"])
    return asked
