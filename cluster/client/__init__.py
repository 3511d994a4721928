"""The SDK: a typed client of a Maestrale server.

    from cluster.client import Client

    with Client() as client:
        reply = client.completions.create(prompt="The wind", max_tokens=8)
        for chunk in client.chat.completions.create(messages=[...], stream=True):
            ...

`AsyncClient` has the same methods for asyncio. Replies are the classes of `cluster.schema`, errors
those under `APIError`. Names are openai's where they mean the same.
Needs httpx and pydantic; neither torch, Ray nor gRPC.
"""

from cluster.client import lean  # noqa: F401  # before whatever else imports httpx
from cluster.client.client import AsyncClient, Client
from cluster.client.exposition import Sample
from cluster.client.response import AsyncStreamedResponse, RawResponse, StreamedResponse
from cluster.client.stream import AsyncStream, Stream
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

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIResponseValidationError",
    "APIStatusError",
    "APIStreamError",
    "APITimeoutError",
    "AsyncClient",
    "AsyncStream",
    "AsyncStreamedResponse",
    "AuthenticationError",
    "BadRequestError",
    "Client",
    "ConflictError",
    "InternalServerError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RawResponse",
    "RequestTooLargeError",
    "Sample",
    "Stream",
    "StreamedResponse",
    "UnprocessableEntityError",
]
