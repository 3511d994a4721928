"""Every failure as OpenAI's nested error object, or Anthropic's for those who speak its API, with
the right status and no traceback.
"""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cluster.errors import HeadUnavailableError, RequestError
from cluster.log import RequestLogger
from cluster.schema import ErrorBody, ErrorDetail
from cluster.schema.anthropic import AnthropicError, AnthropicErrorDetail
from model.errors import PromptError, SamplingError

logger = RequestLogger(logging.getLogger(__name__))

UNFINISHED = "no head replica could finish the request; try again later"
"""What a caller is told then; why is the operator's to know: it names hosts and their errors."""

ANTHROPIC_PATH = "/v1/messages"
"""Here and below it, callers speak Anthropic's API."""

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""By status; other failures are the caller's below 500, and ours above."""

_MAX_REPORTED = 5
"""Validation errors named in one answer."""

_MAX_SHOWN = 80
"""Characters of what a caller sent that an answer repeats."""


def as_request_error(error: Exception) -> RequestError:
    """What to tell the caller about any failure. What is no caller's fault is logged, not shown."""
    match error:
        case RequestError():
            return error
        case SamplingError():
            return RequestError(400, str(error), param=error.field)
        case PromptError():
            return RequestError(400, str(error), param="prompt")
        case HeadUnavailableError():
            logger.warning("a request is answered with 503: %s", error)
            headers = {"Retry-After": "1"}
            return RequestError(503, UNFINISHED, kind="service_unavailable", headers=headers)
        case RequestValidationError():
            return _of_validation(error)
        case HTTPException(status_code=status):
            kind = "not_found_error" if status == 404 else "invalid_request_error"
            return RequestError(status, str(error.detail), kind=kind, headers=error.headers)
        case _:
            logger.error("unexpected error", exc_info=error)
            return RequestError(500, "internal error; see the server's log", kind="server_error")


def error_body(error: RequestError) -> ErrorBody:
    """OpenAI's error object."""
    return ErrorBody(
        error=ErrorDetail(
            message=error.message, type=error.kind, param=error.param, code=error.code
        )
    )


def anthropic_body(error: RequestError) -> AnthropicError:
    """Anthropic's error object."""
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPES.get(error.status, other)
    return AnthropicError(error=AnthropicErrorDetail(type=kind, message=error.message))


def error_response(error: Exception, path: str) -> JSONResponse:
    """The whole answer to a request to this path that failed."""
    mapped = as_request_error(error)
    is_anthropic = path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")
    body = anthropic_body(mapped) if is_anthropic else error_body(mapped)
    return JSONResponse(body.model_dump(), mapped.status, mapped.headers)


def install(app: FastAPI) -> None:
    """Answer the errors that we know this way. The unexpected ones are RequestLog's: what the
    framework would do with those comes after the last middleware, where no status is counted.
    """

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, request.url.path)

    for kind in (
        RequestError,
        SamplingError,
        PromptError,
        HeadUnavailableError,
        RequestValidationError,
        HTTPException,
    ):
        app.add_exception_handler(kind, answer)


def _of_validation(error: RequestValidationError) -> RequestError:
    """The first few things that are wrong with a body, each with its place."""
    problems: dict[str, dict[str, Any]] = {}
    for item in error.errors():
        if item["type"] == "json_invalid":
            return RequestError(400, f"the body is not valid JSON: {item['ctx']['error']}")
        if item["loc"] == ("body",):
            return RequestError(
                400, "the body must be a JSON object, sent as Content-Type: application/json"
            )
        # after the top field come pydantic's names of union members, which tell a caller nothing
        field = _shown(str(item["loc"][1])) if len(item["loc"]) > 1 else "body"
        if field not in problems or _fit(item) > _fit(problems[field]):
            problems[field] = item
    fields = list(problems)[:_MAX_REPORTED]
    message = "; ".join(f"{field}: {_problem(problems[field])}" for field in fields)
    return RequestError(400, message, param=fields[0] if fields else None)


def _shown(given: str) -> str:
    """Its beginning, in characters that an answer can carry: JSON may hold half a surrogate."""
    start = given if len(given) <= _MAX_SHOWN else given[:_MAX_SHOWN] + "..."
    return start.encode(errors="backslashreplace").decode()


def _fit(item: dict[str, Any]) -> tuple[bool, int]:
    """How near a member of a union came before it failed: of the right type, then how deep."""
    return not item["type"].endswith("_type"), len(item["loc"])


def _problem(item: dict[str, Any]) -> str:
    shown = _shown(repr(item.get("input")))
    message = str(item["msg"]).removeprefix("Value error, ")
    return message if item["type"] in ("missing", "value_error") else f"{message}, not {shown}"
