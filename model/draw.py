"""Drawing a token by inverting the cumulated probabilities, likeliest token first.

`draw_exactly` ranks the whole vocabulary and is the definition; `draw` gives the same tokens and
ranks no more of it than it takes to be sure.

Shape suffixes: S sequences, V vocabulary, R some of the sequences, K the likeliest tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.philox import uniform_numbers
from model.ranking import likeliest, ranked_probabilities
from model.sampling_params import SamplingParams


@dataclass(frozen=True)
class _Stage:
    """How hard to try before all tokens are ranked.

    width:  how many of the likeliest tokens to look at.
    dtype:  in which the whole vocabulary's mass is summed.
    margin: how far from a bound, as part of that mass, a decision is sure: well above the rounding
            of the mass and of sums in another order. Over 150,000 tokens that is below 4e-6 in
            float32 (3e-7 measured) and below 2e-11 in float64.
    """

    width: int
    dtype: torch.dtype
    margin: float


_STAGES = (
    _Stage(width=64, dtype=torch.float32, margin=2e-5),
    _Stage(width=512, dtype=torch.float64, margin=1e-9),
    _Stage(width=4096, dtype=torch.float64, margin=1e-9),
)
_CHUNK_ENTRIES = 2**17
"""Logits whose exponentials are summed at a time: as many as a processor's cache holds."""


