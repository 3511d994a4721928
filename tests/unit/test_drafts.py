"""A draft is what once followed the same tokens, and costs no second look at old tokens."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.head.drafts import LookupDrafter


@given(
    token_ids=st.lists(st.integers(0, 3), max_size=60),
    limit=st.integers(0, 6),
    asked_at=st.sets(st.integers(0, 60)),
)
def test_a_draft_is_what_followed_the_longest_match_when_it_was_last_seen(
    token_ids: list[int], limit: int, asked_at: set[int]
) -> None:
    """Whenever it was asked before."""
    drafter = LookupDrafter(4)
    for length in sorted(asked_at):
        drafter.propose(token_ids[:length], limit)
    expected: tuple[int, ...] = ()
    for size in (3, 2):
        ends = [
            end
            for end in range(size, len(token_ids))
            if token_ids[end - size : end] == token_ids[-size:]
        ]
        if ends:
            expected = tuple(token_ids[ends[-1] : ends[-1] + min(limit, 4)])
            break
    assert drafter.propose(token_ids, limit) == expected


def test_a_story_told_again_is_guessed() -> None:
    drafter = LookupDrafter(8)
    story = [1, 5, 9, 7, 3, 4, 8, 2]
    assert drafter.propose([*story, 6, 1, 5], 8) == (9, 7, 3, 4, 8, 2, 6, 1)
    assert drafter.propose([*story, 6, 1, 5], 2) == (9, 7)
    assert LookupDrafter(8).propose(story, 8) == ()
