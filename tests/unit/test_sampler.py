"""Choices are those of the definitions and of transformers, and belong to their request alone."""

import random
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.draw import draw
from model.penalties import process
from model.philox import uniform_numbers
from model.ranking import ranked_probabilities
from model.row import Row, pack_mask
from model.sampler import sample
from model.sampling_params import MAX_SEED, SamplingParams
from tests.sampling_oracle import ranking

# --- whose draw it is ---

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 10_000]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    typical_p=st.sampled_from([0.5, 1.0, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.5]),
    frequency_penalty=st.sampled_from([-1.0, 0.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, 2.0]),
    logit_bias=st.sampled_from([(), ((3, 5.0), (150, -100.0))]),
    bad_words=st.sampled_from([(), ((7,), (1, 2))]),
    allowed_token_ids=st.sampled_from([None, tuple(range(0, 200, 3))]),
    min_tokens=st.sampled_from([0, 4]),
    stop_token_ids=st.sampled_from([(), (3, 7), (199, 5_000)]),
    logprobs=st.sampled_from([None, 0, 3]),
    seed=st.integers(-MAX_SEED - 1, MAX_SEED),
    choice=st.integers(0, 1_000),
)


@given(
    params=st.lists(PARAMS, min_size=1, max_size=8),
    vocab_size=st.sampled_from([200, 1_031]),
    logits_seed=st.integers(0, 2**32),
)
def test_a_choice_depends_on_its_own_request_alone(
    params: list[SamplingParams], vocab_size: int, logits_seed: int
) -> None:
    generator = torch.Generator().manual_seed(logits_seed)
    logits_SV = 3 * torch.randn(len(params), vocab_size, generator=generator)
    rng = random.Random(logits_seed)
    pasts = [rng.choices(range(200), k=rng.randint(1, 12)) for _ in params]
    masks = {
        i: pack_mask(rng.sample(range(vocab_size), 50), vocab_size)
        for i in range(0, len(params), 2)
    }

    def rows() -> list[Row]:
        return [Row(p, past, min(len(past), 5)) for p, past in zip(params, pasts, strict=True)]

    before = logits_SV.clone()
    together = sample(logits_SV, rows(), masks)
    shaped_SV = process(logits_SV, rows(), masks)
    for i, row in enumerate(rows()):
        own_mask = {0: masks[i]} if i in masks else {}
        alone = sample(logits_SV[i : i + 1], [row], own_mask)
        assert (alone.token_ids, alone.logprobs) == (
            together.token_ids[i : i + 1],
            together.logprobs[i : i + 1],
        )
        assert process(logits_SV[i : i + 1], [row], own_mask)[0].equal(shaped_SV[i])
    assert logits_SV.equal(before)


# --- what may be drawn ---


def sample_one(logits: list[float], params: SamplingParams) -> int | None:
    return sample(torch.tensor([logits]), [Row(params, [0], 1)]).token_ids[0]


LOGITS = st.lists(
    # few values, so that many are equal; far apart, so that some probabilities vanish
    st.one_of(st.integers(-3, 3).map(float), st.floats(-200, 200, width=32)),
    min_size=1,
    max_size=12,
)


@given(logits=LOGITS, seed=st.integers(0, MAX_SEED))
def test_greedy_is_argmax(logits: list[float], seed: int) -> None:
    params = SamplingParams(temperature=0.0, seed=seed, top_p=0.5, top_k=2)
    assert sample_one(logits, params) == ranking(logits)[0]


@given(logits=LOGITS, top_k=st.integers(1, 15), seed=st.integers(0, MAX_SEED))
def test_top_k_never_picks_outside_the_k_likeliest(
    logits: list[float], top_k: int, seed: int
) -> None:
    params = SamplingParams(temperature=5.0, top_k=top_k, seed=seed)
    assert sample_one(logits, params) in ranking(logits)[:top_k]


@given(logits=LOGITS, top_p=st.floats(0.01, 1.0), seed=st.integers(0, MAX_SEED))
def test_top_p_never_picks_outside_the_smallest_set_that_reaches_p(
    logits: list[float], top_p: float, seed: int
) -> None:
    params = SamplingParams(temperature=1.0, top_p=top_p, seed=seed)
    order = ranking(logits)
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(-1)[order].tolist()
    mass_before = [0.0, *accumulate(probabilities)]
    # 1e-9: where a sum lands on p but for its rounding, either set is right
    kept = [
        token_id for token_id, mass in zip(order, mass_before, strict=False) if mass < top_p + 1e-9
    ]
    assert sample_one(logits, params) in kept


@pytest.mark.parametrize("vocab_size", [50, 300])
@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 5e-324])
def test_a_vanishing_temperature_is_greedy(temperature: float, vocab_size: int) -> None:
    logits_SV = torch.randn(20, vocab_size, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(20)]
    assert draw(logits_SV, params, [3] * 20) == logits_SV.argmax(-1).tolist()


# --- as transformers ---


