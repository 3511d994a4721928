"""Random numbers that belong to one position of one choice of one request.

Counter-based: every number is computed from (seed, choice, position) alone, in any order.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.sampling_params import SamplingParams

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)


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
