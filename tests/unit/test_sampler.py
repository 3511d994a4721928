"""Draws follow the stated probabilities, and belong to their request alone."""

import random
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.errors import SamplingError
from model.sampler import (
    History,
    look_back,
    philox4x32,
    ranked_probabilities,
    sample,
    uniform_numbers,
)
from model.sampling_params import MAX_SEED, SamplingParams

# --- the generator ---


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    def words(values: tuple[int, ...]) -> Any:
        return tuple(np.array([value], dtype=np.uint64) for value in values)

    assert tuple(int(word[0]) for word in philox4x32(words(counter), words(key))) == expected


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    numbers = uniform_numbers([SamplingParams(seed=seed) for seed in range(5_000)], [7] * 5_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    observed, _ = np.histogram(numbers, bins=50, range=(0, 1))
    assert chi_square(observed, np.full(50, 0.02)) < 97  # 49 degrees of freedom, p = 5e-5


# --- whose draw it is ---

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 10_000]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    typical_p=st.sampled_from([0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.5]),
    min_tokens=st.sampled_from([0, 4]),
    stop_token_ids=st.sampled_from([(), (3, 7), (199, 5_000)]),
    seed=st.integers(-MAX_SEED - 1, MAX_SEED),
    choice=st.integers(0, 1_000),
)
REQUESTS = st.lists(st.tuples(PARAMS, st.integers(0, 2**17)), min_size=1, max_size=8)


@given(requests=REQUESTS, logits_seed=st.integers(0, 2**32))
def test_a_draw_depends_on_its_own_request_alone(
    requests: list[tuple[SamplingParams, int]], logits_seed: int
) -> None:
    generator = torch.Generator().manual_seed(logits_seed)
    logits_SV = torch.randn(len(requests), 200, generator=generator)
    params, positions = zip(*requests, strict=True)
    rng = random.Random(logits_seed)
    histories = [
        History(rng.choices(range(200), k=num_tokens), num_prompt_tokens=min(num_tokens, 5))
        for num_tokens in (rng.randint(1, 12) for _ in requests)
    ]
    before = logits_SV.clone()
    together = sample(logits_SV, params, positions, histories)
    alone = [
        sample(logits_SV[row : row + 1], [params[row]], [positions[row]], [histories[row]])[0]
        for row in range(len(requests))
    ]
    assert together == alone
    assert logits_SV.equal(before)


@pytest.mark.parametrize(
    ("other", "position"),
    [
        (SamplingParams(seed=2, choice=3), 5),
        (SamplingParams(seed=1 + 2**32, choice=3), 5),
        (SamplingParams(seed=-1, choice=3), 5),
        (SamplingParams(seed=1, choice=4), 5),
        (SamplingParams(seed=1, choice=3), 6),
        (SamplingParams(seed=1, choice=5), 3),
    ],
)
def test_another_seed_choice_or_position_draws_another_number(
    other: SamplingParams, position: int
) -> None:
    mine, its = uniform_numbers([SamplingParams(seed=1, choice=3), other], [5, position])
    assert mine != its


def test_other_parameters_do_not_change_the_number() -> None:
    plain = SamplingParams(seed=9)
    shaped = SamplingParams(seed=9, temperature=0.3, top_k=4, top_p=0.5, max_tokens=99)
    mine, its = uniform_numbers([plain, shaped], [12, 12])
    assert mine == its


# --- what may be drawn ---

LOGITS = st.lists(
    # few values, so that many are equal; far apart, so that some probabilities vanish
    st.one_of(st.integers(-3, 3).map(float), st.floats(-200, 200, width=32)),
    min_size=1,
    max_size=12,
)


def ranking(logits: list[float]) -> list[int]:
    """Token ids, likeliest first; among equals the lower id."""
    return sorted(range(len(logits)), key=lambda token_id: (-logits[token_id], token_id))


@given(logits=LOGITS, seed=st.integers(0, MAX_SEED))
def test_greedy_is_argmax(logits: list[float], seed: int) -> None:
    params = SamplingParams(temperature=0.0, seed=seed, top_p=0.5, top_k=2)
    assert sample(torch.tensor([logits]), [params], [0]) == [ranking(logits)[0]]


