"""What changes logits before the temperature does what it says, and no more."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.penalties import process
from model.row import Row, pack_mask
from model.sampler import sample
from model.sampling_params import SamplingParams
from tests.sampling_oracle import chosen, ends_with, shaped_logits

VOCAB_SIZE = 45  # no multiple of 32: the last word of a mask has bits to spare
IDS = st.integers(0, VOCAB_SIZE - 1)

SHAPING = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.5]),
        "frequency_penalty": st.sampled_from([-2.0, 0.0, 0.75]),
        "presence_penalty": st.sampled_from([-0.5, 0.0, 2.0]),
        "logit_bias": st.dictionaries(IDS, st.sampled_from([-100.0, -1.5, 4.0]), max_size=4).map(
            lambda biases: tuple(biases.items())
        ),
        "bad_words": st.lists(
            st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=3
        ).map(tuple),
        "allowed_token_ids": st.none() | st.sets(IDS, min_size=1, max_size=20).map(tuple),
        "min_tokens": st.integers(0, 8),
        "stop_token_ids": st.lists(st.integers(0, 60), max_size=3).map(tuple),
    }
)
MASKS = st.none() | st.sets(IDS, max_size=12)


def close(ours: Tensor, expected: list[list[float]]) -> bool:
    theirs = torch.tensor(expected, dtype=ours.dtype)
    # equal: where both are -inf their difference is not a number
    return bool(((ours == theirs) | ((ours - theirs).abs() < 1e-12)).all())


@given(
    requests=st.lists(st.tuples(SHAPING, MASKS), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_logits_are_shaped_by_the_definitions(
    requests: list[tuple[dict[str, Any], set[int] | None]], seed: int
) -> None:
    rng = random.Random(seed)
    logits_SV = torch.randn(
        len(requests),
        VOCAB_SIZE,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    params = [
        SamplingParams(**fields, temperature=rng.choice([0.0, 1.0]), seed=seed)
        for fields, _ in requests
    ]
    # few ids, so that they repeat and bad words come near to being complete
    pasts = [rng.choices(range(5), k=rng.randint(1, 12)) for _ in requests]
    rows = [Row(p, past, min(4, len(past))) for p, past in zip(params, pasts, strict=True)]
    masks = {
        i: pack_mask(sorted(mask), VOCAB_SIZE)
        for i, (_, mask) in enumerate(requests)
        if mask is not None
    }
    expected = [
        shaped_logits(logits, p, past, min(4, len(past)), mask)
        for logits, p, past, (_, mask) in zip(
            logits_SV.tolist(), params, pasts, requests, strict=True
        )
    ]
    assert close(process(logits_SV, rows, masks), expected)

    token_ids = sample(logits_SV, rows, masks).token_ids
    for token_id, shaped, p, past, (_, mask) in zip(
        token_ids, expected, params, pasts, requests, strict=True
    ):
        assert (token_id is None) == (chosen(shaped, p, 0.5) is None)
        if token_id is not None:
            assert shaped[token_id] > -torch.inf
            assert mask is None or token_id in mask
            assert not any(ends_with([*past, token_id], word) for word in p.bad_words)


@given(fields=SHAPING, seed=st.integers(0, 2**32))
def test_a_row_that_has_grown_shapes_as_a_new_one(fields: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    params = SamplingParams(**fields)
    token_ids = rng.choices(range(5), k=3)
    grown = Row(params, token_ids, num_prompt_tokens=3)
    generator = torch.Generator().manual_seed(seed)
    for num_more in (0, 1, 1, 3, 200, 1):  # several at once, as when drafts are accepted
        token_ids += rng.choices(range(300), k=num_more)
        logits_SV = torch.randn(1, 300, generator=generator)
        rebuilt = Row(params, list(token_ids), num_prompt_tokens=3)
        assert process(logits_SV, [grown]).equal(process(logits_SV, [rebuilt]))


@given(
    repetition_penalty=st.floats(0.5, 2.0),
    frequency_penalty=st.floats(-2.0, 2.0),
    presence_penalty=st.floats(-2.0, 2.0),
    seed=st.integers(0, 2**32),
)
def test_penalties_are_those_of_vllm(
    repetition_penalty: float, frequency_penalty: float, presence_penalty: float, seed: int
) -> None:
    """Against its formulas over the whole vocabulary, in its order."""
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(30, generator=generator)
    prompt_ids = torch.randint(15, (6,), generator=generator)
    emitted_ids = torch.randint(30, (9,), generator=generator)
    is_in_prompt_V = prompt_ids.bincount(minlength=30) > 0
    counts_V = emitted_ids.bincount(minlength=30)
    factors_V = torch.where(is_in_prompt_V | (counts_V > 0), repetition_penalty, 1.0)
    expected_V = torch.where(logits_V > 0, logits_V / factors_V, logits_V * factors_V)
    expected_V = expected_V - frequency_penalty * counts_V
    expected_V = expected_V - presence_penalty * (counts_V > 0)
    params = SamplingParams(
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
    )
    row = Row(params, [*prompt_ids.tolist(), *emitted_ids.tolist()], num_prompt_tokens=6)
    assert torch.allclose(process(logits_V[None], [row])[0], expected_V, rtol=1e-6, atol=1e-6)


def test_nothing_asked_for_copies_nothing() -> None:
    logits_SV = torch.randn(2, 8)
    rows = [Row(SamplingParams(top_k=3, logprobs=2), [1], 1) for _ in range(2)]
    assert process(logits_SV, rows) is logits_SV


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": (3,), "bad_words": ((3,),)},
        {"allowed_token_ids": (3, 5), "bad_words": ((3,), (1, 5))},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_forbids_everything_gets_no_token_and_costs_no_mate(
    fields: dict[str, Any], temperature: float
) -> None:
    logits_SV = torch.zeros(3, 300)
    logits_SV[:, 9] = 50.0
    mate = Row(SamplingParams(temperature=temperature, logprobs=0), [1], 1)
    stuck = Row(SamplingParams(temperature=temperature, logprobs=0, **fields), [1], 1)
    sampled = sample(logits_SV, [mate, stuck, mate])
    assert sampled.token_ids == [9, None, 9]
    assert sampled.logprobs[1] is None


def test_min_tokens_gives_way_to_a_grammar_at_its_end() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=5, stop_token_ids=(2, 4))
    row = Row(params, [1], 1)
    logits_SV = torch.arange(8.0)[None]
    assert sample(logits_SV, [row], {0: pack_mask([2, 3, 4], 8)}).token_ids == [3]
    assert sample(logits_SV, [row], {0: pack_mask([2, 4], 8)}).token_ids == [4]


def test_a_packed_mask_holds_id_i_in_bit_i_mod_32_of_word_i_div_32() -> None:
    words = pack_mask([0, 31, 33, 64], 65)
    assert words.view("<u4").tolist() == [1 | 1 << 31, 1 << 1, 1]
