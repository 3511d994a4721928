"""Scores become probabilities as vLLM and transformers mean them, and padding is no text."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.labels import probabilities, trim_padding

LOGITS = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6)


@given(logits=LOGITS)
def test_probabilities_are_torchs(logits: list[float]) -> None:
    exact = torch.tensor(logits, dtype=torch.float64)
    shared = exact.sigmoid() if len(logits) == 1 else exact.softmax(0)
    assert probabilities(logits, None) == pytest.approx(shared.tolist(), abs=1e-12)
    each = probabilities(logits, "multi_label_classification")
    assert each == pytest.approx(exact.sigmoid().tolist(), abs=1e-12)
    assert probabilities(logits, "regression") == logits
    assert all(math.isfinite(p) and 0 <= p <= 1 for p in each)


@pytest.mark.parametrize(
    ("ids", "pad", "kept"),
    [
        ([5, 6, 0, 0], 0, [5, 6]),
        ([0, 5, 0, 6, 0], 0, [0, 5, 0, 6]),
        ([0, 0, 0], 0, [0]),
        ([], 0, []),
        ([5, 0], None, [5, 0]),
        ([5, 0], -1, [5, 0]),
    ],
)
def test_only_padding_at_the_end_goes(ids: list[int], pad: int | None, kept: list[int]) -> None:
    assert trim_padding(ids, pad) == kept
