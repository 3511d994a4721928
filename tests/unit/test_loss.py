"""The losses are transformers' and behave as their papers say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.errors import PromptError
from model.loss import (
    IGNORED,
    load_balancing_loss,
    next_token_loss,
)


@given(
    num_layers=st.integers(1, 4),
    num_tokens=st.integers(1, 40),
    num_experts=st.integers(2, 8),
    data=st.data(),
)
def test_the_load_balancing_loss_is_transformers(
    num_layers: int, num_tokens: int, num_experts: int, data: st.DataObject
) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    top_k = data.draw(st.integers(1, min(4, num_experts)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = tuple(
        3 * torch.randn(num_tokens, num_experts, generator=generator) for _ in range(num_layers)
    )
    expected = load_balancing_loss_func(logits, num_experts, top_k)
    assert abs(load_balancing_loss(logits, top_k=top_k) - expected) <= 1e-5


def test_the_load_balancing_loss_grows_from_top_k_to_the_number_of_experts() -> None:
    even = torch.eye(8).repeat(4, 1) * 1e-6  # each expert is the best of as many tokens
    assert float(load_balancing_loss([even], top_k=1)) == pytest.approx(1)
    collapsed = torch.zeros(32, 8)
    collapsed[:, 3] = 50.0
    assert float(load_balancing_loss([collapsed], top_k=1)) == pytest.approx(8)


def test_each_row_is_judged_by_the_next_label_of_its_own_sequence() -> None:
    logits = torch.full((5, 4), -50.0)
    for row, next_id in enumerate([2, 3, 0, 1, 0]):  # sequences of three and of two tokens
        logits[row, next_id] = 0.0
    assert float(next_token_loss(logits, [[0, 2, 3], [3, 1]])) == pytest.approx(0, abs=1e-6)
    assert float(next_token_loss(logits, [[0, 2, 3], [3, 0]])) == pytest.approx(50 / 3)
    assert float(next_token_loss(logits, [[0, 2, 3], [3, IGNORED]])) == pytest.approx(0, abs=1e-6)
    assert math.isnan(next_token_loss(logits, [[0, IGNORED, IGNORED], [3, IGNORED]]))


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PromptError, match="3 labels do not fit 2 tokens"):
        next_token_loss(torch.zeros(2, 4), [[0, 1, 2]])
    for label in (4, -1):
        with pytest.raises(PromptError, match=f"label {label} is out of vocabulary"):
            next_token_loss(torch.zeros(2, 4), [[0, label]])
