"""What is in a checkpoint, and what memory it takes to serve it. Reads headers, never values."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import get_args

from model.config import MixtralConfig
from model.layouts import Part
from model.quantize import quantized_bytes
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
    """Bytes of weights that processes keep when experts are held in one form.

    KV cache and buffers come on top. int8, int4 and nf4 are for experts: the head then keeps its
    weights in the checkpoint's own dtype.
    """

    form: str
    head_bytes: int
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
    missing, of another shape or surplus. Damaged values are found only by loading.
    """
    checkpoint = Checkpoint(folder)
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
    config = checkpoint.config
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = ((2 * inner, hidden), (hidden, inner))  # w1 and w3 are kept as one matrix
    num_head_parameters = checkpoint.decoder_bytes // checkpoint.dtype.itemsize
    head_bytes = {form: num_head_parameters * size for form, size in _DENSE.items()}
    expert_bytes = {form: sum(map(prod, shapes)) * size for form, size in _DENSE.items()}
    for form in _QUANTIZED:
        head_bytes[form] = checkpoint.decoder_bytes
        expert_bytes[form] = sum(quantized_bytes(form, shape) for shape in shapes)
    return tuple(
        Memory(form, head_bytes[form], expert_bytes[form], expert_bytes[form] * experts_per_worker)
        for form in (*_DENSE, *_QUANTIZED)
    )
