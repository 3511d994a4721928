"""Rotary position embedding in Hugging Face's pairing: dimension i turns with i + H/2.

(Mistral's own releases pair neighbours, 2i with 2i + 1; their q and k weights must be permuted.)

Shape suffixes: T tokens, N heads, H head dimension.
"""

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angle per position of each pair of dimensions, shape (H/2,), float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / theta**exponents


def rope_tables(
    positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each token's angles, each (T, 1, H), computed in float32."""
    angles = positions_T.to(torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_TNH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every head of every token by its position's angles; same shape and dtype."""
    cos, sin = tables
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat((-second, first), dim=-1) * sin
