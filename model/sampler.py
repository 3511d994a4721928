"""Choosing the next token of each sequence from its logits.

A draw depends on (seed, choice, position) and the logits alone, never on what else is in the
batch: the uniform number comes from a counter-based generator, and becomes a token by inverting
the cumulated probabilities, likeliest token first.

Shape suffixes: S sequences, V vocabulary.
"""

from collections.abc import Sequence

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


def sample(
    logits_SV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """The next token id of each sequence.

    positions: where in its sequence the drawn token will stand.
    """
    token_ids: list[int] = logits_SV.argmax(dim=-1).tolist()
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    if drawn:
        ids = _draw(logits_SV[drawn], [params[i] for i in drawn], [positions[i] for i in drawn])
        for row, token_id in zip(drawn, ids, strict=True):
            token_ids[row] = token_id
    return token_ids


def _draw(logits_SV: Tensor, params: list[SamplingParams], positions: list[int]) -> list[int]:
    device = logits_SV.device
    vocab_size = logits_SV.shape[1]
    f64 = torch.float64
    temperature = torch.tensor([[p.temperature] for p in params], dtype=f64, device=device)
    top_k = torch.tensor([[p.top_k or vocab_size] for p in params], device=device)
    top_p = torch.tensor([[p.top_p] for p in params], dtype=f64, device=device)

    # stable: among equal logits the lower id goes first, whatever the batch
    sorted_SV, ids_SV = logits_SV.sort(dim=-1, descending=True, stable=True)
    # below the maximum, so that a tiny temperature gives -inf and never inf - inf
    sorted_SV = (sorted_SV - sorted_SV[:, :1]).double() / temperature
    ranks_V = torch.arange(vocab_size, device=device)
    probabilities = sorted_SV.masked_fill(ranks_V >= top_k, -torch.inf).softmax(dim=-1)
    before_SV = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill((before_SV >= top_p) & (ranks_V > 0), 0.0)

    cumulated_SV = probabilities.cumsum(dim=-1)
    uniform = torch.from_numpy(uniform_numbers(params, positions)).to(device)
    target = uniform[:, None] * cumulated_SV[:, -1:]
    picks = torch.searchsorted(cumulated_SV, target, right=True)
    last_kept = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
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
