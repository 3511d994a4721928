"""A draw is its request's own, and the short way to it gives what the long way gives."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.draw import draw, draw_exactly
from model.philox import philox4x32, uniform_numbers
from model.ranking import ranked_probabilities
from model.sampling_params import MAX_SEED, SamplingParams
from tests.sampling_oracle import chosen

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


# --- the short way is the long way ---


FILTERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 0, 1, 40, 63, 64, 65, 1_000, 5_000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05, 0.999999]),
    min_p=st.sampled_from([0.0, 0.0, 0.0, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 1.0, 0.6]),
    seed=st.integers(0, MAX_SEED),
)


@given(
    params=st.lists(FILTERS, min_size=8, max_size=8),
    vocab_size=st.sampled_from([128, 137, 1_031, 9_001]),
    kind=st.sampled_from(["steep", "flat", "few values", "few allowed", "one value"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_draws_from_the_likeliest_are_draws_from_all(
    params: list[SamplingParams], vocab_size: int, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise_SV = torch.randn(8, vocab_size, generator=generator)
    logits_SV = {
        "steep": 6 * noise_SV,
        "flat": 0.3 * noise_SV,
        "few values": (2 * noise_SV).round(),
        "few allowed": noise_SV.masked_fill(noise_SV < 2.0, -torch.inf),
        "one value": torch.full_like(noise_SV, 2.5),
    }[kind]
    logits_SV[:, seed % vocab_size] = 3.0  # no row is wholly forbidden
    logits_SV[0, -1] = 12.0  # the last tokens may be no whole group
    positions = list(range(8))
    drawn = draw(logits_SV, params, positions)
    assert drawn == draw_exactly(logits_SV, params, positions)
    uniform = uniform_numbers(params, positions).tolist()
    for logits, p, u, token_id in zip(logits_SV.tolist(), params, uniform, drawn, strict=True):
        if p.typical_p == 1.0 and vocab_size < 9_000:  # the oracle is slow
            assert token_id == chosen(logits, p, u)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_draw_at_the_border_of_two_tokens_is_left_to_the_long_way(
    top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_SV = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).expand(40, -1)
    params = [SamplingParams(top_p=top_p)] * 40
    weights_SV, _ = ranked_probabilities(logits_SV, params)
    borders = weights_SV[0].cumsum(0)[:40] / weights_SV[0].sum()
    monkeypatch.setattr(
        "model.draw.uniform_numbers", lambda _, positions: borders[list(positions)].numpy()
    )
    positions = range(40)
    drawn = draw(logits_SV, params, positions)
    assert drawn == draw_exactly(logits_SV, params, positions)


def test_draws_stay_what_they_were() -> None:
    # a request that is replayed on another version must go on with the same tokens
    logits_V = torch.arange(500.0).mul(37).remainder(500).div(60)
    fields: list[dict[str, Any]] = [
        {},
        {"temperature": 0.4},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"temperature": 2.0, "top_k": 300, "top_p": 0.7},
        {"choice": 3},
        {"seed": -1},
        {"seed": 2**40},
    ]
    params = [SamplingParams(**({"seed": 5} | own)) for own in fields]
    drawn = draw(logits_V.expand(len(params), -1), params, range(len(params)))
    assert drawn == [376, 297, 296, 12, 66, 350, 321, 444, 159, 256]


def test_a_steep_distribution_is_drawn_from_without_ranking_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the whole vocabulary was ranked")

    monkeypatch.setattr("model.draw.draw_exactly", refuse)
    logits_SV = -2.0 * torch.arange(1_000.0).log1p().expand(4, -1)
    fields: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}]
    params = [SamplingParams(**own, seed=3) for own in fields]
    assert len(draw(logits_SV, params, [0] * 4)) == 4
