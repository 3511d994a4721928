"""Which experts a token goes to, and with what weight.

Shape suffixes: T tokens, D hidden, E experts, K experts per token (top-k).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Of each token its K experts, best first, and their weights, which sum to one."""

    expert_ids_TK: Tensor
    """int64"""
    weights_TK: Tensor
    """float32"""


def router_logits(x_TD: Tensor, gate_ED: Tensor) -> Tensor:
    """How well each expert suits each token, before any softmax, (T, E) float32."""
    return F.linear(x_TD, gate_ED).float()


def route(x_TD: Tensor, gate_ED: Tensor, *, top_k: int) -> Routing:
    """Choose the top-k experts of each token.

    The softmax runs over the chosen logits alone, in float32: the same numbers as a softmax over
    all experts, cut to the best k and scaled to sum to one (as transformers writes it).
    """
    logits_TE = router_logits(x_TD, gate_ED)
    chosen_TK, expert_ids_TK = torch.topk(logits_TE, top_k, dim=-1)
    return Routing(expert_ids_TK=expert_ids_TK, weights_TK=chosen_TK.softmax(dim=-1))
