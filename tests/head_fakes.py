"""Heads behind streams that lead nowhere: what an ingress talks to, without sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Many
from typing import Any

import grpc

from cluster import PROTOCOL_VERSION
from cluster.head.engine import Engine
from cluster.head.events import Event
from cluster.head.messages import to_load, to_sequence, to_spec, to_step_events
from cluster.ingress.heads import HeadPool
from cluster.metrics import IngressMetrics
from cluster.placement import HeadInfo
from cluster.rpc import Identity
from model.grammar import GrammarCompiler
from protos import head_pb2, peer_pb2

FINGERPRINT = "tiny"
BIG = 1_000_000


def next_id(position: int) -> int:
    """What every fake head emits as the token of this position of a sequence."""
    return (position * 7919) % 500 + 3


class Stream:
    """The head's end of one ingress's stream. Used as StepEvents' outbox by an engine, too."""

    def __init__(self, head: "FakeHead") -> None:
        self._head = head
        self._loop = asyncio.get_running_loop()
        self.up: asyncio.Queue[head_pb2.StepEvents | grpc.RpcError] = asyncio.Queue()
        self.aborted: set[int] = set()

    def send(self, message: head_pb2.StepEvents) -> None:
        if not self._head.is_mute:
            self.up.put_nowait(message)

    def put(self, events: Many[Event]) -> None:
        """From an engine's thread."""
        self._loop.call_soon_threadsafe(self._put, to_step_events(events))

    def _put(self, message: head_pb2.StepEvents) -> None:
        self.send(message)
        self._head.count(sum(len(event.token_ids) for event in message.events))


class FakeHead:
    """A head that emits `next_id` of each position, one token a message, as fast as it is read.

    Its address is good for one life; `die` ends it, `revive` begins another at a new address.
    """

    def __init__(self, name: str, *, num_free_tokens: int = BIG) -> None:
        self.name = name
        self.num_lives = 1
        self.is_up = True
        self.is_mute = False
        self.is_draining = False
        self.num_free_tokens = num_free_tokens
        self.submits: list[head_pb2.Submit] = []
        self.streams: list[Stream] = []
        self.die_after: int | None = None
        """Tokens that it still emits before it dies."""
        self.on_submit: Callable[[head_pb2.Submit], None] = lambda submit: None
        """Called with every request, before it is computed; may end the head."""
        self.error = ""
        """What it says of every request instead of computing it."""
        self.is_refusal = False
        """Whether it says so of requests that never could have worked."""
        self.gate = asyncio.Event()
        """Closed, it computes nothing."""
        self.gate.set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> HeadInfo:
        return HeadInfo(self.name, f"{self.name}:{self.num_lives}")

    @property
    def num_computed(self) -> int:
        """Prompts and replays that reached it."""
        return len(self.submits)

    def die(self) -> None:
        """As kill -9 does: streams break, the address answers no more."""
        self.is_up = False
        lost = grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "socket closed"
        )
        for stream in self.streams:
            stream.up.put_nowait(lost)
        self.streams = []
        for task in self._tasks:
            task.cancel()

    def revive(self) -> None:
        """As Serve does: another process of the same kind."""
        self.num_lives += 1
        self.is_up, self.is_mute, self.die_after = True, False, None

    def drain(self) -> None:
        self.is_draining = True
        self.beat()

    def beat(self) -> None:
        for stream in self.streams:
            stream.send(head_pb2.StepEvents(load=self.load()))

    def load(self) -> head_pb2.Load:
        return head_pb2.Load(
            num_free_tokens=self.num_free_tokens,
            num_cache_tokens=BIG,
            is_draining=self.is_draining,
        )

    def count(self, num_tokens: int) -> None:
        """Note that so many tokens were emitted."""
        if self.die_after is not None and num_tokens:
            self.die_after -= num_tokens
            if self.die_after <= 0:
                self.die()

    def take(self, stream: Stream, request: head_pb2.HeadRequest) -> None:
        """An ingress asks."""
        if request.WhichOneof("action") == "abort":
            stream.aborted.add(request.abort.request_id)
            return
        self.submits.append(request.submit)
        self.on_submit(request.submit)
        if self.is_up:
            self.compute(stream, request.submit)

    def compute(self, stream: Stream, submit: head_pb2.Submit) -> None:
        task = asyncio.create_task(self._emit(stream, submit))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _emit(self, stream: Stream, submit: head_pb2.Submit) -> None:
        await self.gate.wait()
        event = head_pb2.SequenceEvent(request_id=submit.request_id)
        if self.error:
            event.finish = head_pb2.FINISH_INVALID if self.is_refusal else head_pb2.FINISH_ERROR
            event.error = self.error
            stream.send(head_pb2.StepEvents(events=[event]))
            return
        if submit.WhichOneof("task") == "classify":
            event.finish, event.scores[:] = head_pb2.FINISH_STOP, [float(len(submit.token_ids))]
            stream.send(head_pb2.StepEvents(events=[event]))
            return
        num_prompt = len(submit.token_ids)
        for number in range(len(submit.emitted_ids) + 1, submit.params.max_tokens + 1):
            await self.gate.wait()
            if submit.request_id in stream.aborted:
                return
            event.token_ids[:] = [next_id(num_prompt + number)]
            if number == submit.params.max_tokens:
                event.finish = head_pb2.FINISH_LENGTH
            stream.send(head_pb2.StepEvents(events=[event]))
            self.count(1)
            await asyncio.sleep(0)


