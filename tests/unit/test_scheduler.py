"""The scheduler hands out every token once, in order, within its budget, whatever happens."""

from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.head.drafts import LookupDrafter
from cluster.head.scheduler import Chunk, Scheduler, Step
from cluster.head.sequence import Sequence
from model.batch import Span, slots_of
from model.blocks import BlockPool
from model.sampling_params import SamplingParams

STOP_ID = 0
WORD_ID = 1
_SALTS = count()


@dataclass(eq=False)
class Scripted(Sequence):
    """A sequence that draws a stop token as its stops_after-th."""

    stops_after: int = 10**6

    @property
    def next_draw(self) -> int:
        return STOP_ID if self.num_emitted + 1 >= self.stops_after else WORD_ID


def sequence_of(
    prompt_len: int,
    max_tokens: int,
    *,
    stops_after: int = 10**6,
    salt: str | None = None,
    **fields: Any,
) -> Scripted:
    """Shares no prefix with any other, unless salted alike."""
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP_ID,))
    own_salt = f"{next(_SALTS)}" if salt is None else salt
    return Scripted(
        [WORD_ID] * prompt_len, params, stops_after=stops_after, cache_salt=own_salt, **fields
    )


def scheduler_of(
    *, num_blocks: int = 64, block_size: int = 4, max_running: int = 8, budget: int = 16
) -> Scheduler:
    pool = BlockPool(num_blocks=num_blocks, block_size=block_size)
    return Scheduler(pool, max_running=max_running, max_tokens_per_step=budget)


def compute(scheduler: Scheduler, step: Step) -> None:
    """Commit a step with made-up draws."""
    for chunk in step.chunks:
        if chunk.samples and isinstance(chunk.sequence, Scripted):
            chunk.sequence.append(chunk.sequence.next_draw)
    scheduler.commit(step.chunks)


def step(scheduler: Scheduler) -> list[Chunk]:
    """One step with made-up draws. Returns what was computed."""
    step = scheduler.schedule()
    compute(scheduler, step)
    return step.chunks


def work_of(sequence: Sequence) -> int:
    """Tokens to compute from start to end: all but the last drawn one."""
    return sequence.max_len - 1


# --- random runs ---


@dataclass(frozen=True)
class Arrival:
    """What happens before a step: a new sequence, and how long it will live."""

    prompt: list[int]
    max_tokens: int
    salt: str
    client: str
    priority: int
    num_drafts: int
    aborted_after: int | None
    """Steps from its arrival on until it is aborted."""


ARRIVALS = st.builds(
    Arrival,
    prompt=st.lists(st.integers(1, 2), min_size=1, max_size=20),
    max_tokens=st.integers(1, 12),
    salt=st.sampled_from(["", "", "own"]),
    client=st.sampled_from("ab"),
    priority=st.integers(-1, 1),
    num_drafts=st.sampled_from([0, 3]),
    aborted_after=st.none() | st.integers(0, 8),
)
TRACES = st.lists(st.lists(ARRIVALS, max_size=3), max_size=12)
"""Of each step, what arrives before it."""


def says_next(salt: str, token_ids: list[int]) -> int:
    """A model: what follows depends on all that came before, and is often predictable."""
    return 1 + sum(token_ids[-2:]) % 3 if len(token_ids) % 5 else STOP_ID


Content = tuple[str, tuple[int, ...]]
"""Whose keys and values a slot holds: those of the last of these tokens, after the others."""


