"""Every error the SDK raises about an answer, or about there being none.

The one border between httpx's errors and those of `cluster.errors`. Pure: these functions build
an error, the caller raises it. For blocking and asynchronous clients alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from pydantic import ValidationError
from pydantic_core import from_json

from cluster.errors import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APIStreamError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    UnprocessableEntityError,
)

_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: RequestTooLargeError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}

_EXCERPT_CHARS = 200
_IS_IT_US = "Is it `maestrale serve` that listens there?"
_IS_IT_UP = (
    "Is `maestrale serve` running there? For another address set base_url or MAESTRALE_BASE_URL"
)


def transport_error(error: httpx.RequestError, request: httpx.Request) -> APIError:
    """No whole answer came."""
    server = f"{request.url.scheme}://{request.url.netloc.decode('ascii')}"
    if isinstance(error, httpx.ConnectTimeout):
        return APITimeoutError(f"no connection to {server}{_within(request, error)}. {_IS_IT_UP}")
    if isinstance(error, httpx.WriteTimeout):
        return APITimeoutError(
            f"{_call(request)} could not be sent{_within(request, error)}: the server does not "
            "read. Raise the client's timeout"
        )
    if isinstance(error, httpx.PoolTimeout):
        return APITimeoutError(
            f"{_call(request)} got no connection of the pool{_within(request, error)}: too many "
            "requests at once. Raise the client's timeout, or the pool's limits"
        )
    if isinstance(error, httpx.TimeoutException):
        return APITimeoutError(
            f"{_call(request)} gave no answer{_within(request, error)}. "
            "Raise the client's timeout, ask for fewer tokens, or stream"
        )
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        return APIConnectionError(f"no connection to {server} ({_cause(error)}). {_IS_IT_UP}")
    if isinstance(error, httpx.DecodingError):
        return APIResponseValidationError(
            f"{_call(request)}: the body cannot be decoded ({_cause(error)}). {_IS_IT_US}"
        )
    return APIConnectionError(
        f"{_call(request)}: the connection broke before the whole answer came ({_cause(error)}). "
        "The server may have done the work; its log says"
    )


@contextmanager
def mapped(request: httpx.Request) -> Iterator[None]:
    """Around reading an answer: httpx's errors leave as ours."""
    try:
        yield
    except httpx.RequestError as error:
        raise transport_error(error, request) from error


def status_error(response: httpx.Response) -> APIStatusError:
    """An answer with an error status: the server's own words if it sent OpenAI's error object."""
    status = response.status_code
    body = any_json(response.content)
    error = body.get("error") if isinstance(body, dict) else None
    fields = error_fields(error)
    message = fields["message"] or (
        f"{_call(response.request)} answered {status} {response.reason_phrase} without an error "
        f"object: {_excerpt(response.content)}. {_IS_IT_US}"
    )
    return _BY_STATUS.get(status, InternalServerError if status >= 500 else APIStatusError)(
        message,
        response=response,
        body=response.text if body is None else error or body,
        type=fields["type"],
        param=fields["param"],
        code=fields["code"],
    )


def redirected(response: httpx.Response) -> APIResponseValidationError:
    """An answer that is neither a success nor an error."""
    leads_to = response.headers.get("location", "nowhere")
    return APIResponseValidationError(
        f"{_call(response.request)} answered {response.status_code}, which leads to {leads_to} and "
        "is not followed: give the final address as base_url"
    )


def wrong_shape(
    response: httpx.Response, name: str, body: bytes | str, error: ValidationError
) -> APIResponseValidationError:
    """A body, or an event of a stream, that is no `name`."""
    return APIResponseValidationError(
        f"{_call(response.request)} answered {response.status_code} with what is not a {name} "
        f"({_first(error)}): {_excerpt(body)}. {_IS_IT_US}",
        request_id=request_id(response),
    )


