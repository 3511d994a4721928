"""Experts on other processes: rows out over long-lived gRPC streams, weighted sums back.

One message per layer and worker, with every row once however many of the worker's experts it goes
to. A worker that fails costs only its own rows: they wait for the controller to publish where the
experts are now, and are sent again.

Shape suffixes: T tokens, D hidden, R rows of one worker, A assignments.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import torch
from torch import Tensor

from cluster import rpc, wire
from cluster.errors import (
    ExpertFailedError,
    ExpertsUnavailableError,
    HandshakeError,
    WireError,
)
from cluster.head.choice import choose, options, split
from cluster.placement import Placement, WorkerInfo
from model.experts import Assignments, assign
from model.phases import UNWATCHED, Phases
from model.router import Routing
from protos import expert_pb2, peer_pb2

logger = logging.getLogger(__name__)

SLOW_AFTER_S = 1.0
"""A wait longer than this is logged, with what it waits for."""

RECONNECT_EVERY_S = 0.5
"""How often a lost worker is tried again while rows wait for it."""


class PlacementFeed:
    """The newest placement that this head has heard of. Thread-safe.

    Fed by whoever listens to the controller, read by the engine's thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._placement: Placement | None = None

    def put(self, placement: Placement) -> None:
        """Take a placement; an older epoch than the one known is ignored."""
        with self._changed:
            if self._placement is None or placement.epoch > self._placement.epoch:
                self._placement = placement
                self._changed.notify_all()

    def wait_for_newer(self, known: Placement | None, timeout_s: float) -> Placement | None:
        """The newest placement, as soon as it is not `known`, at the latest after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self._placement is not known, timeout_s)
            return self._placement


class WorkerStream:
    """The stream to one worker. Owned by the engine's thread, but for `watch`.

    gRPC's blocking read has no timeout of its own, so a watchdog thread calls `watch` and cancels
    a read that is overdue.
    """

    def __init__(self, worker: WorkerInfo, identity: rpc.Identity, *, timeout_s: float) -> None:
        """Connect and shake hands. Raises ExpertsUnavailableError or HandshakeError."""
        self.worker = worker
        self._timeout_s = timeout_s
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._waits_since: float | None = None
        self._waits_for = ""
        self._was_slow = False
        self._channel = rpc.new_channel(worker.address, identity.security, "worker")
        try:
            self._shake_hands(identity)
        except BaseException:
            self._channel.close()
            raise
        compute = self._channel.stream_stream(f"/{rpc.EXPERT_SERVICE}/Compute")
        self._incoming: Iterator[bytes] = compute(iter(self._outgoing.get, None))

    def __repr__(self) -> str:
        waits = f", waits for {self._waits_for}" if self._waits_since else ""
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
        self._outgoing.put(wire.encode_call(call))

    def receive(self, call: wire.Call) -> wire.Reply:
        """The answer to a call, with its sums. Calls must be received in the order they were sent.

        Raises ExpertsUnavailableError when the worker is gone, late or does not hold the experts,
        ExpertFailedError when it says that the call itself cannot be answered.
        """
        where = f"{self.worker.name} at {self.worker.address}, layer {call.layer}"
        self._waits_for, self._waits_since = where, time.monotonic()
        try:
            reply = self._next_reply()
            while reply.call_id < call.call_id:  # of a step that was given up
                reply = self._next_reply()
        except (grpc.RpcError, StopIteration) as error:
            reason = rpc.describe(error) if isinstance(error, grpc.RpcError) else "stream ended"
            raise ExpertsUnavailableError(f"{where}: {reason}") from error
        except WireError as error:
            raise ExpertsUnavailableError(f"{where}: unreadable answer: {error}") from error
        finally:
            self._waits_since, self._was_slow = None, False
        if (reply.call_id, reply.incarnation) != (call.call_id, self.worker.incarnation):
            raise ExpertsUnavailableError(f"{where}: the answer belongs to another call")
        if reply.error == expert_pb2.ERROR_NOT_HELD:
            raise ExpertsUnavailableError(f"{where}: {reply.message}")
        if reply.error:
            raise ExpertFailedError(f"{where}: {reply.message}")
        if reply.sums_RD.shape != call.x_RD.shape:
            raise ExpertsUnavailableError(
                f"{where}: sums of shape {tuple(reply.sums_RD.shape)} for rows of shape "
                f"{tuple(call.x_RD.shape)}"
            )
        return reply

    def _next_reply(self) -> wire.Reply:
        return wire.decode_reply(next(self._incoming))

    def watch(self, now: float) -> None:
        """Cancel a read that has waited too long. Called from the watchdog's thread."""
        since = self._waits_since
        if since is None:
            return
        if now - since > self._timeout_s:
            logger.warning("no answer within %.1f s from %s", self._timeout_s, self._waits_for)
            self._incoming.cancel()  # type: ignore[attr-defined]
        elif now - since > SLOW_AFTER_S and not self._was_slow:
            self._was_slow = True
            logger.warning("waiting since %.1f s for %s", now - since, self._waits_for)

    def close(self) -> None:
        self._outgoing.put(None)
        self._incoming.cancel()  # type: ignore[attr-defined]
        self._channel.close()


