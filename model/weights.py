"""Reading a checkpoint, tensor by tensor: a head takes all but the experts, a worker only its own.

Knows Hugging Face's layout (one `model.safetensors`, or shards with an index). Files are opened
lazily and mapped, so nothing is read that is not asked for.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import MixtralConfig
from model.errors import CheckpointError
from model.experts import ExpertWeights

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # fp8 needs scales

OnBytes = Callable[[int], None]
"""Called with the size of each tensor as it arrives, for progress."""


def ignore_bytes(num_bytes: int) -> None:
    """An OnBytes for callers that show no progress."""


@dataclass(frozen=True)
class LayerWeights:
    """Attention, norms and router of one layer; q, k and v stacked into one matrix."""

    attention_norm_D: Tensor
    wqkv: Tensor
    qkv_sizes: tuple[int, int, int]
    wo: Tensor
    experts_norm_D: Tensor
    gate_ED: Tensor


@dataclass(frozen=True)
class DecoderWeights:
    """Everything of a Mixtral that is not an expert."""

    embedding_VD: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_D: Tensor
    lm_head_VD: Tensor


class Checkpoint:
    """A checkpoint folder, opened for reading. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """dtype: what to convert to; None keeps the configuration's.

        Raises ConfigError or CheckpointError, naming the file.
        """
        self.folder = folder
        self.config = MixtralConfig.from_folder(folder)
        self.dtype = dtype or getattr(torch, self.config.dtype)
        self.device = torch.device(device)
        self._file_of = _index(folder)
        self._open_files: dict[str, Any] = {}

    @property
    def expert_bytes(self) -> int:
        """Bytes of one (layer, expert) once loaded."""
        return self.config.num_expert_parameters * self.dtype.itemsize

    def load_decoder(self, on_bytes: OnBytes = ignore_bytes) -> DecoderWeights:
        """Everything but the experts. Raises CheckpointError naming file and tensor."""
        config = self.config

        def load(name: str, *shape: int) -> Tensor:
            return self._load(name, shape, on_bytes)

        hidden, head_dim = config.hidden_size, config.head_dim
        q_size = config.num_attention_heads * head_dim
        kv_size = config.num_key_value_heads * head_dim
        layers = []
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            qkv = [
                load(f"{prefix}.self_attn.{name}_proj.weight", size, hidden)
                for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size))
            ]
            layers.append(
                LayerWeights(
                    attention_norm_D=load(f"{prefix}.input_layernorm.weight", hidden),
                    wqkv=torch.cat(qkv),
                    qkv_sizes=(q_size, kv_size, kv_size),
                    wo=load(f"{prefix}.self_attn.o_proj.weight", hidden, q_size),
                    experts_norm_D=load(f"{prefix}.post_attention_layernorm.weight", hidden),
                    gate_ED=load(
                        f"{prefix}.block_sparse_moe.gate.weight", config.num_local_experts, hidden
                    ),
                )
            )
        embedding_VD = load("model.embed_tokens.weight", config.vocab_size, hidden)
        if config.tie_word_embeddings:
            lm_head_VD = embedding_VD
        else:
            lm_head_VD = load("lm_head.weight", config.vocab_size, hidden)
        final_norm_D = load("model.norm.weight", hidden)
        return DecoderWeights(embedding_VD, tuple(layers), final_norm_D, lm_head_VD)

    def load_expert(
        self, layer: int, expert_id: int, on_bytes: OnBytes = ignore_bytes
    ) -> ExpertWeights:
        """One expert of one layer. Raises CheckpointError naming file and tensor."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert_id}"
        w1 = self._load(f"{prefix}.w1.weight", (inner, hidden), on_bytes)
        w3 = self._load(f"{prefix}.w3.weight", (inner, hidden), on_bytes)
        w2 = self._load(f"{prefix}.w2.weight", (hidden, inner), on_bytes)
        return ExpertWeights(w13_2FD=torch.cat((w1, w3)), w2_DF=w2)

    def load_experts(
        self, which: Iterable[tuple[int, int]], on_bytes: OnBytes = ignore_bytes
    ) -> dict[tuple[int, int], ExpertWeights]:
        """Several experts, by (layer, expert)."""
        return {key: self.load_expert(*key, on_bytes) for key in which}

    def _load(self, name: str, shape: tuple[int, ...], on_bytes: OnBytes) -> Tensor:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise CheckpointError(f"{self.folder}: the checkpoint has no tensor {name}")
        file = self.folder / file_name
        try:
            if file_name not in self._open_files:
                self._open_files[file_name] = safe_open(file, framework="pt")
            tensor: Tensor = self._open_files[file_name].get_tensor(name)
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} does not exist but should hold {name}") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}"
            )
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{file}: {name} is {tensor.dtype}, not a floating type")
        # clone: the mapped file's pages must not stay part of this process's weights
        tensor = tensor.to(device=self.device, dtype=self.dtype, copy=True).contiguous()
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: {name} holds values that are not finite")
        on_bytes(tensor.nbytes)
        return tensor


def _index(folder: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    index_file = folder / "model.safetensors.index.json"
    single_file = folder / "model.safetensors"
    if index_file.is_file():
        try:
            weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): _plain_name(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index_file} is not an index of shards: {error!r}") from error
    if single_file.is_file():
        try:
            with safe_open(single_file, framework="pt") as tensors:
                return dict.fromkeys(tensors.keys(), single_file.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{single_file} is not a safetensors file: {error}") from error
    raise CheckpointError(
        f"{folder} holds no weights: neither {single_file.name} nor {index_file.name} is there"
    )


def _plain_name(file_name: str) -> str:
    """A shard's name as the index gives it; it may not lead out of the folder."""
    if Path(file_name).name != file_name or file_name in ("", ".."):
        raise ValueError(f"{file_name!r} is not a plain file name")
    return file_name
