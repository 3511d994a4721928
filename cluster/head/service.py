"""The head's gRPC side: requests from an ingress into the engine, its events back.

Token ids only; no text. Threads: two per ingress, one that reads its stream and one that writes it.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor

import grpc

from cluster import rpc
from cluster.head.engine import Engine
from cluster.head.events import Event
from cluster.head.messages import to_load, to_sequence, to_spec, to_step_events
from cluster.head.sequence import Sequence
from cluster.log import RareWarnings
from cluster.metrics import HeadMetrics
from model.errors import GrammarError, SamplingError
from model.grammar import GrammarCompiler
from model.grammar_spec import GrammarSpec
from protos import head_pb2, head_pb2_grpc, peer_pb2

logger = logging.getLogger(__name__)

_COMPILING_THREADS = 2
"""Grammars compiled at once: a costly one must not keep a cheap one waiting."""


class StreamOutbox:
    """Events on their way to one ingress. The engine puts, the stream's thread iterates.

    The messages are built by the iterating thread, beside the engine's next step. The first one
    says how busy the head is, and then one every HEAD_BEAT_S, be there events or not.
    """

    def __init__(self, load: Callable[[], head_pb2.Load]) -> None:
        self._load = load
        self._batches: queue.SimpleQueue[Many[Event] | None] = queue.SimpleQueue()

    def put(self, events: Many[Event]) -> None:
        self._batches.put(events)

    def beat(self) -> None:
        """Say at once how busy the head is."""
        self._batches.put(())

    def close(self) -> None:
        """End the iteration."""
        self._batches.put(None)

    def __iter__(self) -> Iterator[head_pb2.StepEvents]:
        beat_at = time.monotonic()
        while True:
            try:
                events = self._batches.get(timeout=max(0.0, beat_at - time.monotonic()))
            except queue.Empty:
                events = ()
            if events is None:
                return
            message = to_step_events(events)
            now = time.monotonic()
            if not events or now >= beat_at:
                message.load.CopyFrom(self._load())
                beat_at = now + rpc.HEAD_BEAT_S
            yield message


class _Compiling:
    """Requests of one ingress whose grammars are being compiled; some are aborted before that ends.

    Touched by the ingress's reader and the compiling threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._request_ids: set[int] = set()

    def begin(self, request_id: int) -> None:
        with self._lock:
            self._request_ids.add(request_id)

    def is_wanted(self, request_id: int) -> bool:
        """Whether it has not been aborted since it began."""
        with self._lock:
            return request_id in self._request_ids

    def end(self, request_id: int, submit: Callable[[], None]) -> None:
        """Submit a request that is still wanted; under the lock, so that an abort comes after."""
        with self._lock:
            if request_id in self._request_ids:
                self._request_ids.remove(request_id)
                submit()

    def abort(self, request_id: int) -> bool:
        """Whether it was being compiled, and will not be submitted."""
        with self._lock:
            was_here = request_id in self._request_ids
            self._request_ids.discard(request_id)
            return was_here

    def clear(self) -> None:
        with self._lock:
            self._request_ids.clear()