def transformers_scores(logits_SV: Tensor, row: Row) -> Tensor:
    """What transformers' `generate` would draw from: its processors, in its order."""
    from transformers.generation import logits_process as theirs

    params = row.params
    processors: list[Any] = []
    if params.logit_bias:
        biases = {(token_id,): bias for token_id, bias in params.logit_bias}
        processors.append(theirs.SequenceBiasLogitsProcessor(biases))
    if params.repetition_penalty != 1.0:
        processors.append(theirs.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.bad_words:
        words = [list(word) for word in params.bad_words]
        processors.append(theirs.NoBadWordsLogitsProcessor(words))
    if params.min_tokens:
        processors.append(
            theirs.MinNewTokensLengthLogitsProcessor(
                row.num_prompt_tokens, params.min_tokens, torch.tensor(params.stop_token_ids)
            )
        )
    if params.temperature:
        processors.append(theirs.TemperatureLogitsWarper(params.temperature))
        processors.append(theirs.TopKLogitsWarper(params.top_k or logits_SV.shape[1]))
        processors.append(theirs.TopPLogitsWarper(params.top_p))
        processors.append(theirs.MinPLogitsWarper(params.min_p))
        if params.typical_p < 1.0:
            processors.append(theirs.TypicalLogitsWarper(params.typical_p))
    ids = torch.tensor([list(row.token_ids)])
    for processor in processors:
        logits_SV = processor(ids, logits_SV)
    return logits_SV


@given(
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.3, 1.0, 2.5]),
        top_k=st.sampled_from([0, 1, 7, 30]),
        top_p=st.floats(0.05, 1.0),
        min_p=st.floats(0.0, 1.0),
        typical_p=st.floats(0.05, 1.0),
        repetition_penalty=st.floats(0.3, 3.0),
        min_tokens=st.sampled_from([0, 3, 4]),
        max_tokens=st.just(9),
        stop_token_ids=st.just((1, 4)),
    ),
    seed=st.integers(0, 2**32),
)
def test_weights_are_what_transformers_draws_from(params: SamplingParams, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # in float64, so that no sum lands on the other side of a bound by its rounding
    logits_SV = 3 * torch.randn(1, 40, generator=generator, dtype=torch.float64)
    row = Row(params, torch.randint(40, (8,), generator=generator).tolist(), num_prompt_tokens=5)
    expected = transformers_scores(logits_SV, row).softmax(dim=-1)
    weights_SV, ids_SV = ranked_probabilities(process(logits_SV, [row]), [params])
    actual = torch.zeros_like(expected).scatter(1, ids_SV, weights_SV / weights_SV.sum())
    assert torch.allclose(actual, expected, atol=1e-12)


@given(
    repetition_penalty=st.floats(0.1, 10.0),
    min_tokens=st.integers(0, 8),
    bad_words=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple), max_size=3),
    logit_bias=st.dictionaries(st.integers(0, 5), st.floats(-100, 100, width=32), max_size=6),
    seed=st.integers(0, 2**32),
)
def test_greedy_looks_back_as_transformers_does(
    repetition_penalty: float,
    min_tokens: int,
    bad_words: list[tuple[int, ...]],
    logit_bias: dict[int, float],
    seed: int,
) -> None:
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=repetition_penalty,
        min_tokens=min_tokens,
        bad_words=tuple(bad_words),
        logit_bias=tuple(logit_bias.items()),
        stop_token_ids=(6, 8),
    )
    generator = torch.Generator().manual_seed(seed)
    logits_SV = torch.randn(1, 9, generator=generator)
    row = Row(params, torch.randint(6, (8,), generator=generator).tolist(), num_prompt_tokens=5)
    expected = transformers_scores(logits_SV, row)
    assert process(logits_SV, [row]).equal(expected)
    assert sample(logits_SV, [row]).token_ids == expected.argmax(-1).tolist()


# --- how often ---


def chi_square(observed: Any, probabilities: Any) -> float:
    expected = probabilities * observed.sum()
    return float(((observed - expected) ** 2 / expected).sum())


def expected_distribution(logits_V: Tensor, params: SamplingParams) -> Any:
    """By the definitions, one token after the other."""
    if params.min_p or params.typical_p < 1.0:
        scores = transformers_scores(logits_V[None].double(), Row(params, [0], 1))
        return scores[0].softmax(-1).numpy()
    scaled = (logits_V.double() / params.temperature).softmax(-1).tolist()
    kept, mass = {}, 0.0
    for token_id in ranking(scaled)[: params.top_k or len(scaled)]:
        kept[token_id] = scaled[token_id]
    total = sum(kept.values())
    nucleus = {}
    for token_id, probability in kept.items():
        if mass < params.top_p:
            nucleus[token_id] = probability
        mass += probability / total
    probabilities = np.array([nucleus.get(token_id, 0.0) for token_id in range(len(scaled))])
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("varied", ["seed", "choice", "position"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.8},
        {"min_p": 0.2},
        {"typical_p": 0.2},  # leaves out the likeliest token
    ],
    ids=str,
)
def test_draws_follow_the_stated_probabilities(varied: str, fields: dict[str, Any]) -> None:
    num_draws = 5_000
    logits_V = torch.randn(16, generator=torch.Generator().manual_seed(1))
    positions = list(range(num_draws)) if varied == "position" else [11] * num_draws
    params = [
        SamplingParams(**fields, **({} if varied == "position" else {varied: number}))
        for number in range(num_draws)
    ]
    drawn = draw(logits_V.expand(num_draws, -1), params, positions)

    expected = expected_distribution(logits_V, params[0])
    observed = np.bincount(drawn, minlength=16)
    possible = expected > 0
    assert not observed[~possible].any()
    # 15 degrees of freedom at most, p = 5e-5; the seeds are fixed, so this never fails by chance
    assert chi_square(observed[possible], expected[possible]) < 46


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    numbers = uniform_numbers([SamplingParams(seed=seed) for seed in range(5_000)], [7] * 5_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    observed, _ = np.histogram(numbers, bins=50, range=(0, 1))
    assert chi_square(observed, np.full(50, 0.02)) < 97  # 49 degrees of freedom, p = 5e-5
