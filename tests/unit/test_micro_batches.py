"""How many micro-batches a step gets is what was measured to be the fastest, and nothing else."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.head.micro_batches import FIRST_TRIAL_AFTER, LAST_TRIAL_AFTER, MicroBatches
from model.batch import Span, split_spans

NUM_TOKENS = 32
LONG = 3_000
"""Steps after which what is to be found has been found."""


def run(
    chooser: MicroBatches,
    seconds_of: Callable[[int], float],
    *,
    num_steps: int = LONG,
    hidden: float = 0.5,
    num_tokens: int = NUM_TOKENS,
) -> list[int]:
    """The numbers of micro-batches of so many steps, which take as long as is said."""
    numbers = []
    for _ in range(num_steps):
        numbers.append(chooser.choose(num_tokens))
        seconds = seconds_of(numbers[-1])
        phases = {"experts": hidden * seconds / 2, "transfer": hidden * seconds / 2}
        chooser.observe(num_tokens, numbers[-1], seconds, phases)
    return numbers


@given(times=st.lists(st.sampled_from([0.5, 0.8, 1.0, 1.25, 2.0]), min_size=4, max_size=4))
def test_it_ends_where_neither_more_nor_less_is_faster(times: Sequence[float]) -> None:
    numbers = run(MicroBatches(4), lambda number: times[number - 1])
    best = max(set(numbers[LONG // 2 :]), key=numbers[LONG // 2 :].count)
    for other in (best - 1, best + 1):
        if 1 <= other <= 4:
            assert times[best - 1] <= times[other - 1] / 0.9


def test_where_more_never_pays_trials_become_rare() -> None:
    numbers = run(MicroBatches(4), float)
    assert numbers[:FIRST_TRIAL_AFTER] == [1] * FIRST_TRIAL_AFTER
    late = numbers[LONG // 2 :]
    assert sum(number > 1 for number in late) < 0.03 * len(late)
    assert set(late) <= {1, 2}
    assert 2 in run(MicroBatches(4), float, num_steps=2 * LAST_TRIAL_AFTER)


def test_nothing_is_tried_where_there_is_nothing_to_hide() -> None:
    assert set(run(MicroBatches(4), lambda number: 1 / number, hidden=0.05)) == {1}


def test_a_change_of_the_link_is_found_out() -> None:
    chooser = MicroBatches(2)
    assert run(chooser, lambda number: 1 / number)[-1] == 2
    assert run(chooser, float)[-100:].count(1) > 80


def test_noise_below_the_threshold_changes_nothing() -> None:
    numbers = run(MicroBatches(2), lambda number: 1.0 if number == 1 else 0.97)
    assert numbers.count(2) < 0.1 * len(numbers)


def test_steps_of_other_sizes_are_chosen_for_apart() -> None:
    chooser = MicroBatches(4)
    run(chooser, lambda number: 1 / number)
    assert chooser.choose(NUM_TOKENS) == 4
    assert chooser.choose(8 * NUM_TOKENS) == 1


@given(most=st.integers(1, 8), num_tokens=st.integers(1, 9))
def test_never_more_than_tokens_or_than_allowed(most: int, num_tokens: int) -> None:
    chooser = MicroBatches(most)
    numbers = run(chooser, lambda number: 1 / number, num_steps=300, num_tokens=num_tokens)
    assert 1 <= min(numbers) <= max(numbers) <= min(most, num_tokens)


spans = st.builds(
    lambda length, start, logits: Span(
        list(range(start, start + length)), start, [0], num_logits=min(length, logits)
    ),
    st.integers(1, 9),
    st.integers(0, 99),
    st.integers(0, 9),
)


@given(whole=st.lists(spans, min_size=1, max_size=6), number=st.integers(1, 9))
def test_cutting_keeps_every_token_and_logit_in_order(whole: list[Span], number: int) -> None:
    parts = split_spans(whole, number)
    pieces = [span for part in parts for span in part]

    def tokens(spans: Sequence[Span]) -> list[tuple[int, bool]]:
        """Position, which is the token too, and whether its logits are wanted."""
        return [
            (token_id, index >= len(span.token_ids) - span.num_logits)
            for span in spans
            for index, token_id in enumerate(span.token_ids)
        ]

    assert tokens(pieces) == tokens(whole)
    assert all(span.token_ids[0] == span.start for span in pieces)
    sizes = [sum(len(span.token_ids) for span in part) for part in parts]
    assert len(parts) == min(number, sum(sizes))
    assert max(sizes) - min(sizes) <= 1


def test_no_span_is_cut_where_it_need_not_be() -> None:
    spans = [Span([1, 2], 0, [0]), Span([3, 4], 0, [1])]
    assert split_spans(spans, 2) == [[spans[0]], [spans[1]]]
    assert split_spans(spans, 1) == [spans]


@pytest.mark.parametrize("number", [2, 3])
def test_a_prompt_is_cut_by_its_tokens(number: int) -> None:
    parts = split_spans([Span(list(range(6)), 10, [0, 1], num_logits=1)], number)
    each = 6 // number
    assert [span.start for (span,) in parts] == list(range(10, 16, each))
    assert [span.num_logits for (span,) in parts] == [0] * (number - 1) + [1]