class Memory:
    """A KV cache that knows what every slot holds, so that every look at it can be checked."""

    def __init__(self, block_size: int, window: int | None) -> None:
        self.block_size = block_size
        self.window = window
        self.slots: dict[int, Content] = {}

    def run(self, step: Step) -> None:
        """Copy and compute as the step says; every token must see its own past, and only that."""
        size = self.block_size
        copied = {
            copy.target * size + i: self.slots[copy.source * size + i]
            for copy in step.copies
            for i in range(copy.num_tokens)
        }
        self.slots |= copied
        written: set[int] = set()
        for chunk in step.chunks:
            known = self._known(chunk)
            span = chunk.span()
            slots = self._slots(span, span.start, span.end)
            assert not written & set(slots), "two sequences write to one slot"
            written |= set(slots)
            for position, slot in enumerate(slots, start=span.start):
                self.slots[slot] = (chunk.sequence.cache_salt, known[: position + 1])
        for chunk in step.chunks:
            known, span = self._known(chunk), chunk.span()
            first = 0 if self.window is None else max(0, span.start - self.window + 1)
            for position, slot in enumerate(self._slots(span, first, span.end), start=first):
                expected = (chunk.sequence.cache_salt, known[: position + 1])
                assert self.slots[slot] == expected, f"{chunk} sees another's past at {position}"

    def _known(self, chunk: Chunk) -> tuple[int, ...]:
        return (*chunk.sequence.token_ids, *chunk.drafts)

    def _slots(self, span: Span, start: int, end: int) -> list[int]:
        return slots_of(span.blocks, self.block_size, start, end, span.first_block)


@settings(max_examples=60)
@given(
    trace=TRACES,
    num_blocks=st.integers(8, 24),  # 32 tokens and more: every arrival fits in time
    max_running=st.integers(1, 6),
    budget=st.integers(6, 24),
    window=st.sampled_from([None, None, 5]),
)
def test_every_law_holds_over_random_runs(
    trace: list[list[Arrival]], num_blocks: int, max_running: int, budget: int, window: int | None
) -> None:
    """Sharing, copying, preemption, drafts, windows and aborts, all at once."""
    size = 4
    pool = BlockPool(num_blocks=num_blocks, block_size=size)
    scheduler = Scheduler(
        pool, max_running=max_running, max_tokens_per_step=budget, sliding_window=window
    )
    memory = Memory(size, window)
    arrived: list[Sequence] = []
    aborted: set[Sequence] = set()
    due: dict[Sequence, int] = {}
    total_work = sum(len(a.prompt) + a.max_tokens for arrivals in trace for a in arrivals)

    for now in range(len(trace) + 4 * total_work + 1):
        for arrival in trace[now] if now < len(trace) else []:
            sequence = Sequence(
                arrival.prompt,
                SamplingParams(max_tokens=arrival.max_tokens, stop_token_ids=(STOP_ID,)),
                client=arrival.client,
                priority=arrival.priority,
                cache_salt=arrival.salt,
                drafter=LookupDrafter(arrival.num_drafts) if arrival.num_drafts else None,
            )
            scheduler.add(sequence)
            arrived.append(sequence)
            if arrival.aborted_after is not None:
                due[sequence] = now + arrival.aborted_after
        for sequence in [s for s, when in due.items() if when == now]:
            if not sequence.finish:
                aborted.add(sequence)
            scheduler.abort(sequence)
            scheduler.check()

        step = scheduler.schedule()
        scheduler.check()
        # the budget holds, no step is empty while there is work, nobody is in it twice
        assert sum(chunk.num_tokens + len(chunk.drafts) for chunk in step.chunks) <= budget
        assert bool(step.chunks) == scheduler.has_work
        assert len({chunk.sequence for chunk in step.chunks}) == len(step.chunks)
        assert len(scheduler.running) <= max_running
        for chunk in step.chunks:
            assert chunk.num_tokens >= 1
            num_left = chunk.sequence.num_to_compute - chunk.num_tokens
            assert chunk.samples == (num_left == 0)
        memory.run(step)

        for chunk in step.chunks:
            guesses = list(chunk.drafts)
            while chunk.samples and not chunk.sequence.finish:
                token_id = says_next(chunk.sequence.cache_salt, chunk.sequence.token_ids)
                chunk.sequence.append(token_id)
                if not guesses or guesses.pop(0) != token_id:
                    break
        scheduler.commit(step.chunks)
        scheduler.check()
        # whoever has ended is gone
        for sequence in arrived:
            is_known = sequence in scheduler.running or sequence in scheduler.waiting
            assert is_known == (sequence.finish is None and sequence not in aborted)
        if now >= len(trace) and not scheduler.has_work:
            break

    # everybody has ended, and said what it would have said alone
    assert not scheduler.has_work
    assert pool.num_free == num_blocks
    for sequence in arrived:
        alone = list(sequence.prompt_ids)
        for _ in range(sequence.num_emitted):
            alone.append(says_next(sequence.cache_salt, alone))
        assert sequence.token_ids == alone
        assert sequence.finish or sequence in aborted


