"""Stand-ins for the parts of a cluster, made by hand: no sockets, no Ray, no clock."""

import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from collections.abc import Sequence as Many
from contextlib import contextmanager

import torch
from torch import Tensor

from cluster import wire
from cluster.bench.profile import StepRecorder
from cluster.errors import CallRefusedError, ExpertFailedError, ExpertsUnavailableError
from cluster.head.engine import Engine
from cluster.head.events import Event
from cluster.head.masks import GrammarMasks
from cluster.head.micro_batches import MicroBatches
from cluster.head.scheduler import Scheduler
from cluster.head.stopwatch import Stopwatch
from cluster.placement import Placement, WorkerInfo, held_by
from cluster.rpc import Identity
from model import Mixtral
from model.batch import Batch
from model.blocks import BlockPool
from model.classify import Classifier
from model.decoder import Decoder, Trace
from model.experts import Computed, Experts, ExpertWeights, PendingRows, weighted_sums
from model.grammar import GrammarCompiler
from model.kv_cache import KVCache
from model.router import Routing
from model.units import Unit
from protos import expert_pb2

DEADLINE_S = 30.0
"""Longest wait of a test for another thread; only a hang comes near it."""

Weights = Mapping[Unit, ExpertWeights]


# --- a head's surroundings ---


class MemoryOutbox:
    """Keeps all events. Its hook runs on the engine's thread, so what it does is well-timed."""

    def __init__(self, on_event: Callable[[Event], None] = lambda event: None) -> None:
        self.puts: list[list[Event]] = []
        self.on_event = on_event
        self._changed = threading.Condition()

    def put(self, events: Many[Event]) -> None:
        for event in events:
            self.on_event(event)
        with self._changed:
            self.puts.append(list(events))
            self._changed.notify_all()

    @property
    def events(self) -> list[Event]:
        return [event for events in self.puts for event in events]

    def of(self, key: int) -> list[Event]:
        """Everything that was said of one request."""
        return [event for event in self.events if event.key == key]

    def ids(self, key: int) -> list[int]:
        return [token_id for event in self.of(key) for token_id in event.token_ids]

    def has_ended(self, key: int) -> bool:
        return any(event.finish or event.error is not None for event in self.of(key))

    def wait_for_end(self, *keys: int) -> None:
        """Return once these requests have ended, well or badly."""
        with self._changed:
            ended = self._changed.wait_for(
                lambda: all(self.has_ended(key) for key in keys), DEADLINE_S
            )
        assert ended, f"requests {keys} have not all ended: {self.events}"


class FailingExperts:
    """Experts that raise at the given calls, counted from 1, and otherwise compute."""

    def __init__(self, experts: Experts, *, fail_at: Iterable[int]) -> None:
        self._experts = experts
        self._fail_at = set(fail_at)
        self.num_calls = 0

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> PendingRows:
        self.num_calls += 1
        if self.num_calls in self._fail_at:
            raise ExpertsUnavailableError(f"call {self.num_calls} was told to fail")
        return self._experts.dispatch(layer, x_TD, routing)


class PoisonedExperts(FailingExperts):
    """Experts whose sums of the first row are NaN at the given calls."""

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> PendingRows:
        self.num_calls += 1
        sums_TD = self._experts.dispatch(layer, x_TD, routing).wait()
        if self.num_calls in self._fail_at:
            sums_TD[0] = torch.nan
        return Computed(sums_TD)


class BrokenDevice(Decoder):
    """A decoder that fails in some of its passes, counted from 1, as CUDA does."""

    def __init__(self, decoder: Decoder, *, fail_at: Container[int]) -> None:
        super().__init__(decoder.config, decoder.weights)
        self._fail_at = fail_at
        self._num_passes = 0

    def forward_in_turns(
        self,
        batches: Many[Batch],
        cache: KVCache,
        experts: Experts,
        trace: Trace | None = None,
    ) -> Tensor:
        self._num_passes += 1
        if self._num_passes in self._fail_at:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().forward_in_turns(batches, cache, experts)


class BrokenRow(Decoder):
    """A decoder that in one step, counted from 1, gives one row of logits a broken value."""

    def __init__(self, decoder: Decoder, *, step: int, row: int, value: float) -> None:
        super().__init__(decoder.config, decoder.weights)
        self._steps_left = step
        self._row = row
        self._value = value

    def forward_in_turns(
        self,
        batches: Many[Batch],
        cache: KVCache,
        experts: Experts,
        trace: Trace | None = None,
    ) -> Tensor:
        logits_SV = super().forward_in_turns(batches, cache, experts).clone()  # out of inference
        self._steps_left -= 1
        if self._steps_left == 0:
            logits_SV[self._row, 5] = self._value
        return logits_SV


