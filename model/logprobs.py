"""What the model itself thought of tokens: log-probabilities before anything was asked for.

Shape suffixes: N tokens, V vocabulary, K the likeliest tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.ranking import likeliest, ranked

_CHUNK = 128
"""Tokens at a time: a long prompt's logits are large enough without a copy of all."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's log-probability, and the likeliest tokens' that could have stood in its place.

    rank:         1 for the likeliest; how many tokens are likelier, and one.
    top_ids:      the likeliest first, among equals the lower id; the token itself may be missing.
    """

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


def token_logprobs(
    logits_NV: Tensor, token_ids: Sequence[int], nums_top: Sequence[int]
) -> list[TokenLogprobs]:
    """For each row of logits what it says of one token, and of so many likeliest ones.

    Log-probabilities are the float32 log_softmax of the logits.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), _CHUNK):
        rows = slice(start, start + _CHUNK)
        found += _of_chunk(logits_NV[rows], token_ids[rows], nums_top[rows])
    return found


def prompt_logprobs(
    logits_NV: Tensor, next_ids: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """What n positions of a prompt say of the n tokens that follow them."""
    return token_logprobs(logits_NV, next_ids, [num_top] * len(next_ids))


def _of_chunk(
    logits_NV: Tensor, token_ids: Sequence[int], nums_top: Sequence[int]
) -> list[TokenLogprobs]:
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    own_N1 = torch.tensor(token_ids, dtype=torch.int64, device=logits_NV.device)[:, None]
    top_NK = _top(logits_NV, max(nums_top))
    top_logprobs = logprobs_NV.gather(1, top_NK).tolist()
    own = logprobs_NV.gather(1, own_N1)[:, 0].tolist()
    # ranks by the logits: taking the log of their sum off can make two of them equal
    ranks = 1 + (logits_NV > logits_NV.gather(1, own_N1)).sum(dim=1)
    return [
        TokenLogprobs(logprob, rank, tuple(ids[:num]), tuple(logprobs[:num]))
        for logprob, rank, ids, logprobs, num in zip(
            own, ranks.tolist(), top_NK.tolist(), top_logprobs, nums_top, strict=True
        )
    ]


def _top(logits_NV: Tensor, num_top: int) -> Tensor:
    """Ids of the likeliest tokens of each row, (N, K) int64."""
    vocab_size = logits_NV.shape[1]
    width = 2 * num_top + 8  # some to spare, because the ids of the last logit are open
    if 2 * width > vocab_size:
        return ranked(logits_NV)[1][:, :num_top]
    values_NK, ids_NK = likeliest(logits_NV, width)
    ids_NK = ids_NK[:, :num_top]
    if num_top:
        open_rows = (values_NK[:, num_top - 1] == values_NK[:, -1]).nonzero()[:, 0]
        if len(open_rows):
            ids_NK[open_rows] = ranked(logits_NV[open_rows])[1][:, :num_top]
    return ids_NK
