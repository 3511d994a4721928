"""The stream to one expert worker: calls out, answers in, in the same order."""

import logging
import queue
import time
from collections.abc import Iterator

import grpc

from cluster import rpc, wire
from cluster.errors import (
    CallRefusedError,
    ExpertFailedError,
    ExpertsUnavailableError,
    HandshakeError,
    WireError,
)
from cluster.placement import WorkerInfo
from protos import expert_pb2, peer_pb2

logger = logging.getLogger(__name__)

GRACE_S = 0.1
"""An answer that is there already is read even if its time is over: it may be this process, not the
worker, that was held up."""

SLOW_AFTER_S = 1.0
"""A wait longer than this is logged, with what it waits for."""


class WorkerStream:
    """Used by the engine's thread, but for the constructor and `watch`.

    gRPC's blocking read has no timeout of its own, so somebody else must call `watch` now and then,
    which cancels a read that is overdue.
    """

    def __init__(self, worker: WorkerInfo, identity: rpc.Identity) -> None:
        """Connect and shake hands. Raises ExpertsUnavailableError or HandshakeError."""
        self.worker = worker
        self.num_outstanding = 0
        """Calls whose answer has not been read."""
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._wait: tuple[float, float, str] | None = None
        """Of the read in progress: since when, until when, and for what."""
        self._was_slow = False
        self._missed_deadline = False
        self._channel = rpc.new_channel(worker.address, identity.security, "worker")
        try:
            self._shake_hands(identity)
        except BaseException:
            self._channel.close()
            raise
        compute = self._channel.stream_stream(f"/{rpc.EXPERT_SERVICE}/Compute")
        self._incoming: Iterator[bytes] = compute(iter(self._outgoing.get, None))

    def __repr__(self) -> str:
        wait = self._wait
        waits = f", waits for {wait[2]}" if wait else ""
        return f"WorkerStream({self.worker.name} at {self.worker.address}{waits})"

    def _shake_hands(self, identity: rpc.Identity) -> None:
        hello = self._channel.unary_unary(
            f"/{rpc.EXPERT_SERVICE}/Hello",
            request_serializer=peer_pb2.HelloRequest.SerializeToString,
            response_deserializer=peer_pb2.HelloReply.FromString,
        )
        try:
            reply = hello(identity.hello(), timeout=rpc.HANDSHAKE_TIMEOUT_S)
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

    def send(self, call: wire.Call) -> None:
        """Queue a call; gRPC's own thread sends it."""
        self.num_outstanding += 1
        self._outgoing.put(wire.encode_call(call))

    def receive(self, call: wire.Call, overdue_at: float) -> wire.Reply:
        """The answer to a call, with its sums. Calls must be received in the order they were sent.

        overdue_at: when to give up, in `time.monotonic`'s seconds; not before GRACE_S from now.

        Raises ExpertsUnavailableError when the worker is gone, late or answers nonsense; this
        stream is then of no more use. Raises CallRefusedError when the worker does not hold the
        experts or has too much to do, ExpertFailedError when it says that the call itself cannot
        be answered.
        """
        where = f"{self.worker.name} at {self.worker.address}, layer {call.layer}"
        since = time.monotonic()
        self._wait = (since, max(overdue_at, since + GRACE_S), where)
        try:
            reply = self._next_reply()
            while reply.call_id < call.call_id:  # of a step that was given up
                reply = self._next_reply()
        except (grpc.RpcError, StopIteration) as error:
            reason = rpc.describe(error) if isinstance(error, grpc.RpcError) else "stream ended"
            if self._missed_deadline:
                reason = f"no answer within {time.monotonic() - since:.2f} s"
            raise ExpertsUnavailableError(f"{where}: {reason}") from error
        except WireError as error:
            raise ExpertsUnavailableError(f"{where}: unreadable answer: {error}") from error
        finally:
            self._wait, self._was_slow = None, False
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

    def _next_reply(self) -> wire.Reply:
        message = next(self._incoming)
        self.num_outstanding -= 1
        return wire.decode_reply(message)

    def watch(self, now: float) -> None:
        """Cancel a read that is overdue. May be called from any one thread."""
        wait = self._wait
        if wait is None:
            return
        since, overdue_at, where = wait
        if now > overdue_at:
            self._missed_deadline = True
            self._incoming.cancel()  # type: ignore[attr-defined]
        elif now - since > SLOW_AFTER_S and not self._was_slow:
            self._was_slow = True
            logger.warning("waiting since %.1f s for %s", now - since, where)

    def close(self) -> None:
        """End the stream, whatever is outstanding."""
        self._outgoing.put(None)
        self._incoming.cancel()  # type: ignore[attr-defined]
        self._channel.close()
