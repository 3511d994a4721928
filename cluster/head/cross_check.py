"""Are the answers right? A sampled share of rows is computed by a second copy too, and compared.

Two copies that disagree do not say which of them is wrong; but each can say whether its weights are
still what was loaded. One that finds them changed drops them, so it is asked for them no more, and
has them loaded again.

Shape suffixes: T tokens, D hidden.
"""

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import grpc
import torch
from torch import Tensor

from cluster import rpc, wire
from cluster.errors import ConfigurationError, WireError
from cluster.metrics import HeadMetrics
from cluster.placement import WorkerInfo
from model.experts import Assignments
from model.units import Unit
from protos import expert_pb2

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 10.0
MAX_WAITING = 16
"""Samples; more are not taken, rather than grow behind a worker that does not answer."""

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far two copies' outputs for a row may be apart, in parts of the larger one's norm. Different
processors add in different orders; a flipped bit that matters does more."""

Copies = Callable[[Unit], tuple[int, list[tuple[WorkerInfo, ...]]]]
"""The epoch, and of each copy of an expert that can be asked the workers, by slice."""


@dataclass(frozen=True)
class _Sample:
    epoch: int
    unit: Unit
    x_1D: Tensor
    copies: tuple[tuple[WorkerInfo, ...], tuple[WorkerInfo, ...]]


class CrossCheck:
    """Takes samples from the engine's thread; a thread of its own has them computed and compares.

    It speaks to workers on channels of its own, so the engine's streams carry nothing for it.
    """

    def __init__(self, identity: rpc.Identity, metrics: HeadMetrics, *, share: float) -> None:
        """share: of all rows of experts, above 0."""
        self._identity = identity
        self._metrics = metrics
        self._every = 1 / share
        self._num_rows = 0.0
        """Offered since the last sample."""
        self._num_samples = 0
        self._num_samples_of: Counter[Unit] = Counter()
        """So that each pair of a unit's copies has its turn."""
        self._channels: dict[WorkerInfo, grpc.Channel] = {}
        self._samples: queue.Queue[_Sample | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="cross-check", daemon=True)
        self._thread.start()

    def offer(self, x_TD: Tensor, assignments: Assignments, copies: Copies) -> None:
        """Take a row every so often, of one expert after the other, where there are two copies."""
        self._num_rows += len(assignments.rows_A)
        if self._num_rows < self._every:
            return
        number = self._num_samples % len(assignments.counts)
        unit, _ = assignments.counts[number]
        self._num_samples += 1
        self._num_rows = 0.0
        epoch, found = copies(unit)
        if len(found) < 2:
            return
        row = int(assignments.rows_A[sum(count for _, count in assignments.counts[:number])])
        pairs = list(combinations(found, 2))
        pair = pairs[self._num_samples_of[unit] % len(pairs)]
        self._num_samples_of[unit] += 1
        sample = _Sample(epoch, unit, x_TD[row : row + 1].clone(), pair)
        try:
            self._samples.put_nowait(sample)
        except queue.Full:
            self._metrics.observe_cross_check("unanswered")

    def close(self) -> None:
        """End the thread, at once unless a worker is slow to answer."""
        while True:
            try:
                self._samples.put_nowait(None)
                break
            except queue.Full:
                with suppress(queue.Empty):
                    self._samples.get_nowait()
        self._thread.join(ANSWER_TIMEOUT_S)

    def _run(self) -> None:
        while (sample := self._samples.get()) is not None:
            try:
                outcome = self._check(sample)
            except (grpc.RpcError, WireError, StopIteration, ConfigurationError) as error:
                # That a worker is gone is for the engine to notice.
                logger.debug("no cross-check of %s: %r", sample.unit, error)
                outcome = "unanswered"
            self._metrics.observe_cross_check(outcome)
        for channel in self._channels.values():
            channel.close()

    def _check(self, sample: _Sample) -> str:
        """The outcome, for the metrics."""
        ours, theirs = (self._output(sample, copy) for copy in sample.copies)
        if ours is None or theirs is None:
            return "unanswered"
        apart = float((ours - theirs).norm() / torch.maximum(ours.norm(), theirs.norm()))
        bound = BOUNDS[sample.x_1D.dtype]
        if apart <= bound or not (ours.any() or theirs.any()):  # NaN is not
            return "agreed"
        names = [worker.name for copy in sample.copies for worker in copy]
        logger.error(
            "%s: outputs of %s are %.2g of their size apart, the bound is %.2g",
            sample.unit,
            " and ".join(names),
            apart,
            bound,
        )
        damaged = [
            worker.name
            for copy in sample.copies
            for number, worker in enumerate(copy)
            if self._is_damaged(worker, _part(sample.unit, number, len(copy)))
        ]
        if not damaged:
            logger.error("%s: the weights of %s are as loaded; a processor?", sample.unit, names)
            return "unexplained"
        logger.error("%s: damaged in the memory of %s, dropped there", sample.unit, damaged)
        return "damaged"

    def _output(self, sample: _Sample, copy: tuple[WorkerInfo, ...]) -> Tensor | None:
        """The expert's output for the row, by one copy; None when a worker gives none."""
        output_1D: Tensor | None = None
        for number, worker in enumerate(copy):
            call = wire.Call(
                call_id=1,
                epoch=sample.epoch,
                layer=sample.unit.layer,
                x_RD=sample.x_1D,
                assignments=Assignments(
                    ((_part(sample.unit, number, len(copy)), 1),), torch.tensor([0]), torch.ones(1)
                ),
            )
            compute = self._channel(worker).stream_stream(f"/{rpc.EXPERT_SERVICE}/Compute")
            replies = compute(iter([wire.joined(wire.encode_call(call))]), timeout=ANSWER_TIMEOUT_S)
            reply = wire.decode_reply(next(replies))
            is_ours = reply.incarnation == worker.incarnation
            if reply.error or not is_ours or reply.sums_RD.shape != sample.x_1D.shape:
                return None
            output_1D = reply.sums_RD if output_1D is None else output_1D + reply.sums_RD
        return output_1D

    def _is_damaged(self, worker: WorkerInfo, unit: Unit) -> bool:
        """Have a worker look at its weights; it drops them if they have changed."""
        verify = self._channel(worker).unary_unary(
            f"/{rpc.EXPERT_SERVICE}/Verify",
            request_serializer=expert_pb2.VerifyRequest.SerializeToString,
            response_deserializer=expert_pb2.VerifyReply.FromString,
        )
        request = expert_pb2.VerifyRequest(**unit._asdict())
        return bool(verify(request, timeout=ANSWER_TIMEOUT_S).is_damaged)

    def _channel(self, worker: WorkerInfo) -> grpc.Channel:
        if worker not in self._channels:
            if len(self._channels) >= rpc.MAX_STREAMS:  # most of them to workers long gone
                self._channels.pop(next(iter(self._channels))).close()
            security = self._identity.security
            self._channels[worker] = rpc.new_channel(worker.address, security, "worker")
        return self._channels[worker]


def _part(unit: Unit, number: int, num_slices: int) -> Unit:
    return unit._replace(slice_number=number, num_slices=num_slices)