def draw(
    logits_SV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """What `draw_exactly` draws, sooner where the likeliest tokens decide."""
    vocab_size = logits_SV.shape[1]
    asked_S5 = torch.tensor(
        [
            (u, p.temperature, p.top_k or vocab_size, p.top_p, p.min_p)
            for u, p in zip(uniform_numbers(params, positions), params, strict=True)
        ],
        dtype=torch.float64,
        device=logits_SV.device,
    )
    chosen: dict[int, int] = {}
    # local typicality ranks by another order: it wants the whole vocabulary
    left = [i for i, p in enumerate(params) if p.typical_p == 1.0]
    for stage in _STAGES:
        tried = [i for i in left if not stage.width < params[i].top_k < vocab_size]
        if not tried or 2 * stage.width > vocab_size:
            continue
        every = slice(None) if len(tried) == len(params) else tried
        ids, are_sure = _draw_from_likeliest(logits_SV[every], asked_S5[every], stage)
        chosen |= {
            i: token_id
            for i, token_id, is_sure in zip(tried, ids, are_sure, strict=True)
            if is_sure
        }
        left = [i for i in left if i not in chosen]
    rest = [i for i in range(len(params)) if i not in chosen]
    if rest:
        ids = draw_exactly(logits_SV[rest], [params[i] for i in rest], [positions[i] for i in rest])
        chosen |= dict(zip(rest, ids, strict=True))
    return [chosen[i] for i in range(len(params))]


def draw_exactly(
    logits_SV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """A token id for each row, from (seed, choice, position) and its logits alone.

    Every temperature must be above 0, and every row have a finite logit.
    """
    weights_SV, ids_SV = ranked_probabilities(logits_SV, params)
    cumulated_SV = weights_SV.cumsum(dim=-1)
    uniform = torch.from_numpy(uniform_numbers(params, positions)).to(logits_SV.device)
    target = uniform[:, None] * cumulated_SV[:, -1:]
    picks = torch.searchsorted(cumulated_SV, target, right=True)
    # a target rounded up to the whole sum belongs to the last token that can be drawn
    ranks_V = torch.arange(logits_SV.shape[1], device=logits_SV.device)
    last_kept = (ranks_V * (weights_SV > 0)).amax(dim=-1, keepdim=True)
    chosen: list[int] = ids_SV.gather(1, picks.minimum(last_kept))[:, 0].tolist()
    return chosen


def _draw_from_likeliest(
    logits_RV: Tensor, asked_R5: Tensor, stage: _Stage
) -> tuple[list[int], list[bool]]:
    """A token for each row by its likeliest, and whether all tokens would surely give the same.

    asked_R5: uniform number, temperature, top_k (V for none), top_p, min_p.
    """
    uniform_R1, temperature_R1, top_k_R1, top_p_R1, min_p_R1 = asked_R5.split(1, dim=1)
    values_RK, ids_RK = likeliest(logits_RV, stage.width)
    # Of the tokens with the last logit some may be missing: only those above it are known. Where
    # it is -inf the rest weighs nothing, and all are known.
    last_R1 = values_RK[:, -1:]
    is_known_RK = (values_RK > last_R1) | (last_R1 == -torch.inf)
    all_RK = ((values_RK - values_RK[:, :1]).double() / temperature_R1).exp()
    weights_RK = all_RK * is_known_RK

    # top_k: its mass is known if the likeliest hold all of it
    has_top_k_R1 = top_k_R1 < logits_RV.shape[1]
    is_ended_R1 = has_top_k_R1 & (is_known_RK.sum(dim=1, keepdim=True) >= top_k_R1)
    is_sure_R1 = is_ended_R1 | ~has_top_k_R1
    ranks_K = torch.arange(stage.width, device=logits_RV.device)
    weights_RK = weights_RK * (~has_top_k_R1 | (ranks_K < top_k_R1))
    reached_RK = weights_RK.cumsum(dim=1)
    masses_R1 = reached_RK[:, -1:].clone()
    whole = (~has_top_k_R1[:, 0]).nonzero()[:, 0]
    if len(whole):
        every = slice(None) if len(whole) == len(logits_RV) else whole
        masses_R1[every] = _masses(
            logits_RV[every], values_RK[every, :1], temperature_R1[every], stage.dtype
        )

    # top_p and min_p: each keeps so many of the likeliest, and ends where one is not kept
    margin_R1 = stage.margin * masses_R1
    has_top_p_R1, has_min_p_R1 = top_p_R1 < 1.0, min_p_R1 > 0.0
    nucleus_R1 = top_p_R1 * masses_R1
    is_sure_R1 &= ~has_top_p_R1 | _is_far(reached_RK, nucleus_R1, margin_R1)
    is_sure_R1 &= ~has_min_p_R1 | _is_far(all_RK[:, 1:], min_p_R1, stage.margin)
    before_RK = reached_RK - weights_RK
    kept_RK = weights_RK * ((before_RK < nucleus_R1) | (ranks_K == 0) | ~has_top_p_R1)
    kept_RK = kept_RK * (weights_RK >= min_p_R1)
    is_ended_R1 |= has_top_p_R1 & (reached_RK[:, -1:] >= nucleus_R1)
    is_ended_R1 |= has_min_p_R1 & (all_RK[:, -1:] < min_p_R1)
    is_sure_R1 &= is_ended_R1 | ~(has_top_p_R1 | has_min_p_R1)

    cumulated_RK = kept_RK.cumsum(dim=1)
    target_R1 = uniform_R1 * torch.where(is_ended_R1, cumulated_RK[:, -1:], masses_R1)
    picks_R1 = (cumulated_RK <= target_R1).sum(dim=1, keepdim=True)
    is_sure_R1 &= _is_far(cumulated_RK, target_R1, margin_R1) & (picks_R1 < stage.width)
    chosen_R1 = ids_RK.gather(1, picks_R1.clamp(max=stage.width - 1))
    return chosen_R1[:, 0].tolist(), is_sure_R1[:, 0].tolist()


def _masses(
    logits_RV: Tensor, greatest_R1: Tensor, temperature_R1: Tensor, dtype: torch.dtype
) -> Tensor:
    """Sum of the weights of all tokens, the likeliest token's being 1, (R, 1) float64."""
    num_rows = max(1, _CHUNK_ENTRIES // logits_RV.shape[1])
    sums = [
        ((logits - greatest).to(dtype) / temperature.to(dtype)).exp_().sum(dim=1, keepdim=True)
        for logits, greatest, temperature in zip(
            logits_RV.split(num_rows),
            greatest_R1.split(num_rows),
            temperature_R1.split(num_rows),
            strict=True,
        )
    ]
    return torch.cat(sums).double()


def _is_far(values_RK: Tensor, bounds_R1: Tensor, margin: Tensor | float) -> Tensor:
    """Whether none of a row's values is so near to its bound that rounding could decide."""
    return ((values_RK - bounds_R1).abs() > margin).all(dim=1, keepdim=True)
