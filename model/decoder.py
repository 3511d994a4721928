"""Mixtral's forward pass: everything but the experts, which it reaches through `Experts`.

Shape suffixes: T tokens, D hidden, N query heads, K key/value heads, H head size, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attention_backend
from model.batch import Batch
from model.config import MixtralConfig
from model.experts import Experts
from model.kv_cache import KVCache
from model.linear import linear
from model.phases import UNWATCHED, Phases
from model.rope import rope_frequencies, rope_tables, rotate
from model.router import route, router_logits
from model.weights import DecoderWeights


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, computed in float32 and scaled in the dtype of x."""
    x32 = x_TD.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * x32.to(x_TD.dtype)


@dataclass
class Trace:
    """What a forward pass computes on its way, for whoever asks: `Decoder.forward` appends to it.

    All of the step's tokens, also those whose logits are not wanted.
    """

    hidden_states: list[Tensor] = field(default_factory=list)
    """(T, D) each: the embeddings, the output of every layer but the last, and the last layer's
    after the final norm; one more than layers, as transformers returns them."""
    router_logits: list[Tensor] = field(default_factory=list)
    """(T, E) float32 of each layer."""


class Decoder:
    """Embeddings, attention, norms, routers and last matrix of a Mixtral. Keeps no request's state.

    The last matrix is the LM head, or a sequence classifier's score head, with labels for V.
    """

    def __init__(
        self,
        config: MixtralConfig,
        weights: DecoderWeights,
        *,
        attention: str = "sdpa",
        phases: Phases = UNWATCHED,
    ) -> None:
        """attention: name of the backend (see `attention.BACKENDS`). Raises ConfigError.
        phases: told which part of a forward pass begins.
        """
        self.config = config
        self._attention = attention_backend(attention, config.sliding_window)
        self._phases = phases
        self.weights = weights
        self.device = weights.embedding_VD.device
        self.dtype = weights.embedding_VD.dtype
        self._frequencies = rope_frequencies(config.head_dim, config.rope_theta, self.device)

    def new_cache(self, *, num_blocks: int, block_size: int) -> KVCache:
        """An empty cache for this decoder's keys and values."""
        return KVCache(
            self.config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def forward(
        self, batch: Batch, cache: KVCache, experts: Experts, trace: Trace | None = None
    ) -> Tensor:
        """Logits of the rows the batch asks for, (rows, V) float32.

        Writes the step's keys and values into the cache, and fills `trace` where one is given.
        """
        config, phases = self.config, self._phases
        phases.enter("inputs")
        plan = self._attention.plan(batch)
        rope = rope_tables(batch.positions_T, self._frequencies, self.dtype)
        x_TD = F.embedding(batch.token_ids_T, self.weights.embedding_VD)
        for layer, weights in enumerate(self.weights.layers):
            phases.enter("attention")
            if trace:
                trace.hidden_states.append(x_TD)
            normed_TD = rms_norm(x_TD, weights.attention_norm_D, config.rms_norm_eps)
            q, k, v = linear(normed_TD, weights.wqkv).split(weights.qkv_sizes, dim=-1)
            q_TNH = rotate(q.unflatten(-1, (-1, config.head_dim)), rope)
            k_TKH = rotate(k.unflatten(-1, (-1, config.head_dim)), rope)
            cache.write(layer, batch.slots_T, k_TKH, v.unflatten(-1, (-1, config.head_dim)))
            attended_TNH = self._attention.attend(q_TNH, plan, cache, layer)
            x_TD = x_TD + linear(attended_TNH.flatten(1), weights.wo)

            phases.enter("routing")
            normed_TD = rms_norm(x_TD, weights.experts_norm_D, config.rms_norm_eps)
            if trace:
                trace.router_logits.append(router_logits(normed_TD, weights.gate_ED))
            routing = route(normed_TD, weights.gate_ED, top_k=config.num_experts_per_tok)
            phases.enter("experts")
            pending = experts.dispatch(layer, normed_TD, routing)
            x_TD = x_TD + pending.wait().to(x_TD.dtype)
        phases.enter("logits")
        if trace:
            final_TD = rms_norm(x_TD, self.weights.final_norm_D, config.rms_norm_eps)
            trace.hidden_states.append(final_TD)
        x_TD = rms_norm(x_TD[batch.logits_rows], self.weights.final_norm_D, config.rms_norm_eps)
        logits = linear(x_TD, self.weights.lm_head_VD).float()
        phases.enter("outside")
        return logits
