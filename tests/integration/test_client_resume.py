"""Streams of a real head over connections that are cut: the SDK goes on with them. Without Ray."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from cluster import rpc
from cluster.client import AsyncClient, Client
from cluster.ingress.api import create_app
from cluster.ingress.heads import HeadPool
from cluster.ingress.journal import Journal
from cluster.ingress.prepare import ApiSettings
from cluster.metrics import IngressMetrics
from model import Mixtral
from model.chat import ChatFormat
from model.generation_defaults import GenerationDefaults
from tests.api_fakes import EOS, ScriptedEngine, never_ends
from tests.faults import Proxy
from tests.integration.heads import FINGERPRINT, HeadServer

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": "Once upon a time", "temperature": 0},
    "sampled": {
        "prompt": "Once upon a time",
        "seed": 5,
        "temperature": 0.9,
        "top_p": 0.95,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "min_tokens": 40,
        "stop": ["xyz", "e w"],
    },
    "chat": {"messages": [{"role": "user", "content": "What does a cow say?"}], "seed": 7},
}


class PoolEngine(ScriptedEngine):
    """A real head, over gRPC, for the API."""

    def __init__(self, head: HeadServer) -> None:
        super().__init__(never_ends)
        self._head = head

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        identity = rpc.Identity("ingress", FINGERPRINT)
        self._pool = HeadPool(identity, IngressMetrics(), silent_after_s=30, wait_s=60)
        self._pool.update([self._head.info()])
        try:
            yield
        finally:
            await self._pool.close()

    def generate(self, journal: Journal) -> AsyncGenerator[tuple[int, ...], None]:
        return self._pool.generate(journal)


class LoopbackServer(uvicorn.Server):
    """An app on a free port, in a thread of its own."""

    def __init__(self, app: Any) -> None:
        super().__init__(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
        self._has_started = threading.Event()
        self._thread = threading.Thread(target=self.run)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._has_started.set()

    def __enter__(self) -> str:
        """Its address."""
        self._thread.start()
        assert self._has_started.wait(30)
        return f"127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *error: object) -> None:
        self.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def address(mixtral: Mixtral, tiny_folder: Path) -> Iterator[str]:
    """Where the API of one real head listens."""
    settings = ApiSettings(
        model_id="tiny",
        max_model_len=128,
        vocab_size=mixtral.config.vocab_size,
        eos_token_ids=(EOS,),
        defaults=GenerationDefaults(),
        max_concurrent_requests=8,
        max_body_bytes=100_000,
    )
    chat = ChatFormat.from_folder(tiny_folder, mixtral.tokenizer)
    with HeadServer("head", mixtral).running() as head:
        app = create_app(PoolEngine(head), mixtral.tokenizer, chat, settings, IngressMetrics())
        with LoopbackServer(app) as address:
            yield address


@pytest.fixture(scope="module")
def proxy(address: str) -> Iterator[Proxy]:
    with Proxy(address) as proxy:
        yield proxy


def begin(client: Any, asked: dict[str, Any]) -> Any:
    methods = client.chat.completions if "messages" in asked else client.completions
    return methods.create(
        **{"max_tokens": 60, **asked}, stream=True, stream_options={"include_usage": True}
    )


def told(chunks: list[Any]) -> tuple[str, list[str], tuple[int, int]]:
    """Text, finish reasons and usage of a stream."""
    choices = [choice for chunk in chunks for choice in chunk.choices]
    text = "".join(
        choice.delta.content or "" if hasattr(choice, "delta") else choice.text
        for choice in choices
    )
    ends = [choice.finish_reason for choice in choices if choice.finish_reason]
    usage = chunks[-1].usage
    return text, ends, (usage.prompt_tokens, usage.completion_tokens)


@pytest.mark.parametrize("asked", REQUESTS.values(), ids=REQUESTS.keys())
def test_a_stream_whose_connection_is_cut_is_the_undisturbed_one(
    address: str, proxy: Proxy, asked: dict[str, Any]
) -> None:
    with Client(f"http://{address}") as client:
        undisturbed = told(list(begin(client, asked)))
    num_cut = proxy.num_cut
    with Client(f"http://{proxy.address}") as client:
        chunks = []
        for chunk in begin(client, asked):
            chunks.append(chunk)
            if len(chunks) in (1, 4, 9):
                proxy.cut()
    assert told(chunks) == undisturbed
    assert proxy.num_cut > num_cut


def test_an_asynchronous_stream_goes_on_too(address: str, proxy: Proxy) -> None:
    async def read(address: str, cut_after: int | None) -> list[Any]:
        async with AsyncClient(f"http://{address}") as client:
            chunks = []
            async for chunk in await begin(client, REQUESTS["sampled"]):
                chunks.append(chunk)
                if len(chunks) == cut_after:
                    proxy.cut()
            return chunks

    undisturbed = told(asyncio.run(read(address, None)))
    assert told(asyncio.run(read(proxy.address, 3))) == undisturbed


def test_connections_come_back_to_the_pool(address: str) -> None:
    with Client(f"http://{address}") as client:
        pool: Any = client._connection.http._transport._pool  # type: ignore[attr-defined]
        for _ in range(3):
            client.models.list()
            with client.completions.create(prompt="a", max_tokens=3, stream=True) as chunks:
                list(chunks)
            client.completions.with_raw_response.create(prompt="a", max_tokens=1).parse()
        assert [connection.is_idle() for connection in pool.connections] == [True]
        with client.completions.create(prompt="a", max_tokens=100, stream=True) as chunks:
            next(chunks)  # left early: this connection cannot be used again
        assert pool.connections == []
