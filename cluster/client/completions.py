"""POST /v1/completions: text from a prompt."""

from collections.abc import Sequence
from typing import Any, Literal, overload

from cluster.client.connection import Connection
from cluster.client.request import Prompt, request_body
from cluster.client.stream import Stream
from cluster.schema import Completion

PATH = "/v1/completions"


class Completions:
    """`client.completions`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @overload
    def create(
        self,
        *,
        prompt: Prompt,
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
    ) -> Completion: ...

    @overload
    def create(
        self,
        *,
        prompt: Prompt,
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
    ) -> Stream[Completion]: ...

    @overload
    def create(
        self,
        *,
        prompt: Prompt,
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
    ) -> Completion | Stream[Completion]: ...

    def create(
        self,
        *,
        prompt: Prompt,
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
    ) -> Completion | Stream[Completion]:
        """Complete a prompt, or several at once.

        What is left out is not sent, so the server's defaults hold (`cluster.schema` states
        them and the bounds). extra: further fields of the request, sent as they are. Choice
        `i` of prompt `p` has index `p * n + i`. Raises APIError.
        """
        body = request_body(
            extra,
            prompt=prompt,
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
            return self._connection.stream(PATH, body, Completion)
        return self._connection.post(PATH, body, Completion)
