"""The expert worker's gRPC side: bytes in, bytes out. Knows no Ray and how nothing is computed."""

import logging
import time
from collections.abc import Callable, Iterator

import grpc
import torch
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from cluster import rpc, wire
from cluster.errors import WireError
from cluster.expert.batcher import Batcher, BusyError, NotHeldError
from cluster.log import RareWarnings
from cluster.metrics import WorkerMetrics
from cluster.pipe import Buffer, PipeServer
from model.config import MixtralConfig
from model.experts import Assignments
from model.units import Unit
from protos import expert_pb2, peer_pb2

logger = logging.getLogger(__name__)


class ExpertService:
    """Answers heads. Each stream has a thread of the gRPC server's; state is the batcher's."""

    def __init__(
        self,
        batcher: Batcher,
        config: MixtralConfig,
        dtype: torch.dtype,
        device: torch.device,
        identity: rpc.Identity,
        metrics: WorkerMetrics,
        drop_if_damaged: Callable[[Unit], bool],
        end_broken: Callable[[], None] = lambda: None,
    ) -> None:
        """drop_if_damaged: drops a unit whose weights have changed since they were loaded, and says
        whether; called from any thread.
        end_broken: ends this worker, where nothing can be computed any more; called from any
        thread.
        """
        self._batcher = batcher
        self._config = config
        self._dtype = dtype
        self._device = device
        self._identity = identity
        self._metrics = metrics
        self._drop_if_damaged = drop_if_damaged
        self._end_broken = end_broken
        self._health = HealthServicer()
        self._warnings = RareWarnings(logger)
        self._pipes = PipeServer(
            lambda message: self._answer(message, "a pipe"),
            max_bytes=rpc.MAX_MESSAGE_BYTES,
            max_connections=rpc.MAX_STREAMS,
        )

    def add_to(self, server: grpc.Server) -> None:
        """Offer the service, also by a pipe, and gRPC's standard health service: SERVING."""
        server.add_generic_rpc_handlers((self._handler(),))
        add_HealthServicer_to_server(self._health, server)
        self._health.set(rpc.EXPERT_SERVICE, HealthCheckResponse.SERVING)
        self._pipes.start()
        self._identity.pipe = self._pipes.name

    def end(self, server: grpc.Server, grace_s: float) -> None:
        """Say NOT_SERVING for good, take no new stream, and stop the server after that long."""
        self._health.enter_graceful_shutdown()
        server.stop(grace_s).wait(grace_s + 1)
        self._pipes.stop()

    def _handler(self) -> grpc.GenericRpcHandler:
        # Compute's messages pass as raw bytes, for `wire`
        return grpc.method_handlers_generic_handler(
            rpc.EXPERT_SERVICE,
            {
                "Hello": grpc.unary_unary_rpc_method_handler(
                    self._identity.answer,
                    request_deserializer=peer_pb2.HelloRequest.FromString,
                    response_serializer=peer_pb2.HelloReply.SerializeToString,
                ),
                "Compute": grpc.stream_stream_rpc_method_handler(self._compute),
                "Verify": grpc.unary_unary_rpc_method_handler(
                    self._verify,
                    request_deserializer=expert_pb2.VerifyRequest.FromString,
                    response_serializer=expert_pb2.VerifyReply.SerializeToString,
                ),
                "Metrics": grpc.unary_unary_rpc_method_handler(
                    self._export,
                    request_deserializer=peer_pb2.MetricsRequest.FromString,
                    response_serializer=peer_pb2.MetricsReply.SerializeToString,
                ),
            },
        )

    def _compute(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        logger.info("%s: stream from %s opened", self._identity.name, context.peer())
        try:
            for message in messages:
                yield wire.joined(self._answer(message, context.peer()))
        finally:  # heads cancel it, which `messages` raises
            logger.info("%s: stream from %s ended", self._identity.name, context.peer())

    def _answer(self, message: Buffer, peer: str) -> wire.Parts:
        """Reply to one call; a call that cannot be answered gets the reason, the stream goes on."""
        started = time.perf_counter()
        incarnation = self._identity.incarnation
        try:
            call = wire.decode_call(message, self._config, self._dtype)
        except WireError as error:
            self._warnings.warn("invalid", f"{self._identity.name}: refused {peer}'s call: {error}")
            self._metrics.observe_call("invalid")
            return wire.encode_error(
                wire.call_id_of(message), incarnation, expert_pb2.ERROR_INVALID, str(error)
            )
        try:
            sums_RD = self._batcher.compute(
                call.layer, call.x_RD.to(self._device), call.assignments.to(self._device)
            )
        except NotHeldError as error:
            self._metrics.observe_call("not_held")
            return wire.encode_error(
                call.call_id, incarnation, expert_pb2.ERROR_NOT_HELD, str(error)
            )
        except BusyError as error:
            self._metrics.observe_call("busy")
            return wire.encode_error(call.call_id, incarnation, expert_pb2.ERROR_BUSY, str(error))
        except Exception as error:
            logger.exception("%s: layer %d failed", self._identity.name, call.layer)
            self._metrics.observe_call("internal")
            if any(self._is_broken(unit) for unit, _ in call.assignments.counts[:1]):
                self._end_broken()
            return wire.encode_error(
                call.call_id, incarnation, expert_pb2.ERROR_INTERNAL, repr(error)
            )
        self._metrics.observe_call("ok")
        return wire.encode_reply(call.call_id, incarnation, sums_RD, time.perf_counter() - started)

    def _is_broken(self, unit: Unit) -> bool:
        """Whether not even one row of zeros gets through a unit, as after an error of CUDA's, which
        stays for good. Then it was no fault of a call, nor want of memory.
        """
        x_RD = torch.zeros((1, self._config.hidden_size), dtype=self._dtype)
        one = Assignments(((unit, 1),), torch.zeros(1, dtype=torch.int64), torch.ones(1))
        try:
            self._batcher.compute(unit.layer, x_RD.to(self._device), one.to(self._device))
        except (NotHeldError, BusyError):
            return False  # not known
        except Exception:
            logger.exception("%s: %s does not compute any more", self._identity.name, unit)
            return True
        return False

    def _verify(
        self, request: expert_pb2.VerifyRequest, context: grpc.ServicerContext
    ) -> expert_pb2.VerifyReply:
        unit = Unit(request.layer, request.expert_id, request.slice_number, request.num_slices)
        is_damaged = self._drop_if_damaged(unit)
        if is_damaged:
            logger.error("%s: %s has changed in memory, dropped", self._identity.name, unit)
        return expert_pb2.VerifyReply(is_damaged=is_damaged)

    def _export(
        self, _request: peer_pb2.MetricsRequest, _context: grpc.ServicerContext
    ) -> peer_pb2.MetricsReply:
        return peer_pb2.MetricsReply(exposition=self._metrics.exposition())
