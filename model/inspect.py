"""What is in a checkpoint, and what memory it takes to serve it. Reads headers, never values."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from model.config import MixtralConfig
from model.errors import CheckpointError
from model.layouts import Part
from model.quantized_copy import attention_bytes, expert_bytes
from model.weights import Checkpoint

_DENSE = {"float32": 4, "bfloat16": 2}
_QUANTIZED = ("int8", "int4", "nf4")


@dataclass(frozen=True)
class PartSize:
    """How much of a checkpoint one part is."""

    name: Part
    num_parameters: int
    num_bytes: int
    """As stored."""


@dataclass(frozen=True)
class Memory:
    """Bytes of weights that processes keep in one form. KV cache and buffers come on top.

    int8, int4 and nf4 are for experts and the matrices of attention: the rest of a head stays in
    the checkpoint's own dtype.
    """

    form: str
    head_bytes: int
    """Attention dense."""
    quantized_head_bytes: int
    """Attention in this form, too; of float32 and bfloat16 the same as head_bytes."""
    expert_bytes: int
    worker_bytes: int
    """Of the worker with most experts, when they are spread evenly."""


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint."""

    folder: Path
    config: MixtralConfig
    layout: str
    num_files: int
    dtypes: tuple[str, ...]
    """All that occur, as torch spells them."""
    parts: tuple[PartSize, ...]
    num_experts: int
    """Of all layers."""
    num_parameters_per_expert: int
    num_bytes_per_expert: int
    """As stored, of the first."""
    num_workers: int
    """For which `memory` is told."""
    memory: tuple[Memory, ...]

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def inspect(folder: Path, *, num_workers: int = 1) -> Inspection:
    """Read all headers of a checkpoint and add up.

    Raises ConfigError or CheckpointError when the checkpoint is not whole: a file or tensor is
    missing, of another shape or surplus. Damaged values are found only by loading. Raises
    CheckpointError for a quantised copy, too.
    """
    checkpoint = Checkpoint(folder)
    if checkpoint.expert_quantization is not None:
        raise CheckpointError(
            f"{folder} is a copy with experts in {checkpoint.expert_quantization}: "
            "inspect the checkpoint that it was made of"
        )
    config = checkpoint.config
    parameters = dict.fromkeys(get_args(Part), 0)
    stored_bytes = dict.fromkeys(get_args(Part), 0)
    dtypes: set[str] = set()
    for name, source in checkpoint.sources.items():
        dtype = checkpoint.stored(name).dtype
        dtypes.add(str(dtype).removeprefix("torch."))
        parameters[source.part] += source.num_elements
        stored_bytes[source.part] += source.num_elements * dtype.itemsize
    num_experts = config.num_hidden_layers * config.num_local_experts
    first_expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    return Inspection(
        folder=folder,
        config=config,
        layout=checkpoint.layout.value,
        num_files=len(set(checkpoint.files.file_of.values())),
        dtypes=tuple(sorted(dtypes)),
        parts=tuple(
            PartSize(part, parameters[part], stored_bytes[part]) for part in get_args(Part)
        ),
        num_experts=num_experts,
        num_parameters_per_expert=config.num_expert_parameters,
        num_bytes_per_expert=(
            config.num_expert_parameters * checkpoint.stored(first_expert).dtype.itemsize
        ),
        num_workers=num_workers,
        memory=_memory(checkpoint, experts_per_worker=-(-num_experts // num_workers)),
    )


def _memory(checkpoint: Checkpoint, *, experts_per_worker: int) -> tuple[Memory, ...]:
    config, own_size = checkpoint.config, checkpoint.dtype.itemsize
    head_bytes = checkpoint.decoder_bytes
    attention = (source for source in checkpoint.sources.values() if source.part == "attention")
    num_attention_parameters = sum(source.num_elements for source in attention)
    rows = []
    for form, size in _DENSE.items():
        of_head = head_bytes // own_size * size
        rows.append((form, of_head, of_head, config.num_expert_parameters * size))
    for form in _QUANTIZED:
        of_attention = config.num_hidden_layers * attention_bytes(config, form)
        quantized = head_bytes - num_attention_parameters * own_size + of_attention
        rows.append((form, head_bytes, quantized, expert_bytes(config, form)))
    return tuple(Memory(*row, worker_bytes=row[-1] * experts_per_worker) for row in rows)
