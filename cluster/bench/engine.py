"""`bench engine`: the head's engine on synthetic prompts, in this process, without HTTP or Ray.

Experts are in this process (no workers), or on worker processes over gRPC on loopback. Settings
take turns within each round, for a shared machine drifts: compare what one command has printed.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cluster.bench.memory import above, pss_bytes
from cluster.bench.profile import StepRecorder, mean_parts
from cluster.bench.workers import Worker, connected, makers_for, running_workers
from cluster.config import ServeConfig
from cluster.errors import BenchError, ConfigurationError
from cluster.head.engine import Engine
from cluster.head.events import Event
from cluster.head.scheduler import Scheduler
from cluster.head.sequence import Sequence as EngineSequence
from cluster.head.stopwatch import Stopwatch
from cluster.metrics import HeadMetrics
from cluster.planning import plan
from cluster.step_stats import StepStats
from model.blocks import BlockPool
from model.decoder import Decoder
from model.experts import Experts, LocalExperts
from model.phases import UNWATCHED
from model.sampling_params import SamplingParams
from model.weights import Checkpoint, torch_dtype

ANSWER_TIMEOUT_S = 600.0
"""For a long prompt on a slow CPU."""

OnProgress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """What to measure."""

    folder: Path
    dtype: str | None
    quantization: str | None
    num_threads: int
    """Of this process."""
    worker_threads: int
    """Of each worker."""
    workers: Sequence[int]
    """Numbers of workers to compare; 0: experts in this process."""
    num_slices: int
    """Workers that each expert is cut over."""
    sequences: Sequence[int]
    """To decode at a time."""
    prefill: Sequence[int]
    """Lengths of prompts to compute, one at a time, tokens."""
    prompt_tokens: int
    """Of each sequence that is decoded."""
    new_tokens: int
    rounds: int
    is_profiled: bool


@dataclass(frozen=True)
class Case:
    """A phase and its size: sequences to decode, or tokens to prefill."""

    phase: str
    size: int
    num_sequences: int
    num_prompt: int
    num_new: int

    def __str__(self) -> str:
        return f"{self.phase} {self.size}"


@dataclass
class Row:
    """What one case gave with one number of workers."""

    case: Case
    num_workers: int
    tokens_per_s: list[float] = field(default_factory=list)
    """Of each round."""
    steps: list[StepStats] = field(default_factory=list)
    """Of all rounds: those of the phase that is measured."""

    @property
    def parts(self) -> dict[str, float]:
        """Mean seconds of a step by part."""
        return mean_parts(self.steps)


@dataclass(frozen=True)
class EngineReport:
    """All rows; and memory above an idle process, where one setting alone was measured."""

    dtype: str
    quantization: str | None
    num_slices: int
    rows: list[Row]
    head_bytes: int | None
    worker_bytes: list[int | None]


def measure(wanted: EnginePlan, on_progress: OnProgress) -> EngineReport:
    """Carry out a plan. Raises ConfigurationError, BenchError, PlacementError where workers cannot
    share the experts so, or what loading raises.
    """
    torch.set_num_threads(wanted.num_threads)
    idle_bytes = pss_bytes(os.getpid())
    checkpoint = Checkpoint(
        wanted.folder, dtype=torch_dtype(wanted.dtype), expert_quantization=wanted.quantization
    )
    cases = _cases(wanted, checkpoint.config.max_position_embeddings)
    stopwatch = Stopwatch() if wanted.is_profiled else None
    on_progress("loading")
    decoder = Decoder(checkpoint.config, checkpoint.load_decoder(), phases=stopwatch or UNWATCHED)
    rows = []
    with ExitStack() as stack:
        settings = [
            (number, *stack.enter_context(_experts(number, wanted, checkpoint, stopwatch)))
            for number in wanted.workers
        ]
        for case in cases:
            of_case = [Row(case, number) for number in wanted.workers]
            for round_number in range(-1, wanted.rounds):  # the first warms up
                for row, (number, experts, _) in zip(of_case, settings, strict=True):
                    on_progress(f"{case}, {number} workers, round {max(round_number, 0) + 1}")
                    _one_round(row, round_number, decoder, experts, stopwatch)
            rows += of_case
        is_alone = len(settings) == 1
        return EngineReport(
            dtype=str(checkpoint.dtype).removeprefix("torch."),
            quantization=checkpoint.expert_quantization,
            num_slices=wanted.num_slices,
            rows=rows,
            head_bytes=above(pss_bytes(os.getpid()), idle_bytes) if is_alone else None,
            worker_bytes=[w.held_bytes for w in settings[0][2]] if is_alone else [],
        )


def new_engine(
    decoder: Decoder,
    experts: Experts,
    metrics: HeadMetrics,
    stopwatch: Stopwatch | None,
    *,
    num_sequences: int,
    max_len: int,
) -> Engine:
    """An idle engine with room for these sequences at full length.

    A step takes as many tokens as it does in a served head, but never so few that prompts would
    wait for each other: sequences then decode in step.
    """
    served = ServeConfig()
    step_tokens = served.max_tokens_per_step
    if num_sequences > 1:
        step_tokens = max(step_tokens, num_sequences * max_len)
    block_size = served.block_size
    # one more each, for sequences are admitted only while those that run have one to spare
    num_blocks = num_sequences * (1 + -(-max_len // block_size))
    scheduler = Scheduler(
        BlockPool(num_blocks=num_blocks, block_size=block_size),
        max_running=num_sequences,
        max_tokens_per_step=step_tokens,
        sliding_window=decoder.config.sliding_window,
    )
    cache = decoder.new_cache(num_blocks=num_blocks, block_size=block_size)
    return Engine(
        decoder, cache, scheduler, experts, metrics, max_model_len=max_len, stopwatch=stopwatch
    )


def _cases(wanted: EnginePlan, context: int) -> list[Case]:
    """Raises ConfigurationError for a case that does not fit into the model's context."""
    cases = [
        Case("decode", number, number, wanted.prompt_tokens, wanted.new_tokens)
        for number in wanted.sequences
    ]
    cases += [Case("prefill", length, 1, length, 1) for length in wanted.prefill]
    for case in cases:
        needed = case.num_prompt + case.num_new - 1  # the last token is never computed
        if needed > context:
            raise ConfigurationError(
                f"{case} needs a context of {needed} tokens, the model has {context}"
            )
    return cases


