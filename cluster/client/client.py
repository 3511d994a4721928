"""`Client`: the SDK's front door. Knows no HTTP; what it calls does."""

import os
from types import TracebackType
from typing import Any, Self

import httpx

from cluster.client.chat import Chat
from cluster.client.completions import Completions
from cluster.client.connection import Connection
from cluster.client.models import Models
from cluster.client.reply import check_status, read_readiness
from cluster.client.request import DEFAULT_TIMEOUT_S, Prompt, request_body, settings
from cluster.schema import Classification, Readiness


class Client:
    """A Maestrale server, seen from Python. Blocking; safe to share between threads.

    base_url:  with or without `/v1`; else MAESTRALE_BASE_URL, else http://127.0.0.1:8000.
    api_key:   else MAESTRALE_API_KEY, else none is sent; "" sends none in any case.
    timeout:   seconds without a byte from the server after which a call fails. A connection
               has 5 s to come about.
    transport: httpx's, in place of the network, for tests.

    Raises ConfigurationError if one of these makes no sense. Close it, or use it by `with`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        checked = settings(base_url=base_url, api_key=api_key, timeout=timeout, environ=os.environ)
        self._connection = Connection(checked, transport)
        self.completions = Completions(self._connection)
        self.chat = Chat(self._connection)
        self.models = Models(self._connection)

    @property
    def base_url(self) -> str:
        """The server's address, without `/v1`."""
        return self._connection.root

    def classify(
        self,
        *,
        input: Prompt,
        model: str | None = None,
        use_activation: bool | None = None,
        **extra: Any,
    ) -> Classification:
        """Label a text, or several at once, with a model that classifies.

        use_activation: False for the score head's logits instead of probabilities.
        extra: further fields of the request, sent as they are. Raises APIError.
        """
        body = request_body(extra, input=input, model=model, use_activation=use_activation)
        return self._connection.post("/v1/classify", body, Classification)

    def ready(self) -> Readiness:
        """How far the server is. A server that is not ready yet answers too: see `.ready`."""
        return read_readiness(self._connection.get("/ready"))

    def metrics(self) -> str:
        """The cluster's metrics in Prometheus' text format."""
        response = self._connection.get("/metrics")
        check_status(response)
        return response.text

    def close(self) -> None:
        """Close all connections, those of open streams too. Closing again does nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._connection.is_closed else "open"
        return f"<Client of {self._connection.root}, {state}>"
