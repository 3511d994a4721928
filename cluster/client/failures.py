"""Every error the SDK raises about an answer, or about there being none.

The one border between httpx's errors and those of `cluster.errors`. Pure: these functions build
an error, the caller raises it. For blocking and asynchronous clients alike.
"""

from typing import Any

import httpx
from pydantic import TypeAdapter, ValidationError

from cluster.errors import (
    APIConnectionError,
    APIError,
    APIResponseError,
    APIStatusError,
    APIStreamError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    UnprocessableEntityError,
)

JSON: TypeAdapter[Any] = TypeAdapter(Any)
"""Reads any JSON; unlike the standard library's, a body nested too deep is a ValidationError."""

_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
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
        connect_s = _timeout_s(request, "connect")
        return APITimeoutError(f"no connection to {server} within {connect_s:g} s. {_IS_IT_UP}")
    if isinstance(error, httpx.TimeoutException):
        return APITimeoutError(
            f"{_call(request)} gave no answer in {_timeout_s(request, 'read'):g} s. "
            "Raise the client's timeout, ask for fewer tokens, or stream"
        )
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        return APIConnectionError(f"no connection to {server} ({_cause(error)}). {_IS_IT_UP}")
    if isinstance(error, httpx.DecodingError):
        return APIResponseError(
            f"{_call(request)}: the body cannot be decoded ({_cause(error)}). {_IS_IT_US}"
        )
    return APIConnectionError(
        f"{_call(request)}: the connection broke before the whole answer came ({_cause(error)}). "
        "The server may have done the work; its log says"
    )


def status_error(response: httpx.Response) -> APIStatusError:
    """An answer with an error status: the server's own words if it sent OpenAI's error object."""
    status = response.status_code
    try:
        body = JSON.validate_json(response.content)
    except ValidationError:
        body = None
    fields = error_fields(body.get("error") if isinstance(body, dict) else None)
    message = fields["message"] or (
        f"{_call(response.request)} answered {status} {response.reason_phrase} without an error "
        f"object: {_excerpt(response.content)}. {_IS_IT_US}"
    )
    return _BY_STATUS.get(status, InternalServerError if status >= 500 else APIStatusError)(
        message,
        status_code=status,
        kind=fields["type"],
        param=fields["param"],
        code=fields["code"],
        request_id=request_id(response),
    )


def redirected(response: httpx.Response) -> APIResponseError:
    """An answer that is neither a success nor an error."""
    leads_to = response.headers.get("location", "nowhere")
    return APIResponseError(
        f"{_call(response.request)} answered {response.status_code}, which leads to {leads_to} and "
        "is not followed: give the final address as base_url"
    )


def wrong_shape(
    response: httpx.Response, name: str, body: bytes | str, error: ValidationError
) -> APIResponseError:
    """A body, or an event of a stream, that is no `name`."""
    return APIResponseError(
        f"{_call(response.request)} answered {response.status_code} with what is not a {name} "
        f"({_first(error)}): {_excerpt(body)}. {_IS_IT_US}"
    )


def not_a_stream(response: httpx.Response) -> APIResponseError:
    """A success that is no event stream, where one was asked for."""
    content_type = response.headers.get("content-type", "no content type")
    return APIResponseError(
        f"{_call(response.request)} answered {response.status_code} with {content_type} where an "
        f"event stream was asked for: {_excerpt(response.content)}. {_IS_IT_US}"
    )


def stream_failed(error: Any) -> APIStreamError:
    """The error object of an event."""
    return APIStreamError(error_fields(error)["message"] or f"the stream failed: {error}")


def stream_broke_off(
    response: httpx.Response, num_chunks: int, error: httpx.RequestError | None
) -> APIStreamError:
    """A stream that stopped before its end mark, by `error` if there is one."""
    if error is None:
        how = "the connection was closed"
    elif isinstance(error, httpx.TimeoutException):
        how = f"nothing came for {_timeout_s(response.request, 'read'):g} s"
    else:
        how = _cause(error)
    return APIStreamError(
        f"{_call(response.request)} (request id {request_id(response) or 'unknown'}) broke off "
        f"before [DONE], after {num_chunks} chunks: {how}. What came is not the whole completion"
    )


def request_id(response: httpx.Response) -> str | None:
    value: str | None = response.headers.get("x-request-id")
    return value


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


def _timeout_s(request: httpx.Request, phase: str) -> float:
    """The bound in force for `connect` or `read`; httpx keeps it with each request."""
    timeout_s: float = request.extensions["timeout"][phase]
    return timeout_s


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
