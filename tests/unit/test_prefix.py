"""What one sequence has computed, another need not; and nothing else is taken for it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cluster.head.prefix import chain
from cluster.head.scheduler import Scheduler
from cluster.head.sequence import Sequence
from model.blocks import BlockPool
from model.sampling_params import SamplingParams

SIZE = 4


def scheduler_of(*, num_blocks: int = 40, budget: int = 64, window: int | None = None) -> Scheduler:
    pool = BlockPool(num_blocks=num_blocks, block_size=SIZE)
    return Scheduler(pool, max_running=8, max_tokens_per_step=budget, sliding_window=window)


def run(scheduler: Scheduler, *sequences: Sequence) -> dict[Sequence, int]:
    """Add these and run them to their ends. Returns how many tokens each computed."""
    computed = dict.fromkeys(sequences, 0)
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work:
        step = scheduler.schedule()
        for chunk in step.chunks:
            computed[chunk.sequence] += chunk.num_tokens
            if chunk.samples:
                chunk.sequence.append(7)
        scheduler.commit(step.chunks)
        scheduler.check()
    return computed


def sequence_of(*token_ids: int, max_tokens: int = 1, salt: str = "") -> Sequence:
    return Sequence(list(token_ids), SamplingParams(max_tokens=max_tokens), cache_salt=salt)


@given(num_shared=st.integers(0, 30), num_own=st.integers(0, 10), num_others=st.integers(0, 10))
def test_a_sequence_computes_only_what_no_full_block_holds(
    num_shared: int, num_own: int, num_others: int
) -> None:
    shared = list(range(num_shared))
    first = sequence_of(*shared, *range(100, 101 + num_others))
    second = sequence_of(*shared, *range(200, 201 + num_own))
    scheduler = scheduler_of()
    run(scheduler, first)
    computed = run(scheduler, second)
    num_found = num_shared // SIZE * SIZE
    assert second.num_reused == num_found
    assert computed[second] == len(second.prompt_ids) - num_found


@given(length=st.integers(1, 40), num_choices=st.integers(2, 6))
def test_choices_of_one_prompt_compute_it_once(length: int, num_choices: int) -> None:
    """Asked for at once: those that come second wait for what the first computes."""
    scheduler = scheduler_of(num_blocks=100, budget=8)
    choices = [sequence_of(*range(length), max_tokens=3) for _ in range(num_choices)]
    computed = run(scheduler, *choices)
    # the prompt once, the last token of the prompt for each other, and what each emits
    assert computed[choices[0]] == length + 2
    assert [computed[choice] for choice in choices[1:]] == [1 + 2] * (num_choices - 1)
    assert [choice.num_reused for choice in choices] == [0] + [length - 1] * (num_choices - 1)


@given(length=st.integers(5, 40), num_emitted=st.integers(1, 12))
def test_a_conversation_goes_on_from_what_was_emitted(length: int, num_emitted: int) -> None:
    scheduler = scheduler_of()
    first = sequence_of(*range(length), max_tokens=num_emitted)
    run(scheduler, first)
    second = sequence_of(*first.token_ids, 900, 901)
    run(scheduler, second)
    # the last emitted token was never computed
    assert second.num_reused == (length + num_emitted - 1) // SIZE * SIZE


def test_what_is_being_computed_is_waited_for_and_others_go_on() -> None:
    scheduler = scheduler_of(budget=8)
    producer, follower = (sequence_of(*range(24)) for _ in range(2))
    stranger = sequence_of(*range(50, 60))
    for sequence in (producer, follower, stranger):
        scheduler.add(sequence)
    step = scheduler.schedule()
    assert set(scheduler.running) == {producer, stranger}
    assert follower in scheduler.waiting
    scheduler.commit(step.chunks)
    scheduler.abort(producer)
    scheduler.schedule()
    assert follower in scheduler.running
    assert follower.num_reused == 8  # what the producer had computed until then


def test_other_salts_share_nothing() -> None:
    scheduler = scheduler_of()
    run(scheduler, sequence_of(*range(20), salt="one"))
    other, same = sequence_of(*range(20), salt="other"), sequence_of(*range(20), salt="one")
    run(scheduler, other, same)
    assert (other.num_reused, same.num_reused) == (0, 19)


def test_what_was_used_last_is_kept_longest() -> None:
    scheduler = scheduler_of(num_blocks=8)
    old, recent = sequence_of(*range(8)), sequence_of(*range(100, 108))
    run(scheduler, old)
    run(scheduler, recent)
    run(scheduler, sequence_of(*range(200, 214)))  # five blocks: four were never used
    again, gone = sequence_of(*range(100, 108)), sequence_of(*range(8))
    run(scheduler, again)
    assert again.num_reused == 7
    run(scheduler, gone)
    assert gone.num_reused is not None
    assert gone.num_reused < 7


def test_a_window_needs_only_the_blocks_in_sight() -> None:
    window = 6
    scheduler = scheduler_of(window=window)
    run(scheduler, sequence_of(*range(30)))
    again = sequence_of(*range(30), 99)
    scheduler.add(again)
    step = scheduler.schedule()
    assert again.num_reused == 28
    assert again.table.first >= (30 - window) // SIZE - 1
    assert [chunk.num_tokens for chunk in step.chunks] == [3]
    assert len(again.table.blocks) <= 4


@given(blocks=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), max_size=6))
def test_a_chain_of_keys_names_all_that_came_before(blocks: list[list[int]]) -> None:
    def keys_of(blocks: list[list[int]]) -> list[bytes]:
        keys = [b""]
        for block in blocks:
            keys.append(chain(keys[-1], block))
        return keys

    keys = keys_of(blocks)
    assert len(set(keys)) == len(keys)
    for index, block in enumerate(blocks):
        changed = [*blocks[:index], [block[0] + 1, block[1]], *blocks[index + 1 :]]
        other = keys_of(changed)
        assert other[: index + 1] == keys[: index + 1]
        assert not set(other[index + 1 :]) & set(keys)
    assert all(one != other for one, other in pairwise(keys))


def test_a_replay_that_finds_more_than_its_prompt_expects_nothing_of_it() -> None:
    """Behind a window the prompt's blocks are gone by then; others would wait for them in vain."""
    scheduler = scheduler_of(window=6)
    prompt = list(range(6))
    first = sequence_of(*prompt, max_tokens=30)
    run(scheduler, first)
    replay = Sequence(prompt, SamplingParams(max_tokens=40), first.token_ids[6:])
    run(scheduler, replay)
    assert replay.num_reused is not None
    assert replay.num_reused > len(prompt) + 6
    third = sequence_of(*prompt, max_tokens=2)
    run(scheduler, third)
    assert third.finish == "length"
