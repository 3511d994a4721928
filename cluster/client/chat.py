"""POST /v1/chat/completions: the next turn of a conversation."""

from collections.abc import Sequence
from typing import Any, Literal, overload

from cluster.client.connection import Connection
from cluster.client.request import Message, request_body
from cluster.client.stream import Stream
from cluster.schema import ChatCompletion, ChatCompletionChunk

PATH = "/v1/chat/completions"


class Chat:
    """`client.chat`."""

    def __init__(self, connection: Connection) -> None:
        self.completions = ChatCompletions(connection)


class ChatCompletions:
    """`client.chat.completions`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @overload
    def create(
        self,
        *,
        messages: Sequence[Message],
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        n: int | None = None,
        stream: Literal[False] = False,
        **extra: Any,
    ) -> ChatCompletion: ...

    @overload
    def create(
        self,
        *,
        messages: Sequence[Message],
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        n: int | None = None,
        stream: Literal[True],
        **extra: Any,
    ) -> Stream[ChatCompletionChunk]: ...

    @overload
    def create(
        self,
        *,
        messages: Sequence[Message],
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        n: int | None = None,
        stream: bool,
        **extra: Any,
    ) -> ChatCompletion | Stream[ChatCompletionChunk]: ...

    def create(
        self,
        *,
        messages: Sequence[Message],
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        n: int | None = None,
        stream: bool = False,
        **extra: Any,
    ) -> ChatCompletion | Stream[ChatCompletionChunk]:
        """Answer a conversation.

        A message is a dict with role and content, or the message of an earlier reply as it
        came. What is left out is not sent, so the server's defaults hold (`cluster.schema`
        states them and the bounds). extra: further fields of the request, sent as they are.
        Raises APIError.
        """
        body = request_body(
            extra,
            messages=messages,
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            n=n,
            stream=stream or None,
        )
        if stream:
            return self._connection.stream(PATH, body, ChatCompletionChunk)
        return self._connection.post(PATH, body, ChatCompletion)
