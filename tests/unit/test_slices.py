"""Slices of an expert add up to it, in every layout and mode, and read no more than is theirs."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from model.errors import CheckpointError, QuantizationError
from model.experts import ExpertWeights, expert_ffn
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

CONFIG = small_config(hidden_size=64, intermediate_size=192, num_hidden_layers=2, head_dim=16)
PREFIX = "model.layers.1.block_sparse_moe.experts.2"
WHOLE = Unit(1, 2)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors(CONFIG)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]
) -> dict[str, Path]:
    """One folder for each layout."""
    root = tmp_path_factory.mktemp("layouts")
    for name in ("per expert", "fused", "mistral", "stacked", "pickled"):
        (root / name).mkdir()
    write_checkpoint(root / "per expert", CONFIG, tensors)
    write_checkpoint(root / "fused", CONFIG, fused(CONFIG, tensors))
    for name, file in (
        ("mistral", "consolidated.safetensors"),
        ("stacked", "consolidated.safetensors"),
        ("pickled", "consolidated.00.pt"),
    ):
        renamed = mistrals(CONFIG, tensors, stacked=name == "stacked")
        write_release(root / name, CONFIG, renamed, files=[file])
    return {folder.name: folder for folder in root.iterdir()}


def slices_of(unit: Unit, num_slices: int) -> list[Unit]:
    return [unit._replace(slice_number=i, num_slices=num_slices) for i in range(num_slices)]


def outputs(weights: ExpertWeights, dtype: torch.dtype = torch.float32) -> Tensor:
    x_RD = torch.randn(5, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(0))
    return expert_ffn(weights, x_RD.to(dtype)).float()


@pytest.mark.parametrize("layout", ["per expert", "fused", "mistral", "stacked", "pickled"])
@pytest.mark.parametrize("num_slices", [1, 2, 5])
def test_slices_are_rows_of_w1_and_w3_and_columns_of_w2(
    folders: dict[str, Path], tensors: dict[str, Tensor], layout: str, num_slices: int
) -> None:
    checkpoint = Checkpoint(folders[layout], dtype=torch.float32)
    loaded = [checkpoint.load_unit(unit) for unit in slices_of(WHOLE, num_slices)]
    for number, name in enumerate(("w1", "w3")):
        rows = torch.cat([weights.w13_2FD.chunk(2)[number] for weights in loaded])
        assert rows.equal(tensors[f"{PREFIX}.{name}.weight"])
    columns = torch.cat([weights.w2_DF for weights in loaded], dim=1)
    assert columns.equal(tensors[f"{PREFIX}.w2.weight"])
    assert len({weights.w2_DF.shape[1] for weights in loaded}) <= 2  # as even as can be


@given(num_slices=st.integers(1, 9))
@example(num_slices=192)
def test_slices_outputs_add_up_to_the_experts(folders: dict[str, Path], num_slices: int) -> None:
    checkpoint = Checkpoint(folders["per expert"], dtype=torch.float32)
    units = slices_of(WHOLE, num_slices)
    sums = sum(outputs(checkpoint.load_unit(unit)) for unit in (units[0], *units[1:]))
    whole = outputs(checkpoint.load_unit(Unit(1, 2)))
    torch.testing.assert_close(sums, whole, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_slice_comes_in_the_dtype_asked_for_and_its_bytes_are_counted(
    folders: dict[str, Path],
) -> None:
    for layout in ("per expert", "stacked"):
        checkpoint = Checkpoint(folders[layout], dtype=torch.bfloat16)
        arrived: list[int] = []
        weights = checkpoint.load_unit(Unit(0, 1, 1, 3), arrived.append)
        assert weights.w13_2FD.dtype == weights.w2_DF.dtype == torch.bfloat16
        assert sum(arrived) == weights.num_bytes == checkpoint.expert_bytes // 3


@pytest.mark.parametrize("layout", ["per expert", "fused", "stacked"])
def test_a_slice_reads_no_value_of_another(
    tmp_path: Path, tensors: dict[str, Tensor], layout: str
) -> None:
    spoilt = dict(tensors)
    for name, where in (("w1", (100, 0)), ("w3", (191, 63)), ("w2", (63, 96))):
        spoilt[f"{PREFIX}.{name}.weight"] = spoilt[f"{PREFIX}.{name}.weight"].clone()
        spoilt[f"{PREFIX}.{name}.weight"][where] = torch.nan  # read, it would be refused
    if layout == "stacked":
        renamed = mistrals(CONFIG, spoilt, stacked=True)
        write_release(tmp_path, CONFIG, renamed, files=["consolidated.safetensors"])
    else:
        write_checkpoint(tmp_path, CONFIG, fused(CONFIG, spoilt) if layout == "fused" else spoilt)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.load_unit(Unit(1, 2, 0, 2))
    with pytest.raises(CheckpointError, match="not finite"):
        checkpoint.load_unit(Unit(1, 2, 1, 2))


# --- quantised ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("is_copy", [False, True])
def test_quantised_slices_add_up_to_the_quantised_expert(
    tmp_path: Path, folders: dict[str, Path], mode: str, is_copy: bool, dtype: torch.dtype
) -> None:
    """They have its very codes and scales: in float32 only the order of the sums differs."""
    folder = folders["fused"]
    if is_copy:
        save_quantized(Checkpoint(folder), tmp_path, mode)
        folder = tmp_path
    checkpoint = Checkpoint(folder, dtype=dtype, expert_quantization=mode)
    whole = checkpoint.load_unit(Unit(1, 2))
    loaded = [checkpoint.load_unit(unit) for unit in slices_of(WHOLE, 3)]
    sums = sum((outputs(weights, dtype) for weights in loaded[1:]), outputs(loaded[0], dtype))
    # in bfloat16 each slice's output is rounded
    tolerance = TOLERANCE if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(sums, outputs(whole, dtype), rtol=tolerance, atol=tolerance)
    assert sum(weights.num_bytes for weights in loaded) <= 1.02 * whole.num_bytes


def test_slices_that_would_part_weights_with_one_scale_are_refused(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    for mode, num_slices, reason in (
        ("int4", 5, "int4 cannot be sliced at inputs 0 to 38: 32 of them share a scale"),
        ("nf4", 2, "nf4 cannot be sliced at inputs 0 to 96: 64 of them"),
        ("nf4-double", 3, "nf4-double cannot be sliced"),
    ):
        held = Checkpoint(folders["fused"], expert_quantization=mode)
        save_quantized(Checkpoint(folders["fused"]), tmp_path / mode, mode)
        for checkpoint in (held, Checkpoint(tmp_path / mode)):
            with pytest.raises(QuantizationError, match=reason):
                checkpoint.load_unit(Unit(1, 2, 0, num_slices))
    checkpoint = Checkpoint(folders["fused"], expert_quantization="int8")
    checkpoint.load_unit(Unit(1, 2, 4, 5))  # int8 has a scale for each output
