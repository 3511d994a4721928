"""Every error that `cluster` raises on purpose.

    MaestraleError
    ├── ConfigurationError        a setting or flag is wrong; says which and what to do
    ├── PlacementError            the experts cannot be placed on the workers there are
    ├── ManifestError             weights are not those that were loaded first
    ├── StartError                the service cannot get ready, and why
    ├── WireError                 bytes from a peer break the protocol
    ├── HandshakeError            a peer speaks another version or serves another model
    ├── ExpertsUnavailableError   an expert worker did not answer, answered wrongly or is gone
    │   └── CallRefusedError      ... or cannot take a call now, and is well otherwise
    ├── ExpertFailedError         an expert worker, and any other asked, failed to compute a call
    ├── LenderError               another node did not give what was asked of a checkpoint's files
    ├── FilesUnavailableError     a checkpoint is not on this node, and none could give it
    ├── BenchError                what a benchmark measures failed, so there is no number
    ├── HeadUnavailableError      no head replica can take or finish a request
    │   ├── HeadLostError         the stream to the head broke, or fell silent
    │   ├── HeadDrainsError       the head is about to stop, and another can go on
    │   └── HeadFailedError       the head says that it could not compute the request
    ├── RequestError              what the ingress answers a caller: HTTP status and OpenAI's body
    └── APIError                  what the SDK raises
        ├── APIConnectionError    no whole answer came
        │   └── APITimeoutError   ... in time
        ├── APIResponseValidationError   an answer came that is not what the API promises
        ├── APIStreamError        the stream said that it failed, or broke off
        └── APIStatusError        the answer was an error; one class per status:
            BadRequestError 400, AuthenticationError 401, PermissionDeniedError 403,
            NotFoundError 404, ConflictError 409, RequestTooLargeError 413,
            UnprocessableEntityError 422, RateLimitError 429, InternalServerError 500 and above

The SDK's names are those of the openai package where they mean the same.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx


class MaestraleError(Exception):
    """Base of them all."""


class ConfigurationError(MaestraleError):
    """A setting or flag is wrong."""


class PlacementError(MaestraleError):
    """The experts cannot be placed on the workers there are."""


class ManifestError(MaestraleError):
    """Weights are not those that the checkpoint's manifest says were loaded first."""


class StartError(MaestraleError):
    """The service cannot get ready; a worker or head said why."""


class WireError(MaestraleError):
    """Bytes from a peer break the protocol. Raised before any of them is used."""


class HandshakeError(MaestraleError):
    """A peer speaks another protocol version or serves another model."""


class ExpertsUnavailableError(MaestraleError):
    """An expert worker did not answer in time, answered wrongly or is gone."""


class CallRefusedError(ExpertsUnavailableError):
    """An expert worker does not hold what is asked for, or has too much to do already."""


class ExpertFailedError(MaestraleError):
    """An expert worker failed to compute a call. Another copy is asked once, if there is one."""


class LenderError(MaestraleError):
    """A lender did not give what it was asked for. Another may."""


class FilesUnavailableError(MaestraleError, OSError):
    """A checkpoint is not on this node, and no other could give its files. An OSError, since it is
    raised where files are read.
    """


class BenchError(MaestraleError):
    """What a benchmark measures failed."""


class HeadUnavailableError(MaestraleError):
    """No head replica can take a request, or the one that had it is gone."""


class HeadLostError(HeadUnavailableError):
    """The stream to a head broke or fell silent. Another head can go on with its requests."""


class HeadDrainsError(HeadUnavailableError):
    """A head is about to stop, and there is another that can go on with its requests."""


class HeadFailedError(HeadUnavailableError):
    """A head says that it could not compute a request."""


class RequestError(MaestraleError):
    """What the ingress answers a caller instead of a completion.

    status: HTTP status. kind: OpenAI's `error.type`. param: the field at fault.
    headers: sent along, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class APIError(MaestraleError):
    """Base of what the SDK raises. request_id: the server's X-Request-Id, if an answer came."""

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id


class APIConnectionError(APIError):
    """The server could not be reached, or the connection broke before the whole answer came."""


class APITimeoutError(APIConnectionError):
    """No answer within the timeout."""


class APIResponseValidationError(APIError):
    """An answer that is not what the API promises: something else listens there."""


class APIStreamError(APIError):
    """The stream carried an error event, or ended without its end mark and could not go on."""


class APIStatusError(APIError):
    """The server answered with an error status.

    body is OpenAI's error object, whose type, param and code these are; the whole answer if it
    held none.
    """

    def __init__(
        self,
        message: str,
        *,
        response: "httpx.Response",
        body: object,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, request_id=response.headers.get("x-request-id"))
        self.response = response
        self.status_code = response.status_code
        self.body = body
        self.type = type
        self.param = param
        self.code = code


class BadRequestError(APIStatusError):
    """400"""


class AuthenticationError(APIStatusError):
    """401"""


class PermissionDeniedError(APIStatusError):
    """403"""


class NotFoundError(APIStatusError):
    """404"""


class ConflictError(APIStatusError):
    """409"""


class RequestTooLargeError(APIStatusError):
    """413"""


class UnprocessableEntityError(APIStatusError):
    """422"""


class RateLimitError(APIStatusError):
    """429"""


class InternalServerError(APIStatusError):
    """500 and above"""
