"""Checkpoints made by hand: random Mixtrals of any small shape, in Hugging Face's layout."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def small_config(**changes: Any) -> dict[str, Any]:
    """The content of a `config.json`: one layer, four experts, everything tiny."""
    return {
        "model_type": "mixtral",
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 10,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    } | changes


def random_tensors(config: dict[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of such a checkpoint, float32, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    tensors: dict[str, Tensor] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        values = torch.randn(rows, columns, generator=generator)
        tensors[f"{name}.weight"] = values * columns**-0.5

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm")
        matrix(f"{prefix}.self_attn.q_proj", q_size, hidden)
        matrix(f"{prefix}.self_attn.k_proj", kv_size, hidden)
        matrix(f"{prefix}.self_attn.v_proj", kv_size, hidden)
        matrix(f"{prefix}.self_attn.o_proj", hidden, q_size)
        norm(f"{prefix}.post_attention_layernorm")
        matrix(f"{prefix}.block_sparse_moe.gate", config["num_local_experts"], hidden)
        for expert_id in range(config["num_local_experts"]):
            expert = f"{prefix}.block_sparse_moe.experts.{expert_id}"
            matrix(f"{expert}.w1", inner, hidden)
            matrix(f"{expert}.w2", hidden, inner)
            matrix(f"{expert}.w3", inner, hidden)
    norm("model.norm")
    matrix("model.embed_tokens", config["vocab_size"], hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], hidden)
    return tensors


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, num_shards: int = 1
) -> Path:
    """Write `config.json` and the weights: one file, or that many shards with their index.

    Tensors go round the shards in turn, so that no shard holds a layer alone. Returns the folder.
    """
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    weight_map = {name: files[i % num_shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