class HeadService(head_pb2_grpc.HeadServicer):
    """Answers ingresses."""

    def __init__(
        self,
        engine: Engine,
        identity: rpc.Identity,
        metrics: HeadMetrics,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """grammars: None where answers cannot be given a form."""
        self._engine = engine
        self._grammars = grammars
        self._compilers = ThreadPoolExecutor(_COMPILING_THREADS, thread_name_prefix="grammars")
        self._identity = identity
        self._metrics = metrics
        self._warnings = RareWarnings(logger)
        self._outboxes: set[StreamOutbox] = set()
        self._is_draining = False

    def drain(self) -> None:
        """Tell all ingresses to take their requests elsewhere. What stays is still computed."""
        self._is_draining = True
        for outbox in list(self._outboxes):
            outbox.beat()

    def Hello(  # noqa: N802  (gRPC's names)
        self, request: peer_pb2.HelloRequest, context: grpc.ServicerContext
    ) -> peer_pb2.HelloReply:
        return self._identity.answer(request, context)

    def Metrics(  # noqa: N802
        self, request: peer_pb2.MetricsRequest, context: grpc.ServicerContext
    ) -> peer_pb2.MetricsReply:
        return peer_pb2.MetricsReply(exposition=self._metrics.exposition())

    def Generate(  # noqa: N802
        self, requests: Iterator[head_pb2.HeadRequest], context: grpc.ServicerContext
    ) -> Iterator[head_pb2.StepEvents]:
        peer = context.peer()
        outbox, compiling = StreamOutbox(self._load), _Compiling()
        if not context.add_callback(outbox.close):
            return
        reader = threading.Thread(
            target=self._read,
            args=(requests, outbox, compiling, peer),
            name="ingress reader",
            daemon=True,
        )
        self._outboxes.add(outbox)
        reader.start()
        logger.info("%s: ingress %s connected", self._identity.name, peer)
        try:
            yield from outbox
        finally:
            self._outboxes.discard(outbox)
            logger.info("%s: ingress %s is gone", self._identity.name, peer)

    def _load(self) -> head_pb2.Load:
        return to_load(self._engine.load, is_draining=self._is_draining)

    def _read(
        self,
        requests: Iterator[head_pb2.HeadRequest],
        outbox: StreamOutbox,
        compiling: _Compiling,
        peer: str,
    ) -> None:
        try:
            for request in requests:
                self._take(request, outbox, compiling)
        except grpc.RpcError:
            logger.info("%s: ingress %s hung up", self._identity.name, peer)
        finally:
            outbox.close()  # whatever it was: a stream that nobody reads must not stay open
            # here, since what was read last is submitted even where the stream ends meanwhile
            compiling.clear()
            self._engine.abort(outbox)

    def _take(
        self, request: head_pb2.HeadRequest, outbox: StreamOutbox, compiling: _Compiling
    ) -> None:
        match request.WhichOneof("action"):
            case "submit":
                self._submit(request.submit, outbox, compiling)
            case "abort":
                if not compiling.abort(request.abort.request_id):
                    self._engine.abort(outbox, request.abort.request_id)
            case None:
                self._metrics.observe_refusal("garbage")
                self._warnings.warn("empty", f"{self._identity.name}: ignored an empty request")

    def _submit(self, submit: head_pb2.Submit, outbox: StreamOutbox, compiling: _Compiling) -> None:
        request_id = submit.request_id
        try:
            sequence, spec = to_sequence(submit), to_spec(submit)
            if spec and self._grammars is None:
                raise GrammarError("this model's answers cannot be given a form")
        except (SamplingError, GrammarError) as error:
            param = error.field if isinstance(error, SamplingError) else "grammar"
            outbox.put([Event(request_id, error=str(error), is_refusal=True, param=param)])
            return
        if spec is None:
            self._engine.submit(outbox, request_id, sequence)
        else:
            compiling.begin(request_id)
            self._compilers.submit(
                self._submit_with_grammar, request_id, sequence, spec, outbox, compiling
            )

    def _submit_with_grammar(
        self,
        request_id: int,
        sequence: Sequence,
        spec: GrammarSpec,
        outbox: StreamOutbox,
        compiling: _Compiling,
    ) -> None:
        """Compile first, which may take seconds; nobody else waits for it."""
        assert self._grammars is not None, "checked by _submit"
        if not compiling.is_wanted(request_id):
            return  # aborted while it waited for its turn
        event = None
        try:
            sequence.follow(self._grammars.compile(spec).matcher(), self._grammars.end_ids)
        except GrammarError as error:
            event = Event(request_id, error=str(error), is_refusal=True, param="grammar")
        except Exception as error:
            # No fault of the grammar, such as want of memory: another head may compile it.
            logger.exception("%s: a grammar could not be compiled", self._identity.name)
            failure = f"the grammar could not be compiled: {type(error).__name__}: {error}"
            event = Event(request_id, error=failure)
        if event is not None:
            news = [event]
            compiling.end(request_id, lambda: outbox.put(news))
        else:
            compiling.end(request_id, lambda: self._engine.submit(outbox, request_id, sequence))
