"""Log-probabilities are those of the model, whatever the sampling parameters do to its logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.logprobs import prompt_logprobs
from model.row import Row
from model.sampler import sample
from model.sampling_params import MAX_LOGPROBS, SamplingParams, TokenLogprobs
from tests.sampling_oracle import ranking


def check(found: TokenLogprobs, logits_V: torch.Tensor, token_id: int, num_top: int) -> None:
    """Against log_softmax and a full sort."""
    logprobs_V = logits_V.log_softmax(-1)
    top_ids = tuple(ranking(logits_V.tolist())[:num_top])
    assert found.logprob == logprobs_V[token_id].item()
    assert found.rank == 1 + sum(x > logits_V[token_id] for x in logits_V)
    assert found.top_ids == top_ids
    assert found.top_logprobs == tuple(logprobs_V[list(top_ids)].tolist())


@given(
    vocab_size=st.sampled_from([20, 100, 500]),
    num_tops=st.lists(st.integers(0, MAX_LOGPROBS), min_size=1, max_size=4),
    has_ties=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_logprobs_are_log_softmax_and_its_full_ranking(
    vocab_size: int, num_tops: list[int], has_ties: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_SV = 3 * torch.randn(len(num_tops), vocab_size, generator=generator)
    if has_ties:
        logits_SV = (logits_SV / 3).round()  # many more of each than are asked for
    rows = [
        Row(SamplingParams(temperature=3.0, logit_bias=((5, 4.0),), seed=i, logprobs=num), [1], 1)
        for i, num in enumerate(num_tops)
    ]
    sampled = sample(logits_SV, rows)
    for logits_V, token_id, found, num in zip(
        logits_SV, sampled.token_ids, sampled.logprobs, num_tops, strict=True
    ):
        assert found is not None
        assert token_id is not None
        check(found, logits_V, token_id, num)


def test_only_rows_that_ask_get_logprobs() -> None:
    rows = [Row(SamplingParams(logprobs=num), [1], 1) for num in (None, 0, 2, None)]
    found = sample(torch.randn(4, 50), rows).logprobs
    assert [len(own.top_ids) for own in found if own] == [0, 2]
    assert [own is None for own in found] == [True, False, False, True]


@pytest.mark.parametrize("num_top", [0, 5])
def test_prompt_logprobs_are_those_of_the_tokens_that_follow(num_top: int) -> None:
    # more positions than are looked at together
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(300, 40, generator=generator)
    next_ids = torch.randint(40, (300,), generator=generator).tolist()
    found = prompt_logprobs(logits_NV, next_ids, num_top)
    assert len(found) == 300
    for own, logits_V, token_id in zip(found, logits_NV, next_ids, strict=True):
        check(own, logits_V, token_id, num_top)
