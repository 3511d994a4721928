"""Parameters out of their bounds are refused by name; the bounds themselves work."""

from typing import Any

import pytest
import torch

from model.errors import SamplingError
from model.row import Row
from model.sampler import sample
from model.sampling_params import MAX_LOGPROBS, MAX_SEED, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 101.0),
        ("repetition_penalty", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("typical_p", 0.0),
        ("typical_p", 1.1),
        ("typical_p", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("seed", MAX_SEED + 1),
        ("seed", -MAX_SEED - 2),
        ("choice", -1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("inf")),
        ("logit_bias", ((3, 100.5),)),
        ("logit_bias", ((3, float("nan")),)),
        ("logit_bias", ((3, 1.0), (3, 2.0))),
        ("logit_bias", ((-1, 1.0),)),
        ("bad_words", ((1, 2), ())),
        ("bad_words", ((1, -2),)),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (3, -1)),
        ("logprobs", -1),
        ("logprobs", MAX_LOGPROBS + 1),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", MAX_LOGPROBS + 1),
    ],
)
def test_a_parameter_out_of_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=field) as refused:
        SamplingParams(**{field: value})
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0.0),
        ("temperature", 100.0),
        ("top_k", 0),
        ("min_tokens", 16),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 100.0),
        ("min_p", 1.0),
        ("typical_p", 1e-9),
        ("top_p", 1e-9),
        ("top_p", 1.0),
        ("seed", MAX_SEED),
        ("seed", -MAX_SEED - 1),
        ("choice", 0),
        ("frequency_penalty", -2.0),
        ("presence_penalty", 2.0),
        ("logit_bias", ((3, 100.0), (7, -100.0))),
        ("bad_words", ((1, 2), (7,))),
        ("allowed_token_ids", (7,)),
        ("logprobs", 0),
        ("logprobs", MAX_LOGPROBS),
    ],
)
def test_the_bounds_themselves_can_be_sampled(field: str, value: Any) -> None:
    params = SamplingParams(**{field: value})
    assert sample(torch.zeros(1, 40), [Row(params, [1], 1)]).token_ids[0] in range(40)


@pytest.mark.parametrize(
    ("field", "value"),
    [("logit_bias", ((40, 1.0),)), ("bad_words", ((3, 40),)), ("allowed_token_ids", (39, 40))],
)
def test_an_id_out_of_vocabulary_is_refused_by_name(field: str, value: Any) -> None:
    params = SamplingParams(**{field: value})
    params.check_vocabulary(41)
    with pytest.raises(SamplingError, match="40 is out of vocabulary") as refused:
        params.check_vocabulary(40)
    assert refused.value.field == field
