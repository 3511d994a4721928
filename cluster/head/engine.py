"""The engine: one thread that owns scheduler, KV cache and decoder, and turns requests into tokens.

Requests and aborts come in by one queue; tokens leave as one message per step and outbox. Knows no
network: whoever submits hands in the outbox.
"""

import logging
import queue
import time
from collections import defaultdict
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.errors import MaestraleError, RequestError
from cluster.head.classification import Classification
from cluster.head.drawing import Drawn, broken_chunks, draw, keep_prompt_logprobs, score
from cluster.head.events import Event, Load, Outbox, RequestKey
from cluster.head.masks import GrammarMasks
from cluster.head.micro_batches import MicroBatches
from cluster.head.probe import pass_through_every_expert
from cluster.head.scheduler import Chunk, Scheduler, Step
from cluster.head.sequence import Sequence
from cluster.head.stopwatch import Stopwatch
from cluster.metrics import HeadMetrics
from cluster.step_stats import StepStats
from model.batch import Batch, build_batch, split_spans
from model.decoder import Decoder
from model.errors import ModelError, SamplingError
from model.experts import Experts
from model.kv_cache import KVCache

logger = logging.getLogger(__name__)

CHECKED_SHARE = 0.01
"""Of the time, for looking at all blocks where the engine is idle. That takes 11 ms for 30,000
blocks, and who asks meanwhile waits."""


@dataclass(frozen=True)
class _Submit:
    outbox: Outbox
    key: RequestKey
    sequence: Sequence


@dataclass(frozen=True)
class _Abort:
    outbox: Outbox
    key: RequestKey | None
    """None: everything of this outbox."""


@dataclass(frozen=True)
class _Stop:
    pass


