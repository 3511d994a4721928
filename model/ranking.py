"""Which tokens are likeliest, and what each is drawn with.

Among equal logits the lower id goes first, everywhere.

Shape suffixes: S sequences, V vocabulary, R some of the sequences, K the likeliest tokens, G and M
factors of V, C candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.sampling_params import SamplingParams

_GROUP_SIZE = 8
"""Tokens that are first looked at as one when the likeliest are sought; measured, 4 to 16 do."""


def likeliest(logits_SV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` greatest logits of each row in order, (S, K), and their token ids, (S, K) int64.

    Exact but for one thing: which of several tokens with the last of these logits are there, is
    left open.
    """
    ids_SC = _candidates(logits_SV, width)
    if ids_SC is None:
        ids_SK = logits_SV.topk(width, sorted=False).indices
    else:
        values_SC = logits_SV.gather(1, ids_SC)
        ids_SK = ids_SC.gather(1, values_SC.topk(width, sorted=False).indices)
    ids_SK = ids_SK.sort(dim=1).values
    values_SK, order_SK = ranked(logits_SV.gather(1, ids_SK))
    return values_SK, ids_SK.gather(1, order_SK)


def _candidates(logits_SV: Tensor, width: int) -> Tensor | None:
    """Ids among which the `width` likeliest are, (S, C); None if these would be too many.

    Each of the likeliest is in one of the `width` groups with the greatest maxima. A group lies
    across the row, V / 8 apart, because maxima of (8, V / 8) are taken fast.
    """
    vocab_size = logits_SV.shape[1]
    num_groups = vocab_size // _GROUP_SIZE
    if num_groups < 2 * width:
        return None
    num_grouped = num_groups * _GROUP_SIZE
    grouped_SGM = logits_SV[:, :num_grouped].unflatten(1, (_GROUP_SIZE, num_groups))
    _, best_SK = grouped_SGM.amax(dim=1).topk(width, sorted=False)
    offsets_G1 = torch.arange(0, num_grouped, num_groups, device=logits_SV.device)[:, None]
    ids_SC: Tensor = (best_SK[:, None, :] + offsets_G1).flatten(1)
    if num_grouped == vocab_size:
        return ids_SC
    rest_C = torch.arange(num_grouped, vocab_size, device=logits_SV.device)
    return torch.cat([ids_SC, rest_C.expand(len(ids_SC), -1)], dim=1)


def ranked(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """All logits of each row in order, (S, V), and their token ids, (S, V) int64."""
    # stable: among equal logits the lower id goes first, whatever the batch
    sorted_SV, ids_SV = logits_SV.sort(dim=-1, descending=True, stable=True)
    return sorted_SV, ids_SV


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

    sorted_SV, ids_SV = ranked(logits_SV)
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