@contextmanager
def _experts(
    num_workers: int, wanted: EnginePlan, checkpoint: Checkpoint, stopwatch: Stopwatch | None
) -> Iterator[tuple[Experts, list[Worker]]]:
    """All experts, in this process or on workers."""
    config = checkpoint.config
    if num_workers == 0:
        yield LocalExperts(checkpoint.load_experts(config.expert_units)), []
        return
    table = plan(
        num_layers=config.num_hidden_layers,
        num_experts=config.num_local_experts,
        expert_bytes=[checkpoint.expert_bytes] * num_workers,
        budgets=[None] * num_workers,
        num_slices=wanted.num_slices,
    )
    makers = makers_for(
        wanted.folder,
        table,
        num_workers,
        dtype=wanted.dtype,
        quantization=wanted.quantization,
    )
    with running_workers(makers, num_threads=wanted.worker_threads) as workers:
        experts = connected(
            workers,
            table,
            (config, checkpoint.dtype),
            stopwatch or UNWATCHED,
            timeout_s=ANSWER_TIMEOUT_S,
        )
        try:
            yield experts, workers
        finally:
            experts.close()


class _Finish:
    """An outbox that notes when every sequence has its first token, and stops the engine when all
    have ended."""

    def __init__(self, engine: Engine, num_sequences: int) -> None:
        self._engine = engine
        self._num_sequences = self._num_open = num_sequences
        self._begun: set[int] = set()
        self.first_s = 0.0
        self.last_s = 0.0
        self.num_after_first = 0
        """Tokens that came when all had begun."""
        self.error: str | None = None

    def put(self, events: Sequence[Event]) -> None:
        now = time.perf_counter()
        if self.first_s:
            self.num_after_first += sum(len(event.token_ids) for event in events)
        for event in events:
            if event.token_ids:
                self._begun.add(event.key)
            if event.finish or event.error:
                self._num_open -= 1
            self.error = self.error or event.error
        if not self.first_s and len(self._begun) == self._num_sequences:
            self.first_s = now
        if not self._num_open:
            self.last_s = now
            self._engine.stop()


def _one_round(
    row: Row, round_number: int, decoder: Decoder, experts: Experts, stopwatch: Stopwatch | None
) -> None:
    """Run all sequences of a case to their ends; a round below 0 is short, and leaves no trace."""
    case = row.case
    if round_number < 0:
        case = replace(case, num_prompt=min(case.num_prompt, 64), num_new=min(case.num_new, 2))
    recorder = StepRecorder()
    engine = new_engine(
        decoder,
        experts,
        recorder,
        stopwatch,
        num_sequences=case.num_sequences,
        max_len=case.num_prompt + case.num_new,
    )
    finish = _Finish(engine, case.num_sequences)
    params = SamplingParams(max_tokens=case.num_new, temperature=0.0)
    rng = random.Random(f"{case}/{round_number}")
    for key in range(case.num_sequences):
        prompt = rng.choices(range(decoder.config.vocab_size), k=case.num_prompt)
        engine.submit(finish, key, EngineSequence(prompt, params))
    if stopwatch:
        stopwatch.take()
    started = time.perf_counter()
    engine.run()
    if finish.error is not None:
        raise BenchError(f"{case} with {row.num_workers} workers failed: {finish.error}")
    if round_number < 0:
        return
    if case.phase == "prefill":
        row.tokens_per_s.append(case.num_prompt / (finish.first_s - started))
        row.steps += recorder.steps
    else:
        row.tokens_per_s.append(finish.num_after_first / (finish.last_s - finish.first_s))
        # the step that computes the prompts is none of decoding
        row.steps += [s for s in recorder.steps if s.num_tokens == s.num_sequences]
