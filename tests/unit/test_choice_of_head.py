"""Which head a request goes to."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.ingress.choice import (
    BLOCK_TOKENS,
    TOKENS_PER_REQUEST,
    PrefixMemory,
    Standing,
    block_keys,
    cost,
)

IDLE = Standing(num_requests=0, num_waiting=0, num_free_tokens=10_000, num_shared=0)
COUNT = st.integers(0, 500)
STANDING = st.builds(Standing, COUNT, COUNT, st.integers(0, 2_000), st.just(0))


def test_the_one_with_fewer_requests_costs_less() -> None:
    assert cost(IDLE, 100) < cost(Standing(1, 0, 10_000, 0), 100)


def test_a_queue_costs_more_than_the_same_requests_running() -> None:
    assert cost(Standing(8, 0, 10_000, 0), 100) < cost(Standing(8, 3, 10_000, 0), 100)


def test_a_shared_beginning_makes_up_for_some_neighbours_but_not_for_many() -> None:
    shared = 4 * TOKENS_PER_REQUEST
    for num_requests, wins in ((3, True), (5, False)):
        warm = Standing(num_requests, 0, 10_000, shared)
        assert (cost(warm, 500) < cost(IDLE, 500)) == wins


def test_room_comes_before_everything_else() -> None:
    full = Standing(0, 0, num_free_tokens=50, num_shared=0)
    busy = Standing(60, 0, num_free_tokens=100, num_shared=0)
    assert cost(busy, 100) < cost(full, 100)
    # what is there already needs no room
    assert cost(Standing(0, 0, 50, num_shared=64), 100) < cost(busy, 100)


@given(standing=STANDING, num_tokens=st.integers(1, 2_000), more=st.integers(1, 100))
def test_it_never_pays_to_be_busier_fuller_or_colder(
    standing: Standing, num_tokens: int, more: int
) -> None:
    worse = Standing(
        standing.num_requests + more,
        standing.num_waiting,
        standing.num_free_tokens - more,
        standing.num_shared,
    )
    warmer = Standing(standing.num_requests, standing.num_waiting, standing.num_free_tokens, more)
    assert cost(warmer, num_tokens) < cost(standing, num_tokens) < cost(worse, num_tokens)


# --- what is remembered of a head ---

IDS = list(range(10 * BLOCK_TOKENS))


def test_as_many_tokens_are_shared_as_begin_alike() -> None:
    memory = PrefixMemory(10_000)
    memory.remember(block_keys(IDS, ""))
    for num_alike in (0, 1, BLOCK_TOKENS, 3 * BLOCK_TOKENS + 5, len(IDS)):
        other = [*IDS[:num_alike], *(499 for _ in range(40))]
        whole_blocks = num_alike // BLOCK_TOKENS * BLOCK_TOKENS
        assert memory.num_shared(block_keys(other, "")) == whole_blocks


def test_another_salt_shares_nothing() -> None:
    memory = PrefixMemory(10_000)
    memory.remember(block_keys(IDS, "mine"))
    assert memory.num_shared(block_keys(IDS, "mine")) == len(IDS)
    assert memory.num_shared(block_keys(IDS, "")) == 0


def test_the_same_tokens_after_others_are_not_the_same() -> None:
    keys = block_keys([*IDS[:BLOCK_TOKENS], *IDS[:BLOCK_TOKENS]], "")
    assert len(set(keys)) == 2


@given(
    prompts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 200)), max_size=20),
    num_tokens=st.integers(0, 400),
)
def test_no_more_is_remembered_than_the_head_holds_and_the_newest_stays(
    prompts: list[tuple[int, int]], num_tokens: int
) -> None:
    memory = PrefixMemory(num_tokens)
    for start, length in prompts:
        keys = block_keys(range(start, start + length), "")
        memory.remember(keys)
        assert len(memory) <= num_tokens // BLOCK_TOKENS
        assert memory.num_shared(keys) == min(len(keys), num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
