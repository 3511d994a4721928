"""The stream to one expert worker: calls out, answers in, in the same order."""

import logging
import time

import grpc

from cluster import rpc, wire
from cluster.errors import (
    CallRefusedError,
    ExpertFailedError,
    ExpertsUnavailableError,
    HandshakeError,
    WireError,
)
from cluster.head.links import GrpcLink, LinkLostError, PipeLink
from cluster.placement import WorkerInfo
from protos import expert_pb2, peer_pb2

logger = logging.getLogger(__name__)

MAX_EARLY = 16
"""Answers that are kept for calls whose turn to be received is still to come: as many as a step has
micro-batches, and some that were sent again."""

GRACE_S = 0.1
"""An answer that is there already is read even if its time is over: it may be this process, not the
worker, that was held up."""


class WorkerStream:
    """Used by the engine's thread, but for the constructor, `watch` and `close`.

    Goes by a pipe if the worker is on this host, else by gRPC.
    """

    def __init__(self, worker: WorkerInfo, identity: rpc.Identity) -> None:
        """Connect and shake hands. Raises ExpertsUnavailableError or HandshakeError."""
        self.worker = worker
        self.num_outstanding = 0
        """Calls whose answer has not been read."""
        self._early: dict[int, wire.Reply] = {}
        """Answers that came before one that was wanted first, by call."""
        self._fault: LinkLostError | WireError | None = None
        """What ended the stream while nobody received."""
        channel = rpc.new_channel(worker.address, identity.security, "worker")
        try:
            reply = self._shake_hands(channel, identity)
        except BaseException:
            channel.close()
            raise
        self._link = _pipe_to(reply.pipe) or GrpcLink(channel)
        if isinstance(self._link, PipeLink):
            channel.close()

    def __repr__(self) -> str:
        return f"WorkerStream({self.worker.name} at {self.worker.address})"

    def _shake_hands(self, channel: grpc.Channel, identity: rpc.Identity) -> peer_pb2.HelloReply:
        hello = channel.unary_unary(
            f"/{rpc.EXPERT_SERVICE}/Hello",
            request_serializer=peer_pb2.HelloRequest.SerializeToString,
            response_deserializer=peer_pb2.HelloReply.FromString,
        )
        try:
            reply: peer_pb2.HelloReply = hello(identity.hello(), timeout=rpc.HANDSHAKE_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() in rpc.REFUSALS:
                raise HandshakeError(error.details()) from error
            raise ExpertsUnavailableError(
                f"{self.worker.name} at {self.worker.address} does not answer: "
                f"{rpc.describe(error)}"
            ) from error
        identity.check(reply)
        if reply.incarnation != self.worker.incarnation:
            raise ExpertsUnavailableError(
                f"{self.worker.name} at {self.worker.address} has been replaced by another process"
            )
        return reply

    def send(self, call: wire.Call, overdue_at: float) -> None:
        """Send a call. What fails, fails when its answer is received.

        overdue_at: when to give up, in `time.monotonic`'s seconds.
        """
        self.num_outstanding += 1
        self._link.send(wire.encode_call(call), overdue_at)

    def receive(self, call: wire.Call, overdue_at: float) -> wire.Reply:
        """The answer to a call, with its sums. Answers come in the order in which calls were sent,
        but may be wanted in another: rows that were sent again, before the next micro-batch's.

        overdue_at: when to give up, in `time.monotonic`'s seconds; not before GRACE_S from now.

        Raises ExpertsUnavailableError when the worker is gone, late or answers nonsense; this
        stream is then of no more use. Raises CallRefusedError when the worker does not hold the
        experts or has too much to do, ExpertFailedError when it says that it cannot compute the
        call.
        """
        where = f"{self.worker.name} at {self.worker.address}, layer {call.layer}"
        overdue_at = max(overdue_at, time.monotonic() + GRACE_S)
        try:
            reply = self._early.pop(call.call_id, None)
            while reply is None or reply.call_id < call.call_id:
                if reply is not None:
                    self._keep(reply)
                if self._fault is not None:
                    raise self._fault
                reply = self._next_reply(overdue_at, where)
        except LinkLostError as error:
            raise ExpertsUnavailableError(f"{where}: {error}") from error
        except WireError as error:
            raise ExpertsUnavailableError(f"{where}: unreadable answer: {error}") from error
        if (reply.call_id, reply.incarnation) != (call.call_id, self.worker.incarnation):
            raise ExpertsUnavailableError(f"{where}: the answer belongs to another call")
        if reply.error in (expert_pb2.ERROR_NOT_HELD, expert_pb2.ERROR_BUSY):
            raise CallRefusedError(f"{where}: {reply.message}")
        if reply.error:
            raise ExpertFailedError(f"{where}: {reply.message}")
        if reply.sums_RD.shape != call.x_RD.shape:
            raise ExpertsUnavailableError(
                f"{where}: sums of shape {tuple(reply.sums_RD.shape)} for rows of shape "
                f"{tuple(call.x_RD.shape)}"
            )
        return reply

    def wait(self, call: wire.Call, until: float) -> bool:
        """Whether, by then, `receive` would return or raise at once for a call that was sent."""
        while self._fault is None and call.call_id not in self._early:
            if not self._link.wait(until):
                return False
            try:
                self._keep(self._next_reply(until, repr(self)))
            except (LinkLostError, WireError) as error:
                self._fault = error
        return True

    def fileno(self) -> int:
        """Of a descriptor that can be read when it may be worth to `wait` again."""
        return self._link.fileno()

    def _next_reply(self, overdue_at: float, where: str) -> wire.Reply:
        message = self._link.receive(overdue_at, where)
        self.num_outstanding -= 1
        return wire.decode_reply(message)

    def _keep(self, reply: wire.Reply) -> None:
        """For when it is wanted; never, if it is of a step that was given up."""
        self._early[reply.call_id] = reply
        if len(self._early) > MAX_EARLY:
            del self._early[min(self._early)]

    def watch(self, now: float) -> None:
        """End a read that is overdue. May be called from any one thread, now and then."""
        self._link.watch(now)

    def close(self) -> None:
        """End the stream, whatever is outstanding."""
        self._link.close()


def _pipe_to(name: str) -> PipeLink | None:
    """None when the worker offers no pipe, or is on another host."""
    try:
        return PipeLink(name) if name else None
    except OSError as error:
        logger.info("no pipe, going by gRPC: %s", error)
        return None