@dataclass(frozen=True)
class _Part:
    """What one worker is to compute of a dispatch."""

    call: wire.Call
    rows_R: Tensor
    """Rows of T, int64."""
    assignments: Assignments
    """The same assignments as the call's, with rows of T."""
    stream: WorkerStream | None
    """None: the worker could not be reached."""


class RemoteExperts:
    """All experts of a model, on the workers that the placement names.

    Owned by the engine's thread. A watchdog thread bounds every wait.
    """

    def __init__(
        self,
        feed: PlacementFeed,
        identity: rpc.Identity,
        *,
        timeout_s: float,
        recovery_timeout_s: float,
        phases: Phases = UNWATCHED,
    ) -> None:
        """timeout_s: for one answer. recovery_timeout_s: for a new placement after a failure.
        phases: told when rows are packed, under way and unpacked.
        """
        self.phases = phases
        self._feed = feed
        self._identity = identity
        self._timeout_s = timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._placement: Placement | None = None
        self._streams: dict[WorkerInfo, WorkerStream] = {}
        self._next_call_id = 1
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watchdog.start()

    def __repr__(self) -> str:
        epoch = self._placement.epoch if self._placement else None
        return f"RemoteExperts(epoch {epoch}, {list(self._streams.values())})"

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> "RemoteRows":
        """Send every row to the workers that hold its experts."""
        self.phases.enter("packing")
        self._adopt_newest()
        assignments = assign(layer, routing)
        return RemoteRows(self, layer, x_TD, self.send(layer, x_TD, assignments))

    def send(self, layer: int, x_TD: Tensor, assignments: Assignments) -> list[_Part]:
        """Choose a copy of each expert, split by worker, in ascending order, and send the parts."""
        assert self._placement is not None, "dispatch before the first placement"
        table, workers = self._placement.table[layer], self._placement.workers
        connected = {index for index, worker in enumerate(workers) if worker in self._streams}
        wanted = []
        for unit, count in assignments.counts:
            copies = table[unit.expert_id]
            found = options(unit, copies, connected) or options(unit, copies, range(len(workers)))
            wanted.append((count, found))
        parts = []
        for worker, mine in split(assignments, choose(wanted)):
            rows_R, local_A = mine.rows_A.unique(return_inverse=True)
            call = wire.Call(
                call_id=self._next_call_id,
                epoch=self._placement.epoch,
                layer=layer,
                x_RD=x_TD[rows_R],
                assignments=Assignments(mine.counts, local_A, mine.weights_A),
            )
            self._next_call_id += 1
            stream = self._streams.get(self._placement.workers[worker])
            if stream is not None:
                stream.send(call)
            parts.append(_Part(call, rows_R, mine, stream))
        return parts

    def receive(self, part: _Part) -> wire.Reply:
        """The answer to a part. Drops the stream of a worker that fails, and raises why."""
        if part.stream is None or part.stream not in self._streams.values():
            raise ExpertsUnavailableError(f"no connection for layer {part.call.layer}")
        try:
            return part.stream.receive(part.call)
        except ExpertsUnavailableError:
            self._streams.pop(part.stream.worker).close()
            raise

    def recover(self, cause: ExpertsUnavailableError) -> None:
        """Connect to where the experts are now, old worker or new.

        Raises ExpertsUnavailableError if that takes too long.
        """
        logger.warning("%s; its rows wait for another connection or placement", cause)
        if not self.connect(self._recovery_timeout_s):
            raise ExpertsUnavailableError(
                f"{cause}; no replacement within {self._recovery_timeout_s:.0f} s"
            ) from cause
        logger.warning(
            "connected again, at epoch %d", self._placement.epoch if self._placement else 0
        )

    def connect(self, timeout_s: float) -> bool:
        """Try until all workers of the newest placement are connected; says whether they are."""
        deadline = time.monotonic() + timeout_s
        placement = self._feed.wait_for_newer(None, timeout_s)
        while placement is not None and not self._adopt(placement):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            placement = self._feed.wait_for_newer(placement, min(left_s, RECONNECT_EVERY_S))
        return placement is not None

    def close(self) -> None:
        """End all streams."""
        self._closed.set()
        self._watchdog.join()
        for stream in self._streams.values():
            stream.close()
        self._streams = {}

    def _adopt_newest(self) -> None:
        placement = self._feed.wait_for_newer(self._placement, 0)
        if placement is not None and placement is not self._placement:
            self._adopt(placement)

    def _adopt(self, placement: Placement) -> bool:
        """Go by this placement from now on; says whether all its workers are connected."""
        streams = {}
        for worker in placement.workers:
            stream = self._streams.pop(worker, None)
            try:
                streams[worker] = stream or WorkerStream(
                    worker, self._identity, timeout_s=self._timeout_s
                )
            except (ExpertsUnavailableError, HandshakeError) as error:
                logger.warning("epoch %d: %s", placement.epoch, error)
        for stream in self._streams.values():
            stream.close()
        self._streams, self._placement = streams, placement
        logger.info("placement %d: %d workers connected", placement.epoch, len(streams))
        return len(streams) == len(placement.workers)

    def _watch(self) -> None:
        while not self._closed.wait(0.1):
            now = time.monotonic()
            for stream in list(self._streams.values()):
                stream.watch(now)


