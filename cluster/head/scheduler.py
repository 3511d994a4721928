"""Who computes how much in the next step. Pure: no clock, no I/O, no torch.

There is no prefill phase and no decode phase. Every sequence has tokens that are known and tokens
that are computed, and each step lets computed chase known within a budget of tokens. A decoding
sequence chases one token; a fresh prompt chases all of its own, in chunks of what the budget
leaves. (The idea is that of vLLM's first V1 scheduler.)

Collaborators decide the rest: whose turn it is (`waiting`), what need not be computed (`prefix`),
what a sequence is likely to say next (`drafts`).
"""

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from cluster.head.prefix import Match, PrefixCache
from cluster.head.sequence import Sequence
from cluster.head.waiting import WaitingQueue
from model.batch import Span
from model.blocks import BlockPool, BlockTable, blocks_of_sequence


@dataclass(frozen=True, eq=False)
class Chunk:
    """What one sequence computes in a step.

    num_tokens: known tokens.
    drafts:     guesses of the tokens after them, only where the chunk samples.
    """

    sequence: Sequence
    num_tokens: int
    samples: bool
    """Whether computed catches up with known, so that a new token can be drawn."""
    drafts: tuple[int, ...] = ()

    @property
    def num_logits(self) -> int:
        """How many of its last tokens' logits are wanted."""
        if self.computes_prompt_logprobs:
            return self.num_tokens
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def computes_prompt_logprobs(self) -> bool:
        """Whether it computes tokens of a prompt whose log-probabilities are wanted."""
        sequence = self.sequence
        wants = sequence.params.prompt_logprobs is not None
        return wants and sequence.num_computed < len(sequence.prompt_ids)

    def span(self) -> Span:
        """The same for the model."""
        start, table = self.sequence.num_computed, self.sequence.table
        token_ids = self.sequence.token_ids[start : start + self.num_tokens]
        return Span(
            token_ids=[*token_ids, *self.drafts] if self.drafts else token_ids,
            start=start,
            blocks=table.blocks,
            num_logits=self.num_logits,
            first_block=table.first,
        )


@dataclass(frozen=True)
class Copy:
    """Keys and values of the first `num_tokens` slots of a block, to be copied to another's."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True)
class Step:
    """The next step's work: copies first, then one forward pass over all chunks."""

    chunks: list[Chunk]
    copies: list[Copy]
    num_reused: int
    """Tokens of sequences that begin which need not be computed, since they are cached."""
    num_preempted: int


