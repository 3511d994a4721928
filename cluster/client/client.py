"""`Client` and `AsyncClient`: the SDK's front doors. Know no HTTP; what they call does."""

import os
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Generic, Self, TypedDict, TypeVar, Unpack

import httpx

from cluster.client import calls
from cluster.client.connection import AsyncConnection, Connection
from cluster.client.resources import (
    AsyncChat,
    AsyncCluster,
    AsyncCompletions,
    AsyncModels,
    Chat,
    Cluster,
    Completions,
    Models,
)
from cluster.client.retry import MAX_RETRIES
from cluster.client.settings import DEFAULT_TIMEOUT_S, LIMITS, Settings, Timeout, changed, settings

ConnectionT = TypeVar("ConnectionT", Connection, AsyncConnection)


class Changes(TypedDict, total=False):
    """What a copy of a client may have of its own."""

    base_url: str
    api_key: str
    timeout: Timeout
    max_retries: int


class _AnyClient(ABC, Generic[ConnectionT]):
    """What blocking and asynchronous clients share."""

    _connection: ConnectionT

    @property
    def base_url(self) -> str:
        """The server's address, without `/v1`."""
        return self._settings.root

    @property
    def timeout(self) -> httpx.Timeout:
        return self._settings.timeout

    @property
    def max_retries(self) -> int:
        return self._settings.max_retries

    def with_options(self, **changes: Unpack[Changes]) -> Self:
        """A client with other settings on the same connections: closing one closes both.

        Raises ConfigurationError as the client itself does.
        """
        copied = object.__new__(type(self))
        copied._use(self._connection.with_settings(changed(self._settings, **changes)))
        return copied

    copy = with_options

    @property
    def _settings(self) -> Settings:
        return self._connection.settings

    @abstractmethod
    def _use(self, connection: ConnectionT) -> None:
        """Make all methods those of a connection."""

    def __repr__(self) -> str:
        state = "closed" if self._connection.http.is_closed else "open"
        return f"<{type(self).__name__} of {self.base_url}, {state}>"


class Client(_AnyClient[Connection]):
    """A Maestrale server, seen from Python. Blocking; safe to share between threads.

    base_url:    with or without `/v1`; else MAESTRALE_BASE_URL, else http://127.0.0.1:8000.
    api_key:     else MAESTRALE_API_KEY, else none is sent; "" sends none in any case.
    timeout:     seconds without a byte from the server after which a call fails; a connection has
                 5 s to come about. Or httpx's Timeout, or None to wait as long as it takes.
    max_retries: how often a call that failed for a reason that may pass is made again (no
                 connection, 408, 409, 429, 500 and above), and how often in a row a stream that
                 broke off goes on.
    transport:   httpx's, in place of the network, for tests.

    Raises ConfigurationError if one of these makes no sense. Close it, or use it by `with`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: Timeout = DEFAULT_TIMEOUT_S,
        max_retries: int = MAX_RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        checked = settings(
            base_url=base_url,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
            environ=os.environ,
        )
        self._use(Connection(checked, httpx.Client(limits=LIMITS, transport=transport)))

    def _use(self, connection: Connection) -> None:
        self._connection = connection
        self.completions = Completions(connection)
        self.chat = Chat(connection)
        self.models = Models(connection)
        self.cluster = Cluster(connection)
        self.classify = connection.method(calls.classify)
        self.tokenize = connection.method(calls.tokenize)
        self.detokenize = connection.method(calls.detokenize)

    def close(self) -> None:
        """Close all connections, those of open streams too. Closing again does nothing."""
        self._connection.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient(_AnyClient[AsyncConnection]):
    """`Client` for asyncio: same settings, same methods, awaited. Owned by an event loop."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: Timeout = DEFAULT_TIMEOUT_S,
        max_retries: int = MAX_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        checked = settings(
            base_url=base_url,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
            environ=os.environ,
        )
        self._use(AsyncConnection(checked, httpx.AsyncClient(limits=LIMITS, transport=transport)))

    def _use(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self.completions = AsyncCompletions(connection)
        self.chat = AsyncChat(connection)
        self.models = AsyncModels(connection)
        self.cluster = AsyncCluster(connection)
        self.classify = connection.method(calls.classify)
        self.tokenize = connection.method(calls.tokenize)
        self.detokenize = connection.method(calls.detokenize)

    async def close(self) -> None:
        """Close all connections, those of open streams too. Closing again does nothing."""
        await self._connection.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