class Head:
    """An engine over a whole model in this process, and all that it is made of."""

    def __init__(
        self,
        mixtral: Mixtral | Classifier,
        *,
        experts: Experts | None = None,
        decoder: Decoder | None = None,
        num_blocks: int = 64,
        block_size: int = 4,
        max_running: int = 6,
        max_tokens_per_step: int = 32,
        max_model_len: int = 128,
        grammars: GrammarCompiler | None = None,
        max_micro_batches: int = 1,
    ) -> None:
        self.pool = BlockPool(num_blocks=num_blocks, block_size=block_size)
        self.metrics = StepRecorder()
        cache = KVCache(
            mixtral.config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=mixtral.decoder.dtype,
            device=mixtral.decoder.device,
        )
        scheduler = Scheduler(
            self.pool, max_running=max_running, max_tokens_per_step=max_tokens_per_step
        )
        stopwatch = Stopwatch()
        self.engine = Engine(
            decoder or Decoder(mixtral.config, mixtral.decoder.weights, phases=stopwatch),
            cache,
            scheduler,
            experts or mixtral.experts,
            self.metrics,
            max_model_len=max_model_len,
            grammars=GrammarMasks(grammars) if grammars else None,
            stopwatch=stopwatch,
            micro_batches=MicroBatches(max_micro_batches),
        )

    @contextmanager
    def running(self) -> Iterator[Engine]:
        """The engine at work on a thread of its own; stopped at the end."""
        thread = threading.Thread(target=self.engine.run, name="engine", daemon=True)
        thread.start()
        try:
            yield self.engine
        finally:
            self.engine.stop()
            thread.join(DEADLINE_S)
        assert not thread.is_alive(), f"{self.engine} did not stop"

    def assert_all_free(self) -> None:
        """No request has left a block behind."""
        self.pool.check()
        assert self.pool.num_free == self.pool.num_blocks


# --- expert workers behind streams that lead nowhere ---


class Worker:
    """The experts that a worker holds, and what it was asked."""

    def __init__(self, info: WorkerInfo, mixtral: Mixtral) -> None:
        self.info = info
        self.held: dict[Unit, ExpertWeights] = {}
        self.calls: list[wire.Call] = []
        self.fail_at: set[int] = set()
        """Calls, counted from 1, whose answer gets lost with the connection."""
        self.refusals = 0
        """How many calls it will refuse next."""
        self.is_broken = False
        """Whether it fails to compute whatever it is asked."""
        self.patience_s: list[float] = []
        """How long each answer might have taken."""
        self.compute_s = 0.0
        """What it says that it computed for."""
        self._config = mixtral.config
        self._dtype = mixtral.decoder.dtype

    def answer(self, message: bytes) -> bytes:
        call = wire.decode_call(message, self._config, self._dtype)
        self.calls.append(call)
        if self.refusals:
            self.refusals -= 1
            return wire.joined(
                wire.encode_error(
                    call.call_id, self.info.incarnation, expert_pb2.ERROR_BUSY, "told to refuse"
                )
            )
        if self.is_broken:
            return wire.joined(
                wire.encode_error(
                    call.call_id,
                    self.info.incarnation,
                    expert_pb2.ERROR_INTERNAL,
                    "told to be broken",
                )
            )
        sums_RD = weighted_sums(self.held, call.x_RD, call.assignments)
        return wire.joined(
            wire.encode_reply(call.call_id, self.info.incarnation, sums_RD, self.compute_s)
        )


class Workers:
    """All workers that there are; `stream` stands in for `connections.WorkerStream`."""

    def __init__(self, mixtral: Mixtral, weights: Weights) -> None:
        self._mixtral = mixtral
        self._weights = weights
        self._workers: dict[WorkerInfo, Worker] = {}
        self.num_connects = 0
        self.unreachable: set[WorkerInfo] = set()

    def __getitem__(self, info: WorkerInfo) -> Worker:
        return self._workers[info]

    def place(self, placement: Placement) -> None:
        """Start the workers of a placement that do not run yet, and load what it gives each."""
        for index, info in enumerate(placement.workers):
            worker = self._workers.setdefault(info, Worker(info, self._mixtral))
            worker.held |= {unit: self._weights[unit] for unit in held_by(placement.table, index)}

    def stream(self, info: WorkerInfo, identity: Identity) -> "MemoryStream":
        if info in self.unreachable:
            raise ExpertsUnavailableError(f"{info.name} was told not to answer")
        self.num_connects += 1
        return MemoryStream(self._workers[info])


class MemoryStream:
    """A stream that answers at once, through the real bytes."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker.info
        self._worker = worker
        self._replies: list[bytes] = []
        self.is_closed = False

    @property
    def num_outstanding(self) -> int:
        return len(self._replies)

    def send(self, call: wire.Call, overdue_at: float) -> None:
        assert not self.is_closed
        self._replies.append(self._worker.answer(wire.joined(wire.encode_call(call))))

    def receive(self, call: wire.Call, overdue_at: float) -> wire.Reply:
        self._worker.patience_s.append(overdue_at - time.monotonic())
        if len(self._worker.calls) in self._worker.fail_at:
            raise ExpertsUnavailableError(f"{self.worker.name} was told to fail")
        reply = wire.decode_reply(self._replies.pop(0))
        assert reply.call_id == call.call_id
        if reply.error == expert_pb2.ERROR_INTERNAL:
            raise ExpertFailedError(reply.message)
        if reply.error:
            raise CallRefusedError(reply.message)
        return reply

    def watch(self, now: float) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


def random_rows(num_rows: int, hidden_size: int, *, seed: int) -> Tensor:
    """Rows as they leave a norm: about 1 in size."""
    return torch.randn(num_rows, hidden_size, generator=torch.Generator().manual_seed(seed))
