"""Every call that the SDK can make, as data. A client's methods are these, made by its connection.

So a method's parameters are written once, whoever makes the call: a blocking client or an
asynchronous one, for the reply or for the raw response.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, overload
from urllib.parse import quote

import httpx

from cluster.client import failures
from cluster.client.call import Call, ReplyCall, StreamCall, options, sent_as
from cluster.client.exposition import Sample, read_exposition
from cluster.client.params import (
    ChatParams,
    ClassifyParams,
    CompletionParams,
    DetokenizeParams,
    Options,
    TokenizeParams,
)
from cluster.client.reply import ReplyT, check_status, read_readiness, read_reply
from cluster.schema import (
    ChatCompletion,
    ChatCompletionChunk,
    Classification,
    Completion,
    Model,
    ModelList,
    Readiness,
    Text,
    Tokens,
)

if TYPE_CHECKING:
    from cluster.client.stream import AsyncStream, Stream

T = TypeVar("T")
Same = Call[T, T]
"""A call that gives every client the same."""


@overload
def complete(
    *, stream: Literal[False] = False, **params: Unpack[CompletionParams]
) -> Same[Completion]: ...


@overload
def complete(
    *, stream: Literal[True], **params: Unpack[CompletionParams]
) -> "Call[Stream[Completion], AsyncStream[Completion]]": ...


@overload
def complete(
    *, stream: bool, **params: Unpack[CompletionParams]
) -> "Call[Completion | Stream[Completion], Completion | AsyncStream[Completion]]": ...


def complete(*, stream: bool = False, **params: Unpack[CompletionParams]) -> Any:
    """Complete a prompt, or several at once.

    Choice `i` of prompt `p` has index `p * n + i`. What is left out is not sent, so the server's
    defaults hold; `cluster.schema.CompletionRequest` states them and the bounds. Raises APIError.
    """
    return _generation("/v1/completions", params, Completion, Completion, stream)


@overload
def answer(
    *, stream: Literal[False] = False, **params: Unpack[ChatParams]
) -> Same[ChatCompletion]: ...


@overload
def answer(
    *, stream: Literal[True], **params: Unpack[ChatParams]
) -> "Call[Stream[ChatCompletionChunk], AsyncStream[ChatCompletionChunk]]": ...


@overload
def answer(
    *, stream: bool, **params: Unpack[ChatParams]
) -> """Call[
    ChatCompletion | Stream[ChatCompletionChunk], ChatCompletion | AsyncStream[ChatCompletionChunk]
]""": ...


def answer(*, stream: bool = False, **params: Unpack[ChatParams]) -> Any:
    """Answer a conversation.

    A message is a dict with role and content, or the message of an earlier reply as it came. What
    is left out is not sent, so the server's defaults hold; `cluster.schema.ChatCompletionRequest`
    states them and the bounds. Raises APIError.
    """
    path = "/v1/chat/completions"
    return _generation(path, params, ChatCompletion, ChatCompletionChunk, stream)


def classify(**params: Unpack[ClassifyParams]) -> Same[Classification]:
    """Label a text, or several at once, with a model that classifies.

    use_activation: False for the score head's logits instead of probabilities. Raises APIError.
    """
    return _post("/v1/classify", params, Classification)


def tokenize(**params: Unpack[TokenizeParams]) -> Same[Tokens]:
    """Token ids of a text, or of a conversation in its chat template. Raises APIError."""
    return _post("/tokenize", params, Tokens)


def detokenize(**params: Unpack[DetokenizeParams]) -> Same[Text]:
    """Text of token ids; control tokens have none. Raises APIError."""
    return _post("/detokenize", params, Text)


def models(**params: Unpack[Options]) -> Same[ModelList]:
    """What the server serves. Raises APIError."""
    return _get("/v1/models", params, partial(read_reply, reply=ModelList))


def model(model: str, **params: Unpack[Options]) -> Same[Model]:
    """One model by its id. Raises NotFoundError if the server does not serve it."""
    # An id may hold a slash. Dots alone would be taken for a folder, and lead elsewhere.
    if not model.strip("."):
        raise ValueError(f"{model!r} is no model id; client.models.list() names those there are")
    path = f"/v1/models/{quote(model, safe='')}"
    return _get(path, params, partial(read_reply, reply=Model))


def status(**params: Unpack[Options]) -> Same[Readiness]:
    """How far the cluster is: phase, heads, workers. One that is not ready yet answers too.

    Never sent again: that it is not ready is an answer. Raises APIError.
    """
    return _get("/ready", params, read_readiness, is_retried=False)


def metrics(**params: Unpack[Options]) -> Same[list[Sample]]:
    """All metrics of the cluster, as they stand. Raises APIError."""
    return _get("/metrics", params, _read_metrics)


def _generation(
    path: str, params: Mapping[str, Any], reply: type[ReplyT], chunk: type[ReplyT], stream: bool
) -> Call[Any, Any]:
    if not stream:
        return _post(path, params, reply)
    return StreamCall(method="POST", path=path, chunk=chunk, **sent_as({**params, "stream": True}))


def _post(path: str, params: Mapping[str, Any], reply: type[ReplyT]) -> Same[ReplyT]:
    read = partial(read_reply, reply=reply)
    return ReplyCall(method="POST", path=path, read=read, **sent_as(params))


def _get(
    path: str, params: Mapping[str, Any], read: Any, *, is_retried: bool = True
) -> Call[Any, Any]:
    return ReplyCall(method="GET", path=path, read=read, is_retried=is_retried, **options(params))


def _read_metrics(response: httpx.Response) -> list[Sample]:
    check_status(response)
    try:
        return read_exposition(response.text)
    except ValueError as error:
        raise failures.no_metrics(response, error) from error
