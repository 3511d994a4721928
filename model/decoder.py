"""Mixtral's forward pass: everything but the experts, which it reaches through `Experts`.

Shape suffixes: T tokens, D hidden, N query heads, K key/value heads, H head size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attention_backend
from model.batch import Batch
from model.config import MixtralConfig
from model.experts import Experts, PendingRows
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


@dataclass
class _MicroBatch:
    """A part of a step, on its way through the layers."""

    batch: Batch
    plan: Any
    """Of the attention backend."""
    rope: tuple[Tensor, Tensor]
    x_TD: Tensor
    pending: PendingRows | None = None
    """What the experts of the last layer will add to x."""

    def settle(self) -> Tensor:
        """x, with what its experts have computed."""
        if self.pending is not None:
            self.x_TD = self.x_TD + self.pending.wait().to(self.x_TD.dtype)
            self.pending = None
        return self.x_TD


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

    def forward(
        self, batch: Batch, cache: KVCache, experts: Experts, trace: Trace | None = None
    ) -> Tensor:
        """Logits of the rows the batch asks for, (rows, V) float32.

        Writes the step's keys and values into the cache, and fills `trace` where one is given.
        """
        return self.forward_in_turns([batch], cache, experts, trace)

    @torch.inference_mode()
    def forward_in_turns(
        self,
        batches: Sequence[Batch],
        cache: KVCache,
        experts: Experts,
        trace: Trace | None = None,
    ) -> Tensor:
        """The same for a step in several micro-batches: while the experts of one compute, the
        attention of the next does (ping-pong, as in MegaScale-Infer, Zhu et al., 2025).

        Each layer takes them in their order, so a later one may go on with a sequence of an earlier
        one. `trace`: for one batch alone.
        """
        phases = self._phases
        phases.enter("inputs")
        parts = [
            _MicroBatch(
                batch,
                self._attention.plan(batch),
                rope_tables(batch.positions_T, self._frequencies, self.dtype),
                F.embedding(batch.token_ids_T, self.weights.embedding_VD),
            )
            for batch in batches
        ]
        for layer in range(len(self.weights.layers)):
            for part in parts:
                x_TD = part.settle()
                if trace:
                    trace.hidden_states.append(x_TD)
                self._enter_layer(layer, part, cache, experts, trace)
        rows = []
        for part in parts:
            x_TD = part.settle()
            phases.enter("logits")
            if trace:
                final_TD = rms_norm(x_TD, self.weights.final_norm_D, self.config.rms_norm_eps)
                trace.hidden_states.append(final_TD)
            rows.append(x_TD[part.batch.logits_rows])
        rows_LD = rows[0] if len(rows) == 1 else torch.cat(rows)
        rows_LD = rms_norm(rows_LD, self.weights.final_norm_D, self.config.rms_norm_eps)
        logits = linear(rows_LD, self.weights.lm_head_VD).float()
        phases.enter("outside")
        return logits

    def _enter_layer(
        self,
        layer: int,
        part: _MicroBatch,
        cache: KVCache,
        experts: Experts,
        trace: Trace | None,
    ) -> None:
        """Attention and routing; leaves its experts at work."""
        config, phases, weights = self.config, self._phases, self.weights.layers[layer]
        phases.enter("attention")
        normed_TD = rms_norm(part.x_TD, weights.attention_norm_D, config.rms_norm_eps)
        q, k, v = linear(normed_TD, weights.wqkv).split(weights.qkv_sizes, dim=-1)
        q_TNH = rotate(q.unflatten(-1, (-1, config.head_dim)), part.rope)
        k_TKH = rotate(k.unflatten(-1, (-1, config.head_dim)), part.rope)
        v_TKH = v.unflatten(-1, (-1, config.head_dim))
        cache.write(layer, part.batch.slots_T, k_TKH, v_TKH)
        attended_TNH = self._attention.attend(q_TNH, part.plan, cache, layer)
        part.x_TD = part.x_TD + linear(attended_TNH.flatten(1), weights.wo)

        phases.enter("routing")
        normed_TD = rms_norm(part.x_TD, weights.experts_norm_D, config.rms_norm_eps)
        if trace:
            trace.router_logits.append(router_logits(normed_TD, weights.gate_ED))
        routing = route(normed_TD, weights.gate_ED, top_k=config.num_experts_per_tok)
        phases.enter("experts")
        part.pending = experts.dispatch(layer, normed_TD, routing)
