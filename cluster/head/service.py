"""The head's gRPC side: requests from an ingress into the engine, its events back.

Token ids only; no text. Threads: two per ingress, one that reads its stream and one that writes it.
"""

import logging
import queue
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Many

import grpc

from cluster import rpc
from cluster.head.classification import Classification
from cluster.head.engine import Engine, Event
from cluster.head.sequence import Sequence
from cluster.metrics import HeadMetrics
from model.errors import SamplingError
from model.sampling_params import SamplingParams
from protos import head_pb2, head_pb2_grpc, peer_pb2

logger = logging.getLogger(__name__)

_FINISH = {
    None: head_pb2.FINISH_NONE,
    "stop": head_pb2.FINISH_STOP,
    "length": head_pb2.FINISH_LENGTH,
}


class StreamOutbox:
    """Events on their way to one ingress. The engine puts, the stream's thread iterates."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[head_pb2.StepEvents | None] = queue.SimpleQueue()

    def put(self, events: Many[Event]) -> None:
        self._messages.put(head_pb2.StepEvents(events=[_to_proto(event) for event in events]))

    def close(self) -> None:
        """End the iteration."""
        self._messages.put(None)

    def __iter__(self) -> Iterator[head_pb2.StepEvents]:
        return iter(self._messages.get, None)


class HeadService(head_pb2_grpc.HeadServicer):
    """Answers ingresses."""

    def __init__(self, engine: Engine, identity: rpc.Identity, metrics: HeadMetrics) -> None:
        self._engine = engine
        self._identity = identity
        self._metrics = metrics

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
        outbox = StreamOutbox()
        if not context.add_callback(outbox.close):
            return
        reader = threading.Thread(
            target=self._read, args=(requests, outbox, peer), name="ingress reader", daemon=True
        )
        reader.start()
        logger.info("%s: ingress %s connected", self._identity.name, peer)
        try:
            yield from outbox
        finally:
            self._engine.abort(outbox)
            logger.info("%s: ingress %s is gone", self._identity.name, peer)

    def _read(
        self, requests: Iterator[head_pb2.HeadRequest], outbox: StreamOutbox, peer: str
    ) -> None:
        try:
            for request in requests:
                self._take(request, outbox)
        except grpc.RpcError:
            logger.info("%s: ingress %s hung up", self._identity.name, peer)
        outbox.close()

    def _take(self, request: head_pb2.HeadRequest, outbox: StreamOutbox) -> None:
        match request.WhichOneof("action"):
            case "submit":
                submit = request.submit
                try:
                    sequence = _sequence(submit)
                except SamplingError as error:
                    outbox.put([Event(submit.request_id, error=str(error), is_refusal=True)])
                    return
                self._engine.submit(outbox, submit.request_id, sequence)
            case "abort":
                self._engine.abort(outbox, request.abort.request_id)
            case None:
                logger.warning("%s: an empty request was ignored", self._identity.name)


def _sequence(submit: head_pb2.Submit) -> Sequence:
    """Raises SamplingError."""
    if submit.WhichOneof("task") == "classify":
        return Classification(list(submit.token_ids))
    return Sequence(list(submit.token_ids), _params(submit.params))


def _params(params: head_pb2.SamplingParams) -> SamplingParams:
    """Raises SamplingError."""
    return SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        choice=params.choice,
        stop_token_ids=tuple(params.stop_token_ids),
        min_tokens=params.min_tokens,
        repetition_penalty=params.repetition_penalty,
        min_p=params.min_p,
        typical_p=params.typical_p,
    )


def _to_proto(event: Event) -> head_pb2.SequenceEvent:
    if event.error is None:
        finish = _FINISH[event.finish]
    else:
        finish = head_pb2.FINISH_INVALID if event.is_refusal else head_pb2.FINISH_ERROR
    return head_pb2.SequenceEvent(
        request_id=event.key,
        token_ids=event.token_ids,
        finish=finish,
        error=event.error or "",
        scores=event.scores,
    )
