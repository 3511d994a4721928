"""All of Mixtral in one file, to be read next to the paper (Mixtral of Experts, 2401.04088).

The yardstick of the tests. It imports nothing of what it measures and is as simple as can be: no
cache, no batch, float32 only, every expert computed for every token. For small models.

Shape suffixes: T tokens, D hidden, N query heads, K key/value heads, H head dimension, E experts,
V vocabulary; S is T again, as the tokens looked at.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu


class Oracle:
    """One Mixtral. `config` is what `config.json` holds, `tensors` what the weight files hold."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        rope = config.get("rope_parameters") or config
        self.rope_theta = rope["rope_theta"]
        self.head_dim = (
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "Oracle":
        """Read `config.json` and every safetensors file of a checkpoint."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        return cls(config, tensors)

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits after every token of one sequence, (T, V) float32."""
        embedding_VD = self.tensors["model.embed_tokens.weight"]
        x_TD = embedding_VD[token_ids]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x_TD = x_TD + self._attention(name, self._norm(f"{name}.input_layernorm", x_TD))
            x_TD = x_TD + self._experts(name, self._norm(f"{name}.post_attention_layernorm", x_TD))
        x_TD = self._norm("model.norm", x_TD)
        if self.config.get("tie_word_embeddings"):
            return x_TD @ embedding_VD.T
        return self._linear("lm_head", x_TD)

    def greedy(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """The likeliest next token, again and again; no token ends it."""
        known = list(token_ids)
        for _ in range(max_tokens):
            known.append(int(self.logits(known)[-1].argmax()))
        return known[len(token_ids) :]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T

    def _norm(self, name: str, x_TD: Tensor) -> Tensor:
        """Divide by the root of the mean square, then scale each dimension."""
        mean_square = x_TD.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]
        return self.tensors[f"{name}.weight"] * x_TD / mean_square.sqrt()

    def _rope(self, x_TNH: Tensor) -> Tensor:
        """Turn the pair of dimensions (i, i + H/2) of token t by the angle t * theta^(-2i/H)."""
        exponents = torch.arange(0, self.head_dim, 2) / self.head_dim
        angles = torch.arange(len(x_TNH))[:, None, None] * self.rope_theta**-exponents
        first, second = x_TNH.chunk(2, dim=-1)
        turned_first = first * angles.cos() - second * angles.sin()
        turned_second = second * angles.cos() + first * angles.sin()
        return torch.cat((turned_first, turned_second), dim=-1)

    def _attention(self, layer: str, x_TD: Tensor) -> Tensor:
        """softmax(q k / sqrt(H)) v, where a token looks back over the window, itself included."""
        q_TNH, k_TKH, v_TKH = (
            self._linear(f"{layer}.self_attn.{name}_proj", x_TD).unflatten(-1, (-1, self.head_dim))
            for name in "qkv"
        )
        queries_per_kv = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        q_TNH = self._rope(q_TNH)
        k_SNH = self._rope(k_TKH).repeat_interleave(queries_per_kv, dim=1)
        v_SNH = v_TKH.repeat_interleave(queries_per_kv, dim=1)

        num_tokens = len(x_TD)
        distance_TS = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
        window = self.config.get("sliding_window") or num_tokens
        unseen_TS = (distance_TS < 0) | (distance_TS >= window)
        scores_NTS = torch.einsum("tnh,snh->nts", q_TNH, k_SNH) / math.sqrt(self.head_dim)
        scores_NTS = scores_NTS.masked_fill(unseen_TS, -torch.inf)
        attended_TNH = torch.einsum("nts,snh->tnh", scores_NTS.softmax(-1), v_SNH)
        return self._linear(f"{layer}.self_attn.o_proj", attended_TNH.flatten(1))

    def _experts(self, layer: str, x_TD: Tensor) -> Tensor:
        """Section 2.1 of the paper: y = sum over e of Softmax(TopK(x Wg))_e * SwiGLU_e(x)."""
        scores_TE = self._linear(f"{layer}.block_sparse_moe.gate", x_TD)
        best = scores_TE.topk(self.config["num_experts_per_tok"])
        only_best_TE = torch.full_like(scores_TE, -torch.inf)
        gates_TE = only_best_TE.scatter(1, best.indices, best.values).softmax(-1)
        y_TD = torch.zeros_like(x_TD)
        for e in range(self.config["num_local_experts"]):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            gate, up = self._linear(f"{expert}.w1", x_TD), self._linear(f"{expert}.w3", x_TD)
            y_TD += gates_TE[:, e, None] * self._linear(f"{expert}.w2", silu(gate) * up)
        return y_TD