class Engine:
    """Continuous batching: sequences join and leave between steps.

    `run` is the owner thread's loop; `submit`, `abort`, `stop` may be called from any thread.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        scheduler: Scheduler,
        experts: Experts,
        metrics: HeadMetrics,
        *,
        max_model_len: int,
        grammars: GrammarMasks | None = None,
        stopwatch: Stopwatch | None = None,
        micro_batches: MicroBatches | None = None,
    ) -> None:
        """grammars: needed for sequences that have one.
        micro_batches: how many a step is cut into; needs a stopwatch. None: one.
        stopwatch: told by decoder and experts which phase of a step begins.
        """
        self._decoder = decoder
        self._cache = cache
        self._scheduler = scheduler
        self._experts = experts
        self._metrics = metrics
        self._max_model_len = max_model_len
        self._grammars = grammars
        self._stopwatch = stopwatch
        self._micro_batches = micro_batches or MicroBatches(1)
        self._inbox: queue.SimpleQueue[_Submit | _Abort | _Stop] = queue.SimpleQueue()
        self._requests: dict[tuple[Outbox, RequestKey], Sequence] = {}
        self._addresses: dict[Sequence, tuple[Outbox, RequestKey]] = {}
        self._is_stopping = False
        self._check_due_at = 0.0

    def __repr__(self) -> str:
        return f"Engine({self._scheduler})"

    @property
    def load(self) -> Load:
        """How busy it is. May be read from any thread, and is then of a moment ago."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        return Load(
            num_requests=len(self._requests),
            num_waiting=len(scheduler.waiting),
            num_free_tokens=pool.num_free * pool.block_size,
            num_cache_tokens=pool.num_blocks * pool.block_size,
        )

    def submit(self, outbox: Outbox, key: RequestKey, sequence: Sequence) -> None:
        """Take a request. Its events, a refusal included, go to `outbox`."""
        self._inbox.put(_Submit(outbox, key, sequence))

    def abort(self, outbox: Outbox, key: RequestKey | None = None) -> None:
        """Forget one request, or all of an outbox. No event follows."""
        self._inbox.put(_Abort(outbox, key))

    def stop(self) -> None:
        """End `run` after the step in progress; requests still open get an error."""
        self._inbox.put(_Stop())

    def run(self) -> None:
        """Work until stopped. Only an error of our own making ends it early."""
        while True:
            self._take_messages()
            if self._is_stopping:
                break
            if self._scheduler.has_work:
                self._step()
        self._fail(list(self._addresses), "the head replica is shutting down")

    def _take_messages(self) -> None:
        """Apply all queued messages; waits for one when there is nothing to compute."""
        if not self._scheduler.has_work and self._inbox.empty():
            self._check_if_due()
            self._metrics.observe_idle(num_free_blocks=self._scheduler.pool.num_free)
            self._apply(self._inbox.get())
        while not self._inbox.empty():
            self._apply(self._inbox.get())

    def _check_if_due(self) -> None:
        """Look for lost blocks, but for no more than CHECKED_SHARE of the time."""
        started = time.perf_counter()
        if started >= self._check_due_at:
            self._scheduler.check()
            ended = time.perf_counter()
            self._check_due_at = ended + (ended - started) / CHECKED_SHARE

    def _apply(self, message: _Submit | _Abort | _Stop) -> None:
        match message:
            case _Submit(outbox, key, sequence):
                self._accept(outbox, key, sequence)
            case _Abort(outbox, None):
                for address, sequence in list(self._requests.items()):
                    if address[0] is outbox:
                        self._forget(sequence)
            case _Abort(outbox, int(key)):
                aborted = self._requests.get((outbox, key))
                if aborted is not None:
                    self._forget(aborted)
            case _Stop():
                self._is_stopping = True

    def _accept(self, outbox: Outbox, key: RequestKey, sequence: Sequence) -> None:
        try:
            self._check(sequence)
            if (outbox, key) in self._requests:
                raise RequestError(400, f"request {key} is already in progress")
        except RequestError as error:
            outbox.put([Event(key, error=error.message, is_refusal=True, param=error.param)])
            return
        self._requests[outbox, key] = sequence
        self._addresses[sequence] = (outbox, key)
        self._scheduler.add(sequence)

    def _check(self, sequence: Sequence) -> None:
        """Refuse what could never be computed. The ingress has checked, but is only a peer."""
        vocab_size = self._decoder.config.vocab_size
        classifies = self._decoder.config.labels is not None
        if classifies and not isinstance(sequence, Classification):
            raise RequestError(400, "this model classifies and does not generate: use /classify")
        if not classifies and isinstance(sequence, Classification):
            raise RequestError(400, "this model generates and has no score head to classify with")
        if not sequence.prompt_ids:
            raise RequestError(400, "the prompt holds no tokens")
        if sequence.finish:
            raise RequestError(400, f"the completion has ended already ({sequence.finish})")
        if max(sequence.token_ids) >= vocab_size or min(sequence.token_ids) < 0:
            raise RequestError(400, f"a prompt id is out of vocabulary ({vocab_size} ids)")
        if sequence.max_len > self._max_model_len:
            raise RequestError(
                400,
                f"{len(sequence.prompt_ids)} prompt tokens and "
                f"{sequence.max_len - len(sequence.prompt_ids)} new ones exceed the context of "
                f"{self._max_model_len} tokens",
            )
        try:
            sequence.params.check_vocabulary(vocab_size)
        except SamplingError as error:
            raise RequestError(400, str(error), param=error.field) from error
        if not self._scheduler.can_ever_fit(sequence):
            raise RequestError(
                400, f"{sequence.max_len} tokens do not fit into the KV cache; raise kv_cache_bytes"
            )

    def _step(self) -> None:
        started = time.perf_counter()
        if self._stopwatch:
            self._stopwatch.take()  # what came before, a step that failed included
        step = self._scheduler.schedule()
        chunks = step.chunks
        try:
            batches = self._prepare(step)
            if self._grammars:
                self._grammars.begin([chunk.sequence for chunk in chunks if chunk.samples])
            built = time.perf_counter()
            logits_LV = self._decoder.forward_in_turns(batches, self._cache, self._experts)
            computed = time.perf_counter()
            broken = broken_chunks(chunks, logits_LV)
            if broken:
                logits_LV = self._without(broken, chunks, logits_LV)
                chunks = [chunk for chunk in chunks if chunk not in broken]
            if self._decoder.config.labels is not None:
                drawn = score(chunks, logits_LV)
            else:
                keep_prompt_logprobs(chunks, logits_LV)
                drawn = draw(chunks, logits_LV, self._grammars)
            sampled = time.perf_counter()
        except Exception as error:
            # These sequences are lost, whatever it was; the others and the engine go on.
            logger.exception("a step of %d sequences failed", len(chunks))
            if not isinstance(error, (MaestraleError, ModelError)):
                self._prove()
            self._fail([chunk.sequence for chunk in chunks], f"{type(error).__name__}: {error}")
            return
        self._scheduler.commit(chunks)
        self._publish([one for one in drawn if one.error is None or one.token_ids])
        for one in drawn:
            if one.error is not None:
                self._fail([one.chunk.sequence], one.error, param=one.param)
        ended = time.perf_counter()
        num_tokens = sum(batch.num_tokens for batch in batches)
        phases = self._stopwatch.take() if self._stopwatch else {}
        forward_s = computed - built
        self._micro_batches.observe(num_tokens, len(batches), forward_s, phases)
        self._metrics.observe(
            StepStats(
                num_tokens=num_tokens,
                num_sequences=len(chunks),
                num_micro_batches=len(batches),
                fill=self._scheduler.fill(num_tokens, len(chunks)),
                num_emitted=sum(len(one.token_ids) for one in drawn),
                num_reused=step.num_reused,
                num_preempted=step.num_preempted,
                num_drafted=sum(len(one.chunk.drafts) for one in drawn),
                num_accepted=sum(max(0, len(one.token_ids) - 1) for one in drawn),
                num_waiting=len(self._scheduler.waiting),
                num_free_blocks=self._scheduler.pool.num_free,
                num_blocks=self._scheduler.pool.num_blocks,
                forward_s=forward_s,
                sampling_s=sampled - computed,
                host_s=(built - started) + (ended - sampled),
                phases=phases,
            )
        )

    def _prove(self) -> None:
        """Raise if no step works any more, as after an error of CUDA's, which stays for good.

        Ending the engine breaks the streams, and what they carry goes on at another head.
        """
        try:
            pass_through_every_expert(self._decoder, self._experts)
        except (MaestraleError, ModelError):
            logger.exception("a step beside that one failed, too, but not by this head's fault")

    def _prepare(self, step: Step) -> list[Batch]:
        """Copy what is to be copied, and build the tensors of the step's micro-batches."""
        size = self._scheduler.pool.block_size
        sources: list[int] = []
        targets: list[int] = []
        for copy in step.copies:
            sources += range(copy.source * size, copy.source * size + copy.num_tokens)
            targets += range(copy.target * size, copy.target * size + copy.num_tokens)
        self._cache.copy(sources, targets)
        spans = [chunk.span() for chunk in step.chunks]
        number = self._micro_batches.choose(sum(len(span.token_ids) for span in spans))
        return [
            build_batch(part, block_size=size, device=self._decoder.device)
            for part in split_spans(spans, number)
        ]

    def _without(self, broken: list[Chunk], chunks: list[Chunk], logits_LV: Tensor) -> Tensor:
        """Fail the sequences whose logits are not numbers, so that they cost no batch mate.

        Nor anybody later: the values may have been wrong for some steps, in blocks that others can
        find. Returns the logits of the others.
        """
        for chunk in broken:
            self._scheduler.forget_content(chunk.sequence)
        self._fail([chunk.sequence for chunk in broken], "the model's logits are not finite")
        is_kept = [chunk not in broken for chunk in chunks for _ in range(chunk.num_logits)]
        return logits_LV[torch.tensor(is_kept, device=logits_LV.device)]

    def _publish(self, drawn: Many[Drawn]) -> None:
        """One message to every outbox that has news."""
        by_outbox: dict[Outbox, list[Event]] = defaultdict(list)
        for one in drawn:
            sequence = one.chunk.sequence
            outbox, key = self._addresses[sequence]
            event = Event(
                key,
                token_ids=tuple(one.token_ids),
                finish=sequence.finish,
                scores=one.scores,
                logprobs=tuple(one.logprobs),
            )
            if one.token_ids and sequence.num_emitted_here == len(one.token_ids):
                event = replace(
                    event,
                    prompt_logprobs=tuple(sequence.prompt_logprobs),
                    num_reused=sequence.num_reused,
                )
            by_outbox[outbox].append(event)
            if sequence.finish:
                self._forget(sequence)
        for outbox, events in by_outbox.items():
            outbox.put(events)

    def _fail(self, sequences: list[Sequence], message: str, *, param: str | None = None) -> None:
        """End these with an error; one message to every outbox.

        param: of all of them at fault; another head would fail as well.
        """
        by_outbox: dict[Outbox, list[Event]] = defaultdict(list)
        for sequence in sequences:
            outbox, key = self._addresses[sequence]
            event = Event(key, error=message, is_refusal=param is not None, param=param)
            by_outbox[outbox].append(event)
            self._forget(sequence)
        for outbox, events in by_outbox.items():
            outbox.put(events)

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.abort(sequence)
        del self._requests[self._addresses.pop(sequence)]