class Scheduler:
    """Admits sequences when blocks are free for what they know, and hands out each step's tokens.

    When blocks run out, the running sequence that came last gives its own back and waits to be
    computed again. Owned by the engine's thread. Mutable state: `waiting`, `running`, the pool and
    the prefix cache.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        max_tokens_per_step: int,
        sliding_window: int | None = None,
    ) -> None:
        """sliding_window: of the model; a sequence then holds no more blocks than it can see.

        Raises ValueError if a step could not give every running sequence a token: those that
        compute a prompt would starve behind those that decode.
        """
        if max_tokens_per_step < max_running:
            raise ValueError(
                f"max_tokens_per_step ({max_tokens_per_step}) must not be below the "
                f"{max_running} sequences that may run"
            )
        self.pool = pool
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self._prefixes = PrefixCache(pool, sliding_window)
        self._max_running = max_running
        self._max_tokens_per_step = max_tokens_per_step
        self._window = sliding_window

    def __repr__(self) -> str:
        return f"Scheduler({len(self.running)} running, {len(self.waiting)} waiting, {self.pool})"

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def fill(self, num_tokens: int, num_sequences: int) -> float:
        """How full such a step is: of the tokens or of the sequences that it may have."""
        return max(num_tokens / self._max_tokens_per_step, num_sequences / self._max_running)

    def can_ever_fit(self, sequence: Sequence) -> bool:
        """Whether the whole cache would hold this sequence."""
        return self._blocks_of(sequence.max_len) <= self.pool.num_blocks

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. It must be able to fit."""
        assert self.can_ever_fit(sequence), f"{sequence.max_len} tokens never fit in {self.pool}"
        self.waiting.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; nothing happens if it has ended."""
        if sequence in self.running:
            self._end(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def forget_content(self, sequence: Sequence) -> None:
        """Let nobody reuse what a running sequence has computed, or shares: it proved wrong."""
        self.pool.forget(sequence.table.blocks)

    def check(self) -> None:
        """Raise AssertionError if a block is lost or doubled, or is owned by nobody who runs."""
        self.pool.check([sequence.table.blocks for sequence in self.running])
        if not self.running:
            self._prefixes.check()

    def schedule(self) -> Step:
        """The next step's work; its chunks are empty only when there is none.

        Sequences that are about to emit go first, each in its turn; prompts take what is left, and
        drafts what is then left.
        """
        num_running = len(self.running)
        copies = self._admit()
        num_reused = sum(sequence.num_computed for sequence in self.running[num_running:])
        budget = self._max_tokens_per_step
        chunks: list[Chunk] = []
        preempted: list[Sequence] = []
        queue = deque(sorted(self.running, key=lambda s: (s.num_to_compute > 1, s.arrival)))
        while queue and budget:
            sequence = queue.popleft()
            num_to_compute = sequence.num_to_compute
            num_tokens = min(num_to_compute, budget)
            while not sequence.table.grow(sequence.num_computed + num_tokens):
                # never one that has its chunk already: those that came before come first
                victim = max([sequence, *queue], key=lambda s: s.arrival)
                self._preempt(victim)
                preempted.append(victim)
                if victim is sequence:
                    break
                queue.remove(victim)
            else:
                chunks.append(Chunk(sequence, num_tokens, samples=num_tokens == num_to_compute))
                budget -= num_tokens
        return Step(
            self._with_drafts(chunks, budget),
            [copy for sequence, copy in copies.items() if sequence not in preempted],
            num_reused,
            len(preempted),
        )

    def commit(self, chunks: Many[Chunk]) -> None:
        """Record a computed step.

        Each chunk that samples has been given at least one token by then (`Sequence.append`), and
        one more for each draft that proved right. Sequences that end leave here.
        """
        for chunk in chunks:
            sequence = chunk.sequence
            num_new = sequence.num_to_compute - chunk.num_tokens if chunk.samples else 0
            sequence.num_computed += chunk.num_tokens + max(0, num_new - 1)
            self._prefixes.publish(sequence)
            if self._window is not None:
                sequence.table.drop_before(sequence.num_computed - self._window + 1)
            if num_new:
                self.waiting.charge(sequence, num_new)
            if sequence.finish:
                self._end(sequence)

    def _admit(self) -> dict[Sequence, Copy]:
        copies: dict[Sequence, Copy] = {}
        if len(self.running) >= self._max_running:
            return copies
        for sequence in self.waiting.in_turn():
            match = self._prefixes.match(sequence)
            if match is None:
                continue
            if not self._has_room(sequence, match):
                break  # nobody overtakes it: the blocks that it needs would never come together
            copy = self._start(sequence, match)
            if copy:
                copies[sequence] = copy
            if len(self.running) >= self._max_running:
                break
        return copies

    def _has_room(self, sequence: Sequence, match: Match) -> bool:
        """Whether blocks are free for all that is known of it, beside one more for each that runs:
        else it would soon push another out, or be pushed out itself.
        """
        num_cached = sum(map(self.pool.is_cached, match.shared))
        num_taken = self._num_missing(sequence, match) + num_cached
        return num_taken + len(self.running) <= self.pool.num_free

    def _num_missing(self, sequence: Sequence, match: Match) -> int:
        """Blocks of its own for the known tokens, or as many of them as it can see at once."""
        num_known = len(sequence.token_ids)
        whole = self.pool.blocks_for(num_known) - match.first
        return min(whole, self._blocks_of(num_known)) - len(match.shared)

    def _start(self, sequence: Sequence, match: Match) -> Copy | None:
        self.waiting.take(sequence)
        self.running.append(sequence)
        sequence.table = BlockTable(self.pool, match.shared, match.first)
        sequence.num_computed = match.num_tokens
        sequence.num_published = match.first + len(match.shared)
        has_room = sequence.table.extend(self._num_missing(sequence, match))
        assert has_room, f"{sequence} was admitted without room in {self.pool}"
        self._prefixes.begin(sequence)
        if sequence.num_reused is None:
            sequence.num_reused = match.num_tokens
            self.waiting.charge(sequence, len(sequence.token_ids) - match.num_tokens)
        if match.copied is None:
            return None
        target = sequence.table.blocks[len(match.shared)]
        return Copy(match.copied, target, match.num_tokens % self.pool.block_size)

    def _preempt(self, sequence: Sequence) -> None:
        self._end(sequence)
        sequence.num_computed = 0
        self.waiting.put_back(sequence)

    def _end(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._prefixes.end(sequence)
        sequence.table.release()

    def _with_drafts(self, chunks: list[Chunk], budget: int) -> list[Chunk]:
        """The same, with drafts where the budget and the free blocks allow any."""
        drafted = []
        for chunk in chunks:
            sequence = chunk.sequence
            drafts: tuple[int, ...] = ()
            may_draft = chunk.samples and not chunk.computes_prompt_logprobs
            if may_draft and sequence.drafter and budget:
                limit = min(budget, sequence.params.max_tokens - sequence.num_emitted - 1)
                drafts = sequence.drafter.propose(sequence.token_ids, limit)
                end = sequence.num_computed + chunk.num_tokens + len(drafts)
                if not sequence.table.grow(end):
                    drafts = ()
                budget -= len(drafts)
            drafted.append(replace(chunk, drafts=drafts) if drafts else chunk)
        return drafted

    def _blocks_of(self, num_tokens: int) -> int:
        return blocks_of_sequence(
            num_tokens,
            self.pool.block_size,
            window=self._window,
            max_new=self._max_tokens_per_step,
        )