@dataclass(frozen=True)
class RemoteRows:
    """The answer to one dispatch, on its way from several workers."""

    experts: RemoteExperts
    layer: int
    x_TD: Tensor
    parts: list[_Part]

    def wait(self) -> Tensor:
        """Weighted sums (T, D) float32, added in ascending order of the workers.

        Raises ExpertsUnavailableError when rows could not be computed anywhere in time, or
        ExpertFailedError when they cannot be computed at all.
        """
        sums_TD = torch.zeros(self.x_TD.shape, dtype=torch.float32, device=self.x_TD.device)
        parts, phases = self.parts, self.experts.phases
        compute_s = 0.0
        while parts:
            lost, cause = [], None
            for part in parts:
                phases.enter("transfer")
                try:
                    reply = self.experts.receive(part)
                except ExpertsUnavailableError as error:
                    lost.append(part)
                    cause = error
                    continue
                phases.enter("unpacking")
                compute_s = max(compute_s, reply.compute_s)
                sums_TD.index_add_(0, part.rows_R, reply.sums_RD.to(sums_TD.device))
            if cause is None:
                break
            # Only the lost parts are sent again. Experts keep no state, so twice does no harm.
            self.experts.recover(cause)
            parts = [
                again
                for part in lost
                for again in self.experts.send(self.layer, self.x_TD, part.assignments)
            ]
        phases.reveal(compute_s, was="transfer", really="experts")
        return sums_TD
