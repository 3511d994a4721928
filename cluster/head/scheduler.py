"""Who computes how much in the next step. Pure: no clock, no I/O, no torch.

There is no prefill phase and no decode phase. Every sequence has tokens that are known and tokens
that are computed, and each step lets computed chase known within a budget of tokens. A decoding
sequence chases one token; a fresh prompt chases all of its own, in chunks of what the budget
leaves. (The idea is that of vLLM's first V1 scheduler.)

A sequence is admitted when blocks for its longest possible end are free, so nothing ever has to be
evicted once it runs.
"""

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass

from cluster.head.classification import Classification
from cluster.head.sequence import Sequence
from model.batch import Span
from model.blocks import BlockPool, blocks_of_sequence


@dataclass(frozen=True)
class Chunk:
    """What one sequence computes in a step."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether computed catches up with known, so that a new token can be drawn."""
        return self.num_tokens == self.sequence.num_to_compute

    def span(self) -> Span:
        """The same for the model."""
        start = self.sequence.num_computed
        return Span(
            token_ids=self.sequence.token_ids[start : start + self.num_tokens],
            start=start,
            blocks=self.sequence.blocks,
            num_logits=int(self.samples),
        )


class Scheduler:
    """Admits sequences in their order of arrival and hands out each step's tokens.

    Owned by the engine's thread. Mutable state: `waiting`, `running` and the block pool.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        max_tokens_per_step: int,
        sliding_window: int | None = None,
    ) -> None:
        """sliding_window: of the model; a sequence then needs no more blocks than it can see.

        Raises ValueError if a step could not give every running sequence a token: those that
        compute a prompt would starve behind those that decode.
        """
        if max_tokens_per_step < max_running:
            raise ValueError(
                f"max_tokens_per_step ({max_tokens_per_step}) must not be below the "
                f"{max_running} sequences that may run"
            )
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._max_running = max_running
        self._max_tokens_per_step = max_tokens_per_step
        self._sliding_window = sliding_window

    def __repr__(self) -> str:
        return f"Scheduler({len(self.running)} running, {len(self.waiting)} waiting, {self.pool})"

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def can_ever_fit(self, sequence: Sequence) -> bool:
        """Whether the whole cache would hold this sequence."""
        return self._blocks_of(sequence) <= self.pool.num_blocks

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. It must be able to fit."""
        assert self.can_ever_fit(sequence), f"{sequence.max_len} tokens never fit in {self.pool}"
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; nothing happens if it has ended."""
        if sequence in self.running:
            self._end(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's work; empty only when there is none.

        Sequences that are about to emit go first, each in its turn; prompts take what is left.
        """
        self._admit()
        budget = self._max_tokens_per_step
        chunks = []
        for sequence in sorted(self.running, key=lambda s: s.num_to_compute > 1):
            if not budget:
                break
            num_tokens = min(sequence.num_to_compute, budget)
            chunks.append(Chunk(sequence, num_tokens))
            budget -= num_tokens
        return chunks

    def commit(self, chunks: Many[Chunk], token_ids: Many[int]) -> list[Sequence]:
        """Record a computed step; returns the sequences that got a token or scores, in order.

        token_ids: the drawn token of each chunk that samples, unless it is a classification's.
        Sequences that end leave here.
        """
        drawn = iter(token_ids)
        emitted = []
        for chunk in chunks:
            sequence, samples = chunk.sequence, chunk.samples
            sequence.num_computed += chunk.num_tokens
            if not samples:
                continue
            if not isinstance(sequence, Classification):
                sequence.token_ids.append(next(drawn))
            emitted.append(sequence)
            if sequence.finish:
                self._end(sequence)
        return emitted

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            blocks = self.pool.allocate(self._blocks_of(sequence))
            if blocks is None:
                return
            sequence.blocks = blocks
            self.running.append(self.waiting.popleft())

    def _blocks_of(self, sequence: Sequence) -> int:
        return blocks_of_sequence(
            sequence.max_len,
            self.pool.block_size,
            window=self._sliding_window,
            max_new=self._max_tokens_per_step,
        )

    def _end(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
