"""Choosing the next token of each sequence from its logits.

A draw depends on (seed, choice, position), the sequence's own logits and its own history, never on
what else is in the batch: the uniform number comes from a counter-based generator, and becomes a
token by inverting the cumulated probabilities, likeliest token first.

Shape suffixes: S sequences, V vocabulary, R some of the sequences, L tokens of a history.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.sampling_params import SamplingParams

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)


@dataclass(frozen=True)
class History:
    """What a sequence holds so far. Wanted only by parameters that look back."""

    token_ids: Sequence[int]
    """Prompt and completion."""
    num_prompt_tokens: int

    @property
    def num_emitted(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


def sample(
    logits_SV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Sequence[History] | None = None,
) -> list[int]:
    """The next token id of each sequence.

    positions: where in its sequence the drawn token will stand.
    histories: may be left out where no parameters have min_tokens or a repetition_penalty.
    """
    logits_SV = look_back(logits_SV, params, histories)
    token_ids: list[int] = logits_SV.argmax(dim=-1).tolist()
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    if drawn:
        ids = _draw(logits_SV[drawn], [params[i] for i in drawn], [positions[i] for i in drawn])
        for row, token_id in zip(drawn, ids, strict=True):
            token_ids[row] = token_id
    return token_ids


def look_back(
    logits_SV: Tensor, params: Sequence[SamplingParams], histories: Sequence[History] | None
) -> Tensor:
    """Logits (or log-probabilities) after repetition_penalty and min_tokens, in this order.

    Returns the tensor it was given where neither is asked for, and a new one elsewhere.
    """
    if not any(p.repetition_penalty != 1.0 or p.min_tokens for p in params):
        return logits_SV
    assert histories is not None, "repetition_penalty and min_tokens need the sequences' histories"
    logits_SV = logits_SV.clone()

    penalised = [row for row, p in enumerate(params) if p.repetition_penalty != 1.0]
    if penalised:
        ids = [list(histories[row].token_ids) for row in penalised]
        longest = max(len(own) for own in ids)
        # padded with an id that is there anyway: what is written twice is written alike
        ids_RL = logits_SV.new_tensor(
            [own + own[-1:] * (longest - len(own)) for own in ids], dtype=torch.int64
        )
        penalties_R1 = logits_SV.new_tensor([[params[row].repetition_penalty] for row in penalised])
        logits_RV = logits_SV[penalised]
        seen_RL = logits_RV.gather(1, ids_RL)
        seen_RL = torch.where(seen_RL < 0, seen_RL * penalties_R1, seen_RL / penalties_R1)
        logits_SV[penalised] = logits_RV.scatter(1, ids_RL, seen_RL)

    vocab_size = logits_SV.shape[1]
    banned = [
        (row, token_id)
        for row, (p, history) in enumerate(zip(params, histories, strict=True))
        if history.num_emitted < p.min_tokens
        for token_id in p.stop_token_ids
        if token_id < vocab_size
    ]
    if banned:
        rows, token_ids = zip(*banned, strict=True)
        logits_SV[list(rows), list(token_ids)] = -torch.inf
    return logits_SV


def ranked_probabilities(
    logits_SV: Tensor, params: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor]:
    """What each token is drawn with, likeliest logit first, and which token stands where.

    Returns weights (S, V), float64, zero for what is never drawn, their sum at most one; and token
    ids (S, V), int64. Every temperature must be above 0.
    """
    device = logits_SV.device
    vocab_size = logits_SV.shape[1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    # stable: among equal logits the lower id goes first, whatever the batch
    sorted_SV, ids_SV = logits_SV.sort(dim=-1, descending=True, stable=True)
    # below the maximum, so that a tiny temperature gives -inf and never inf - inf
    sorted_SV = (sorted_SV - sorted_SV[:, :1]).double() / column([p.temperature for p in params])
    ranks_V = torch.arange(vocab_size, device=device)
    top_k_S1 = torch.tensor([[p.top_k or vocab_size] for p in params], device=device)
    weights_SV = sorted_SV.masked_fill(ranks_V >= top_k_S1, -torch.inf).softmax(dim=-1)
    before_SV = weights_SV.cumsum(dim=-1) - weights_SV
    top_p_S1 = column([p.top_p for p in params])
    weights_SV = weights_SV.masked_fill((before_SV >= top_p_S1) & (ranks_V > 0), 0.0)
    if any(p.min_p for p in params):
        floor_S1 = column([p.min_p for p in params]) * weights_SV[:, :1]
        weights_SV = weights_SV.masked_fill(weights_SV < floor_S1, 0.0)
    typical = [row for row, p in enumerate(params) if p.typical_p < 1.0]
    if typical:
        mass_R1 = column([params[row].typical_p for row in typical])
        weights_SV[typical] = _keep_typical(weights_SV[typical], mass_R1)
    return weights_SV, ids_SV


def _keep_typical(weights_RV: Tensor, mass_R1: Tensor) -> Tensor:
    """The weights of locally typical tokens; zero for the others."""
    probabilities_RV = weights_RV / weights_RV.sum(dim=-1, keepdim=True)
    surprise_RV = -probabilities_RV.log()
    entropy_R1 = (probabilities_RV * surprise_RV).nansum(dim=-1, keepdim=True)  # 0 x inf counts 0
    distance_RV = (surprise_RV - entropy_R1).abs()
    nearest_RV, order_RV = distance_RV.sort(dim=-1, stable=True)
    reached_RV = probabilities_RV.gather(1, order_RV).cumsum(dim=-1)
    last_R1 = (reached_RV < mass_R1).sum(dim=-1, keepdim=True).clamp(max=weights_RV.shape[1] - 1)
    return weights_RV.masked_fill(distance_RV > nearest_RV.gather(1, last_R1), 0.0)


def _draw(logits_SV: Tensor, params: list[SamplingParams], positions: list[int]) -> list[int]:
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


def uniform_numbers(
    params: Sequence[SamplingParams], positions: Sequence[int]
) -> NDArray[np.float64]:
    """One number in [0, 1) per sequence, from (seed, choice, position), shape (S,)."""
    seeds = np.array([p.seed for p in params], dtype=np.int64).view(np.uint64)
    zeros = np.zeros_like(seeds)
    counter = (
        np.array(positions, dtype=np.uint64),
        np.array([p.choice for p in params], dtype=np.uint64),
        zeros,
        zeros,
    )
    high, low, _, _ = philox4x32(counter, (seeds & _LOW_32, seeds >> _SHIFT_32))
    bits = (high << np.uint64(21)) | (low >> np.uint64(11))  # the 53 bits a double holds
    return bits.astype(np.float64) * 2.0**-53


Words = NDArray[np.uint64]
"""32-bit words, kept in 64 bits so that products fit."""


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Philox-4x32-10 over arrays (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").

    numpy's own Philox draws from one stream at a time; here every element has its own.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product2 >> _SHIFT_32) ^ c1 ^ k0,
            product2 & _LOW_32,
            (product0 >> _SHIFT_32) ^ c3 ^ k1,
            product0 & _LOW_32,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_32, (k1 + _KEY_STEPS[1]) & _LOW_32
    return c0, c1, c2, c3
