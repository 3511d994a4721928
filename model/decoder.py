"""Mixtral's forward pass: everything but the experts, which it reaches through `Experts`.

Shape suffixes: T tokens, D hidden, N query heads, K key/value heads, H head size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attend, plan_attention
from model.batch import Batch
from model.config import MixtralConfig
from model.experts import Experts
from model.kv_cache import KVCache
from model.rope import rope_frequencies, rope_tables, rotate
from model.router import route
from model.weights import DecoderWeights


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, computed in float32 and scaled in the dtype of x."""
    x32 = x_TD.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * x32.to(x_TD.dtype)


class Decoder:
    """Embeddings, attention, norms, routers and LM head of a Mixtral. Keeps no request's state."""

    def __init__(self, config: MixtralConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding_VD.device
        self.dtype = weights.embedding_VD.dtype
        self._frequencies = rope_frequencies(config.head_dim, config.rope_theta, self.device)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, experts: Experts) -> Tensor:
        """Logits of the rows the batch asks for, (rows, V) float32.

        Writes the step's keys and values into the cache.
        """
        config = self.config
        groups = plan_attention(batch, config.sliding_window)
        rope = rope_tables(batch.positions_T, self._frequencies, self.dtype)
        x_TD = F.embedding(batch.token_ids_T, self.weights.embedding_VD)
        for layer, weights in enumerate(self.weights.layers):
            normed_TD = rms_norm(x_TD, weights.attention_norm_D, config.rms_norm_eps)
            q, k, v = F.linear(normed_TD, weights.wqkv).split(weights.qkv_sizes, dim=-1)
            q_TNH = rotate(q.unflatten(-1, (-1, config.head_dim)), rope)
            k_TKH = rotate(k.unflatten(-1, (-1, config.head_dim)), rope)
            cache.write(layer, batch.slots_T, k_TKH, v.unflatten(-1, (-1, config.head_dim)))
            attended_TNH = attend(q_TNH, groups, cache, layer)
            x_TD = x_TD + F.linear(attended_TNH.flatten(1), weights.wo)

            normed_TD = rms_norm(x_TD, weights.experts_norm_D, config.rms_norm_eps)
            routing = route(normed_TD, weights.gate_ED, top_k=config.num_experts_per_tok)
            pending = experts.dispatch(layer, normed_TD, routing)
            x_TD = x_TD + pending.wait().to(x_TD.dtype)
        x_TD = rms_norm(x_TD[batch.logits_rows], self.weights.final_norm_D, config.rms_norm_eps)
        return F.linear(x_TD, self.weights.lm_head_VD).float()
