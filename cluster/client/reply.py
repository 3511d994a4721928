"""What comes back: bodies and events to the classes of `cluster.schema`, or an error raised.

Takes responses that have been read. Pure; for blocking and asynchronous clients alike.
"""

from typing import TypeVar

import httpx
from pydantic import ValidationError

from cluster.client import failures
from cluster.errors import APIResponseValidationError
from cluster.schema import Readiness, Reply

ReplyT = TypeVar("ReplyT", bound=Reply)


def is_event_stream(response: httpx.Response) -> bool:
    content_type: str = response.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    return response.is_success and media_type == "text/event-stream"


def check_status(response: httpx.Response) -> None:
    """Raise APIStatusError for an error status, APIResponseValidationError for a redirect."""
    if response.is_error:
        raise failures.status_error(response)
    if not response.is_success:
        raise failures.redirected(response)


def check_stream(response: httpx.Response) -> None:
    """Raise as `check_status` does, and APIResponseValidationError for what is no event stream."""
    if not is_event_stream(response):
        check_status(response)
        raise failures.not_a_stream(response)


def read_reply(response: httpx.Response, reply: type[ReplyT]) -> ReplyT:
    """The body as the class it should be.

    Raises as `check_status` does, and APIResponseValidationError for a body of another shape.
    """
    check_status(response)
    return _parse(response, reply)


def read_readiness(response: httpx.Response) -> Readiness:
    """The body of GET /ready, which 200 and 503 carry alike.

    Raises as `read_reply` does; a 503 without that body, such as a proxy's, is an
    InternalServerError.
    """
    if response.status_code != 503:
        return read_reply(response, Readiness)
    try:
        return _parse(response, Readiness)
    except APIResponseValidationError as error:
        raise failures.status_error(response) from error


def read_chunk(response: httpx.Response, data: str, reply: type[ReplyT]) -> ReplyT:
    """The data of one event of a stream.

    Raises APIStreamError if it carries an error, APIResponseValidationError if it is of another
    shape.
    """
    try:
        chunk = reply.model_validate_json(data)
    except ValidationError as invalid:
        told = failures.any_json(data)
        if isinstance(told, dict) and (error := told.get("error")):
            raise failures.stream_failed(error, failures.request_id(response)) from None
        raise failures.wrong_shape(response, reply.__name__, data, invalid) from invalid
    chunk._request_id = failures.request_id(response)
    return chunk


def _parse(response: httpx.Response, reply: type[ReplyT]) -> ReplyT:
    try:
        parsed = reply.model_validate_json(response.content)
    except ValidationError as error:
        raise failures.wrong_shape(response, reply.__name__, response.content, error) from error
    parsed._request_id = failures.request_id(response)
    return parsed