class EngineHead(FakeHead):
    """The same with a real engine, which outlives its head's lives."""

    def __init__(self, name: str, engine: Engine, compiler: GrammarCompiler) -> None:
        super().__init__(name)
        self._engine = engine
        self._compiler = compiler

    def load(self) -> head_pb2.Load:
        return to_load(self._engine.load, is_draining=self.is_draining)

    def die(self) -> None:
        for stream in self.streams:
            self._engine.abort(stream)
        super().die()

    def take(self, stream: Stream, request: head_pb2.HeadRequest) -> None:
        if request.WhichOneof("action") == "abort":
            self._engine.abort(stream, request.abort.request_id)
        super().take(stream, request)

    def compute(self, stream: Stream, submit: head_pb2.Submit) -> None:
        sequence, spec = to_sequence(submit), to_spec(submit)
        if spec:
            sequence.follow(self._compiler.compile(spec).matcher(), self._compiler.end_ids)
        self._engine.submit(stream, submit.request_id, sequence)


class Network:
    """All heads by their addresses; `open_channel` stands in for gRPC's."""

    def __init__(self, *heads: FakeHead) -> None:
        self.heads = heads

    @property
    def infos(self) -> list[HeadInfo]:
        """What the controller publishes."""
        return [head.info for head in self.heads if head.is_up and not head.is_draining]

    def pool(
        self,
        *,
        silent_after_s: float = 30.0,
        wait_s: float = 30.0,
        wake: Callable[[], None] = lambda: None,
    ) -> HeadPool:
        """The ingress's side, which knows all heads that are up."""
        pool = HeadPool(
            Identity("ingress", FINGERPRINT),
            IngressMetrics(),
            silent_after_s=silent_after_s,
            wait_s=wait_s,
            wake=wake,
            open_channel=self.open_channel,
        )
        pool.update(self.infos)
        return pool

    def open_channel(self, address: str) -> Any:
        head = next((head for head in self.heads if head.info.address == address), None)
        return _Channel(head if head and head.is_up else None)


class _Channel:
    """What a stub needs of grpc.aio.Channel."""

    def __init__(self, head: FakeHead | None) -> None:
        self._head = head

    def unary_unary(self, path: str, **_: Any) -> Callable[..., Any]:
        async def hello(
            request: peer_pb2.HelloRequest,
            timeout: float,  # noqa: ASYNC109 (gRPC's name)
        ) -> peer_pb2.HelloReply:
            if self._head is None:
                raise grpc.aio.AioRpcError(
                    grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "refused"
                )
            return peer_pb2.HelloReply(
                protocol=PROTOCOL_VERSION, peer=self._head.name, fingerprint=FINGERPRINT
            )

        return hello

    def stream_stream(self, path: str, **_: Any) -> Callable[..., Any]:
        return self._generate

    async def _generate(
        self, requests: AsyncIterator[head_pb2.HeadRequest]
    ) -> AsyncIterator[head_pb2.StepEvents]:
        head = self._head
        assert head is not None, "the handshake has failed before"
        stream = Stream(head)
        head.streams.append(stream)
        head.beat()
        taking = asyncio.create_task(self._take(head, stream, requests))
        try:
            while True:
                message = await stream.up.get()
                if isinstance(message, grpc.RpcError):
                    raise message
                yield message
        finally:
            taking.cancel()

    async def _take(
        self, head: FakeHead, stream: Stream, requests: AsyncIterator[head_pb2.HeadRequest]
    ) -> None:
        async for request in requests:
            if head.is_up and stream in head.streams:
                head.take(stream, head_pb2.HeadRequest.FromString(request.SerializeToString()))

    async def close(self) -> None:
        pass
