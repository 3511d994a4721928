"""An inspection adds up what headers say: exact sizes, nothing read of the values."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import CheckpointError
from model.inspect import Inspection, inspect
from model.quantized_copy import save_quantized
from model.units import Unit
from model.weights import Checkpoint
from tests.fakes import (
    fused,
    mistrals,
    random_tensors,
    small_config,
    write_checkpoint,
    write_release,
)

CONFIG = small_config(num_hidden_layers=2, hidden_size=64, intermediate_size=32)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return random_tensors(CONFIG)


def sizes(inspection: Inspection) -> dict[str, int]:
    return {part.name: part.num_parameters for part in inspection.parts}


def test_parts_add_up_to_the_files(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    found = inspect(write_checkpoint(tmp_path, CONFIG, tensors, num_shards=3))
    assert found.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.num_bytes == 4 * found.num_parameters
    assert found.num_files == 3
    assert found.dtypes == ("float32",)
    assert (found.num_experts, found.num_parameters_per_expert) == (8, 3 * 64 * 32)
    assert found.num_bytes_per_expert == 4 * 3 * 64 * 32
    assert sizes(found) == {
        "embeddings": 24 * 64,
        "attention": 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64),
        "norms": (2 * 2 + 1) * 64,
        "routers": 2 * 4 * 64,
        "experts": 8 * 3 * 64 * 32,
        "head": 24 * 64,
    }


def test_every_layout_holds_the_same(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    plain, pickles, joined = (tmp_path / name for name in ("plain", "pickles", "joined"))
    for folder in (plain, pickles, joined):
        folder.mkdir()
    write_checkpoint(plain, CONFIG, tensors)
    write_checkpoint(joined, CONFIG, fused(CONFIG, tensors))
    stacked = mistrals(CONFIG, tensors, stacked=True)
    write_release(pickles, CONFIG, stacked, files=["consolidated.00.pt", "consolidated.01.pt"])
    found = [inspect(folder) for folder in (plain, joined, pickles)]
    assert len({found.layout for found in found}) == 3
    assert found[0].parts == found[1].parts == found[2].parts


def test_mixed_dtypes_are_told_and_counted(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    mixed = {
        name: tensor.bfloat16() if ".experts." in name else tensor
        for name, tensor in tensors.items()
    }
    found = inspect(write_checkpoint(tmp_path, CONFIG, mixed))
    assert found.dtypes == ("bfloat16", "float32")
    by_part = {part.name: part for part in found.parts}
    assert by_part["experts"].num_bytes == 2 * by_part["experts"].num_parameters
    assert by_part["norms"].num_bytes == 4 * by_part["norms"].num_parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_what_loading_keeps(
    tmp_path: Path, tensors: dict[str, Tensor], dtype: str
) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, tensors)
    memory = {memory.form: memory for memory in inspect(folder, num_workers=3).memory}
    checkpoint = Checkpoint(folder, dtype=getattr(torch, dtype))
    arrived: list[int] = []
    checkpoint.load_decoder(arrived.append)
    assert memory[dtype].head_bytes == sum(arrived)
    assert memory[dtype].expert_bytes == checkpoint.load_unit(Unit(0, 0)).num_bytes
    assert memory[dtype].worker_bytes == 3 * memory[dtype].expert_bytes  # 8 experts: 3, 3 and 2


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_memory_of_quantised_weights_is_what_quantising_keeps(
    tmp_path: Path, tensors: dict[str, Tensor], mode: str
) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, tensors)
    memory = {memory.form: memory for memory in inspect(folder).memory}
    checkpoint = Checkpoint(folder, expert_quantization=mode, attention_quantization=mode)
    assert memory[mode].expert_bytes == checkpoint.load_unit(Unit(0, 0)).num_bytes
    assert memory[mode].head_bytes == memory["float32"].head_bytes  # the checkpoint's own dtype
    arrived: list[int] = []
    checkpoint.load_decoder(arrived.append)
    assert memory[mode].quantized_head_bytes == sum(arrived) == checkpoint.decoder_bytes


def test_a_quantised_copy_is_told_from_a_broken_checkpoint(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    (tmp_path / "source").mkdir()
    source = write_checkpoint(tmp_path / "source", CONFIG, tensors)
    save_quantized(Checkpoint(source), tmp_path / "copy", "int8")
    with pytest.raises(CheckpointError, match="copy with experts in int8"):
        inspect(tmp_path / "copy")


def test_only_headers_are_read(tmp_path: Path) -> None:
    """Mixtral-8x7B as 93 GB of holes: whoever read the values would need minutes."""
    config: dict[str, Any] = {"model_type": "mixtral", "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0

    def add(name: str, *shape: int) -> None:
        nonlocal end
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}

    for layer in range(32):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096)):
            add(f"{prefix}.self_attn.{name}_proj.weight", rows, 4096)
        add(f"{prefix}.input_layernorm.weight", 4096)
        add(f"{prefix}.post_attention_layernorm.weight", 4096)
        add(f"{prefix}.mlp.gate.weight", 8, 4096)
        add(f"{prefix}.mlp.experts.gate_up_proj", 8, 2 * 14_336, 4096)
        add(f"{prefix}.mlp.experts.down_proj", 8, 4096, 14_336)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        add(name, 32_000, 4096)
    add("model.norm.weight", 4096)
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)

    found = inspect(tmp_path, num_workers=8)
    assert found.num_parameters == 46_702_792_704
    assert found.num_bytes == 2 * found.num_parameters == end
    assert found.num_bytes_per_expert == 352_321_536
    memory = {memory.form: memory for memory in found.memory}
    assert memory["bfloat16"].worker_bytes == 32 * 352_321_536
    ratio = {form: memory[form].expert_bytes / 352_321_536 for form in memory}
    assert ratio == pytest.approx(
        {"float32": 2, "bfloat16": 1, "int8": 0.5, "int4": 0.3125, "nf4": 0.28125}, rel=1e-3
    )


@pytest.mark.parametrize("damage", ["missing", "mis-shaped", "integer"])
def test_a_checkpoint_that_is_not_whole_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], damage: str
) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensor = tensors.pop(name)
    if damage == "mis-shaped":
        tensors[name] = tensor.T.contiguous()
    elif damage == "integer":
        tensors[name] = tensor.int()
    folder = write_checkpoint(tmp_path, CONFIG, tensors)
    with pytest.raises(CheckpointError, match=name):
        inspect(folder)
