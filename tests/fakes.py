"""Checkpoints made by hand: random Mixtrals of any small shape, in every layout."""

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


# --- the other layouts ---


def fused(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in the layout that transformers 5 holds in memory: experts as 3-D tensors."""
    others = {
        name.replace(".block_sparse_moe.", ".mlp."): tensor
        for name, tensor in tensors.items()
        if ".experts." not in name
    }
    for layer in range(config["num_hidden_layers"]):
        w1, w2, w3 = _experts_of(config, tensors, layer)
        prefix = f"model.layers.{layer}.mlp.experts"
        others[f"{prefix}.gate_up_proj"] = torch.stack(
            [torch.cat((gate, up)) for gate, up in zip(w1, w3, strict=True)]
        )
        others[f"{prefix}.down_proj"] = torch.stack(w2)
    return others


def mistrals(
    config: dict[str, Any], tensors: dict[str, Tensor], *, stacked: bool
) -> dict[str, Tensor]:
    """The same under the names of Mistral's releases; stacked as in the first of them."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if stacked and ".experts." in name:
            continue
        for old, new in _MISTRALS_NAMES.items():
            name = name.replace(old, new)
        if stacked:
            name = name.replace("feed_forward.gate", "block_sparse_moe.gate")
        if ".wq." in name or ".wk." in name:
            tensor = _interleaved(tensor, head_dim=params(config)["head_dim"])
        renamed[name] = tensor
    if stacked:
        for layer in range(config["num_hidden_layers"]):
            w1, w2, w3 = _experts_of(config, tensors, layer)
            prefix = f"layers.{layer}.block_sparse_moe"
            renamed[f"{prefix}.w1"] = torch.cat(w1)
            renamed[f"{prefix}.w2"] = torch.cat([matrix.T for matrix in w2])
            renamed[f"{prefix}.w3"] = torch.cat(w3)
    return renamed


def params(config: dict[str, Any]) -> dict[str, Any]:
    """The `params.json` that says what this `config.json` says."""
    heads = config["num_attention_heads"]
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "hidden_dim": config["intermediate_size"],
        "n_heads": heads,
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_theta"],
        "max_seq_len": config["max_position_embeddings"],
        "moe": {
            "num_experts": config["num_local_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
        },
    }


def write_release(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, files: list[str]
) -> Path:
    """Write `params.json` and the tensors round these files in turn. Returns the folder."""
    (folder / "params.json").write_text(json.dumps(params(config)), encoding="utf-8")
    for i, file in enumerate(files):
        share = {name: tensors[name] for name in list(tensors)[i :: len(files)]}
        if file.endswith(".pt"):
            torch.save(share, folder / file)
        else:
            save_file({name: tensor.contiguous() for name, tensor in share.items()}, folder / file)
    return folder


_MISTRALS_NAMES = {
    "model.": "",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "block_sparse_moe": "feed_forward",
}


def _experts_of(
    config: dict[str, Any], tensors: dict[str, Tensor], layer: int
) -> tuple[list[Tensor], ...]:
    prefix = f"model.layers.{layer}.block_sparse_moe.experts"
    experts = range(config["num_local_experts"])
    return tuple(
        [tensors[f"{prefix}.{e}.{name}.weight"] for e in experts] for name in ("w1", "w2", "w3")
    )


def _interleaved(tensor: Tensor, *, head_dim: int) -> Tensor:
    """Rows i and i + H/2 of every head, which RoPE turns together, laid side by side."""
    rows = []
    for head in range(0, len(tensor), head_dim):
        for i in range(head_dim // 2):
            rows += [head + i, head + i + head_dim // 2]
    return tensor[rows]