# --- who goes first ---


@given(prompt_len=st.integers(1, 100), budget=st.integers(1, 40), num_others=st.integers(0, 5))
def test_a_prompt_takes_no_more_steps_than_its_chunks(
    prompt_len: int, budget: int, num_others: int
) -> None:
    """Beside decoding sequences, which take one token each, it gets all the rest."""
    budget += num_others
    scheduler = scheduler_of(num_blocks=200, budget=budget, max_running=num_others + 1)
    for _ in range(num_others):
        scheduler.add(sequence_of(1, 100))
    step(scheduler)
    late = sequence_of(prompt_len, 1)
    scheduler.add(late)
    num_steps = 0
    while not late.finish:
        step(scheduler)
        num_steps += 1
    assert num_steps == -(-prompt_len // (budget - num_others))


@given(
    num_decoding=st.integers(1, 7),
    prompt_len=st.integers(2, 120),
    spare=st.integers(1, 9),
    prompt_is_first=st.booleans(),
)
def test_a_long_prompt_does_not_keep_a_decoding_sequence_from_its_token(
    num_decoding: int, prompt_len: int, spare: int, prompt_is_first: bool
) -> None:
    """Not even a prompt that was there before."""
    scheduler = scheduler_of(
        num_blocks=500, budget=num_decoding + spare, max_running=num_decoding + 1
    )
    decoding = [sequence_of(1, 50) for _ in range(num_decoding)]
    long = sequence_of(prompt_len, 5)
    for sequence in [long, *decoding] if prompt_is_first else [*decoding, long]:
        scheduler.add(sequence)
    for num_steps in range(1, 20):
        step(scheduler)
        assert [sequence.num_emitted for sequence in decoding] == [num_steps] * num_decoding


def test_prompts_are_computed_in_their_order_of_arrival() -> None:
    scheduler = scheduler_of(budget=4, max_running=3)
    sequences = [sequence_of(6, 3) for _ in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    first_token_at: dict[Sequence, int] = {}
    for now in range(20):
        step(scheduler)
        for sequence in sequences:
            if sequence.num_emitted:
                first_token_at.setdefault(sequence, now)
    assert list(first_token_at) == sequences
    assert list(first_token_at.values()) == sorted(first_token_at.values())


def test_a_sequence_that_must_wait_for_blocks_is_not_overtaken() -> None:
    scheduler = scheduler_of(num_blocks=4, block_size=4)
    running, large, small = sequence_of(8, 4), sequence_of(8, 4), sequence_of(1, 1)
    for sequence in (running, large, small):
        scheduler.add(sequence)
    step(scheduler)
    assert scheduler.running == [running]
    assert large in scheduler.waiting
    assert small in scheduler.waiting
    while not running.finish:
        step(scheduler)
    step(scheduler)
    assert scheduler.running[0] is large


@pytest.mark.parametrize(("max_running", "budget"), [(8, 8), (8, 16), (4, 4), (2, 2)])
def test_new_arrivals_do_not_starve_a_sequence_that_runs(max_running: int, budget: int) -> None:
    """However many one-token prompts keep coming, which look like decoding sequences."""
    scheduler = scheduler_of(num_blocks=1_000, max_running=max_running, budget=budget)
    patient = sequence_of(30, 2)
    scheduler.add(patient)
    num_steps = 0
    while not patient.finish and num_steps < 500:
        while len(scheduler.waiting) < max_running:
            scheduler.add(sequence_of(1, 20))
        step(scheduler)
        num_steps += 1
    assert patient.finish, f"{patient.num_emitted} tokens in {num_steps} steps: {scheduler}"


@pytest.mark.parametrize(("max_running", "budget"), [(3, 2), (8, 7)])
def test_a_budget_that_would_let_a_prompt_starve_is_refused(max_running: int, budget: int) -> None:
    with pytest.raises(ValueError, match=f"{budget}.* must not be below the {max_running} "):
        scheduler_of(max_running=max_running, budget=budget)


@given(
    max_running=st.integers(1, 5),
    budget=st.integers(5, 9),
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
)
def test_a_sequence_ends_within_the_work_of_those_before_it_and_its_own(
    max_running: int, budget: int, lengths: list[tuple[int, int]]
) -> None:
    scheduler = scheduler_of(num_blocks=50, max_running=max_running, budget=budget)
    sequences = [sequence_of(*length) for length in lengths]
    for sequence in sequences:
        scheduler.add(sequence)
    num_steps = 0
    for index, sequence in enumerate(sequences):
        # no step is empty, and only those admitted with it can take a step's tokens from it
        bound = sum(work_of(s) for s in sequences[: index + max_running])
        while not sequence.finish:
            step(scheduler)
            num_steps += 1
            assert num_steps <= bound


# --- bounds ---


def test_max_running_bounds_how_many_run_at_once() -> None:
    scheduler = scheduler_of(max_running=3, budget=100)
    for _ in range(7):
        scheduler.add(sequence_of(2, 3))
    seen = []
    while scheduler.has_work:
        seen.append(len(step(scheduler)))
    assert seen == [3, 3, 3, 3, 3, 3, 1, 1, 1]


@given(
    num_blocks=st.integers(1, 6),
    block_size=st.integers(1, 5),
    prompt_len=st.integers(1, 30),
    max_tokens=st.integers(1, 10),
)
def test_exactly_what_the_whole_cache_holds_can_ever_fit(
    num_blocks: int, block_size: int, prompt_len: int, max_tokens: int
) -> None:
    scheduler = scheduler_of(num_blocks=num_blocks, block_size=block_size)
    sequence = sequence_of(prompt_len, max_tokens)
    fits = prompt_len + max_tokens <= num_blocks * block_size
    assert scheduler.can_ever_fit(sequence) == fits
    if not fits:
        with pytest.raises(AssertionError, match="never fit"):
            scheduler.add(sequence)
        return
    scheduler.add(sequence)
    while scheduler.has_work:
        step(scheduler)
    assert sequence.finish == "length"


# --- aborts ---


def test_an_abort_ends_waiting_and_running_alike() -> None:
    scheduler = scheduler_of(max_running=1)
    running, waiting = sequence_of(4, 4), sequence_of(4, 4)
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler)
    scheduler.abort(waiting)
    scheduler.abort(running)
    assert not scheduler.has_work
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert scheduler.schedule().chunks == []


def test_an_abort_of_what_has_ended_changes_nothing() -> None:
    scheduler = scheduler_of()
    ended, other = sequence_of(1, 1), sequence_of(1, 5)
    scheduler.add(ended)
    scheduler.add(other)
    step(scheduler)
    assert ended.finish == "length"
    scheduler.abort(ended)
    scheduler.abort(ended)
    assert scheduler.running == [other]
    scheduler.pool.check()


def test_a_stop_token_ends_a_sequence_only_once_it_is_drawn() -> None:
    sequence = Sequence([STOP_ID, STOP_ID], SamplingParams(max_tokens=3, stop_token_ids=(STOP_ID,)))
    assert sequence.finish is None
    sequence.token_ids.append(WORD_ID)
    assert sequence.finish is None
    sequence.token_ids.append(STOP_ID)
    assert sequence.finish == "stop"


def test_the_scheduler_shows_its_state() -> None:
    scheduler = scheduler_of(max_running=1, num_blocks=4)
    scheduler.add(sequence_of(4, 4))
    scheduler.add(sequence_of(4, 4))
    step(scheduler)
    shown = "Scheduler(1 running, 1 waiting, BlockPool(3 free of 4 x 4 tokens))"
    assert repr(scheduler) == shown


def test_a_priority_pushes_nobody_of_another_client_out() -> None:
    scheduler = scheduler_of(num_blocks=6, block_size=4, budget=8)
    modest = sequence_of(7, 12, client="modest")
    pushy = sequence_of(7, 12, client="pushy", priority=-1_000)
    scheduler.add(modest)
    scheduler.add(pushy)
    planned = scheduler.schedule()
    while not planned.num_preempted:
        assert planned.chunks
        compute(scheduler, planned)
        planned = scheduler.schedule()
    assert scheduler.running == [modest]