def no_metrics(response: httpx.Response, error: ValueError) -> APIResponseValidationError:
    """A success that is no snapshot of metrics, where one was asked for."""
    return APIResponseValidationError(
        f"{_call(response.request)} answered {response.status_code} with what are no metrics "
        f"({error}). {_IS_IT_US}",
        request_id=request_id(response),
    )


def not_a_stream(response: httpx.Response) -> APIResponseValidationError:
    """A success that is no event stream, where one was asked for."""
    content_type = response.headers.get("content-type", "no content type")
    return APIResponseValidationError(
        f"{_call(response.request)} answered {response.status_code} with {content_type} where an "
        f"event stream was asked for: {_excerpt(response.content)}. {_IS_IT_US}",
        request_id=request_id(response),
    )


def stream_failed(error: Any, request_id: str | None = None) -> APIStreamError:
    """The error object of an event."""
    message = error_fields(error)["message"] or f"the stream failed: {error}"
    return APIStreamError(message, request_id=request_id)


def stream_broke_off(
    response: httpx.Response,
    num_chunks: int,
    error: httpx.RequestError | None,
    why_not_resumed: str | None = None,
) -> APIStreamError:
    """A stream that stopped before its end mark, by `error` if there is one.

    why_not_resumed: what came of going on with it.
    """
    if error is None:
        how = "the connection was closed"
    elif isinstance(error, httpx.TimeoutException):
        how = f"nothing came{_within(response.request, error)}"
    else:
        how = _cause(error)
    return APIStreamError(
        f"{_call(response.request)} (request id {request_id(response) or 'unknown'}) broke off "
        f"before [DONE], after {num_chunks} chunks: {how}. What came is not the whole completion"
        + (f", and it could not go on: {why_not_resumed}" if why_not_resumed else ""),
        request_id=request_id(response),
    )


def not_resumed(response: httpx.Response) -> APIStreamError:
    """A server that answers a request to go on with a stream as if it were a new one."""
    return APIStreamError(
        f"{_call(response.request)}: the server does not know how to go on with a stream that "
        "broke off, and would begin anew. What came is not the whole completion",
        request_id=request_id(response),
    )


def request_id(response: httpx.Response) -> str | None:
    value: str | None = response.headers.get("x-request-id")
    return value


def any_json(body: bytes | str) -> Any:
    """What a body holds, or None. Unlike the standard library's reader, no depth breaks this."""
    try:
        return from_json(body)
    except ValueError:
        return None


def error_fields(error: Any) -> dict[str, str | None]:
    """Fields of OpenAI's error object, as text.

    Generous, since proxies and other servers answer too: a bare string is the message, a number
    is as good a code as a name, and whatever is no object at all has no fields.
    """
    if isinstance(error, str):
        error = {"message": error}
    elif not isinstance(error, dict):
        error = {}
    values = {name: error.get(name) for name in ("message", "type", "param", "code")}
    return {name: None if value is None else str(value) for name, value in values.items()}


def _call(request: httpx.Request) -> str:
    return f"{request.method} {request.url}"


def _cause(error: httpx.RequestError) -> str:
    return f"{type(error).__name__}: {error}"


def _within(request: httpx.Request, error: httpx.TimeoutException) -> str:
    """The bound that was passed, which httpx keeps with each request; nothing if it was not ours.

    Without a bound of ours the system's own may pass, of a peer that was cut off.
    """
    phases: dict[type[httpx.TimeoutException], str] = {
        httpx.ConnectTimeout: "connect",
        httpx.WriteTimeout: "write",
        httpx.PoolTimeout: "pool",
    }
    timeout_s: float | None = request.extensions["timeout"][phases.get(type(error), "read")]
    return "" if timeout_s is None else f" within {timeout_s:g} s"


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def _excerpt(body: bytes | str) -> str:
    if isinstance(body, bytes):
        body = body[: 4 * _EXCERPT_CHARS].decode("utf-8", errors="replace")
    text = " ".join(body.split())
    if not text:
        return "an empty body"
    return repr(text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "...")