@given(logits=LOGITS, top_k=st.integers(1, 15), seed=st.integers(0, MAX_SEED))
def test_top_k_never_picks_outside_the_k_likeliest(
    logits: list[float], top_k: int, seed: int
) -> None:
    params = SamplingParams(temperature=5.0, top_k=top_k, seed=seed)
    assert sample(torch.tensor([logits]), [params], [0])[0] in ranking(logits)[:top_k]


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
    assert sample(torch.tensor([logits]), [params], [0])[0] in kept


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 5e-324])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    torch.manual_seed(0)
    logits_SV = torch.randn(20, 50)
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(20)]
    assert sample(logits_SV, params, [3] * 20) == logits_SV.argmax(-1).tolist()


# --- as transformers ---


def transformers_scores(logits_SV: Tensor, params: SamplingParams, history: History) -> Tensor:
    """What transformers' `generate` would draw from: its processors, in its order."""
    from transformers.generation import logits_process as theirs

    processors: list[Any] = []
    if params.repetition_penalty != 1.0:
        processors.append(theirs.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        processors.append(
            theirs.MinNewTokensLengthLogitsProcessor(
                history.num_prompt_tokens, params.min_tokens, torch.tensor(params.stop_token_ids)
            )
        )
    if params.temperature:
        processors.append(theirs.TemperatureLogitsWarper(params.temperature))
        processors.append(theirs.TopKLogitsWarper(params.top_k or logits_SV.shape[1]))
        processors.append(theirs.TopPLogitsWarper(params.top_p))
        processors.append(theirs.MinPLogitsWarper(params.min_p))
        if params.typical_p < 1.0:
            processors.append(theirs.TypicalLogitsWarper(params.typical_p))
    ids = torch.tensor([list(history.token_ids)])
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
    history = History(torch.randint(40, (8,), generator=generator).tolist(), num_prompt_tokens=5)
    expected = transformers_scores(logits_SV, params, history).softmax(dim=-1)
    weights_SV, ids_SV = ranked_probabilities(look_back(logits_SV, [params], [history]), [params])
    actual = torch.zeros_like(expected).scatter(1, ids_SV, weights_SV / weights_SV.sum())
    assert torch.allclose(actual, expected, atol=1e-12)


@given(
    repetition_penalty=st.floats(0.1, 10.0),
    min_tokens=st.integers(0, 8),
    seed=st.integers(0, 2**32),
)
def test_greedy_looks_back_as_transformers_does(
    repetition_penalty: float, min_tokens: int, seed: int
) -> None:
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=repetition_penalty,
        min_tokens=min_tokens,
        stop_token_ids=(0, 2),
    )
    generator = torch.Generator().manual_seed(seed)
    logits_SV = torch.randn(1, 6, generator=generator)
    history = History(torch.randint(6, (8,), generator=generator).tolist(), num_prompt_tokens=5)
    expected = transformers_scores(logits_SV, params, history)
    assert look_back(logits_SV, [params], [history]).equal(expected)
    assert sample(logits_SV, [params], [8], [history]) == expected.argmax(-1).tolist()


def test_a_parameter_that_looks_back_needs_the_history() -> None:
    for params in (SamplingParams(repetition_penalty=1.1), SamplingParams(min_tokens=1)):
        with pytest.raises(AssertionError, match="histories"):
            sample(torch.zeros(1, 4), [params], [0])


# --- how often ---


def chi_square(observed: Any, probabilities: Any) -> float:
    expected = probabilities * observed.sum()
    return float(((observed - expected) ** 2 / expected).sum())


def expected_distribution(logits_V: Tensor, params: SamplingParams) -> Any:
    """By the definitions, one token after the other."""
    if params.min_p or params.typical_p < 1.0:
        scores = transformers_scores(logits_V[None].double(), params, History([0], 1))
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
    drawn = sample(logits_V.expand(num_draws, -1), params, positions)

    expected = expected_distribution(logits_V, params[0])
    observed = np.bincount(drawn, minlength=16)
    possible = expected > 0
    assert not observed[~possible].any()
    # 15 degrees of freedom at most, p = 5e-5; the seeds are fixed, so this never fails by chance
    assert chi_square(observed[possible], expected[possible]) < 46


# --- bounds ---


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
    ],
)
def test_a_parameter_out_of_bounds_is_refused_by_name(field: str, value: float) -> None:
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
    ],
)
def test_the_bounds_themselves_can_be_sampled(field: str, value: float) -> None:
    params = SamplingParams(**{field: value})
    assert sample(torch.zeros(1, 8), [params], [0], [History([1], 1)])[0] in range(8)
