"""Quantised weights lose little, take what they say they take, and come back from a file whole."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.decoder import Decoder
from model.errors import CheckpointError, QuantizationError
from model.experts import ExpertWeights, LocalExperts, expert_ffn
from model.generate import Mixtral
from model.linear import linear
from model.quantize import MODES, matrix, quantize, quantized, quantized_bytes
from model.quantized_copy import save_quantized
from model.steps import whole_pass
from model.units import Unit
from model.weights import Checkpoint
from tests.fakes import mistrals, random_tensors, small_config, write_checkpoint, write_release

BITS = {"nf4": 4, "nf4-double": 4, "int8": 8, "int4": 4}

# of the output's norm; one weight in 4 bits is off by about 9 % (a normal distribution), in 8 bits
# by 0.7 %, and an expert has three such matrices in its way
OUTPUT_ERROR = {"nf4": 0.2, "nf4-double": 0.2, "int8": 0.02, "int4": 0.2}

# the promise: how far perplexity on the held-out stories may rise
PERPLEXITY_RISE = {"nf4": 0.02, "nf4-double": 0.02, "int8": 0.002, "int4": 0.01}

OTHER_MODE = {"nf4": "int8", "nf4-double": "int4", "int8": "nf4-double", "int4": "nf4"}
"""Of attention, where experts are in the first."""

NUM_STORIES = 8


def random_matrix(outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    return values.to(dtype)


def random_expert(hidden: int, inner: int, dtype: torch.dtype) -> ExpertWeights:
    return ExpertWeights(
        random_matrix(2 * inner, hidden, dtype), random_matrix(hidden, inner, dtype, seed=1)
    )


def quantized_expert(dense: ExpertWeights, mode: str) -> ExpertWeights:
    assert isinstance(dense.w13_2FD, Tensor)
    assert isinstance(dense.w2_DF, Tensor)
    return ExpertWeights(quantized(dense.w13_2FD, mode), quantized(dense.w2_DF, mode))


def load(
    folder: Path, dtype: torch.dtype, experts: str | None = None, attention: str | None = None
) -> tuple[Any, ...]:
    checkpoint = Checkpoint(
        folder, dtype=dtype, expert_quantization=experts, attention_quantization=attention
    )
    config = checkpoint.config
    loaded = checkpoint.load_experts(config.expert_units)
    return Decoder(config, checkpoint.load_decoder()), LocalExperts(loaded)


def perplexity(mixtral: Mixtral, stories: list[str]) -> float:
    ids = [[*mixtral.tokenizer.encode_prompt(story), mixtral.tokenizer.eos_id] for story in stories]
    loss = mixtral.forward(ids, ids).loss
    assert loss is not None
    return math.exp(loss)


# --- fidelity ---


@pytest.fixture(scope="module")
def perplexity_before(mixtral: Mixtral, stories: list[str]) -> float:
    return perplexity(mixtral, stories[:NUM_STORIES])


@pytest.mark.parametrize("mode", MODES)
def test_perplexity_rises_by_less_than_promised_with_experts_and_attention_quantised(
    mode: str, tiny_folder: Path, stories: list[str], perplexity_before: float
) -> None:
    rough = Mixtral.load(
        tiny_folder, dtype="float32", expert_quantization=mode, attention_quantization=mode
    )
    after = perplexity(rough, stories[:NUM_STORIES])
    assert after != perplexity_before
    assert after <= perplexity_before * (1 + PERPLEXITY_RISE[mode])


@pytest.mark.parametrize("mode", MODES)
def test_quantised_attention_leaves_the_rest_of_a_head_as_it_is(
    mode: str, tiny_folder: Path
) -> None:
    dense = Checkpoint(tiny_folder).load_decoder()
    rough = Checkpoint(tiny_folder, attention_quantization=mode).load_decoder()
    x_RD = random_matrix(7, 192, torch.bfloat16) * 192**0.5
    for before, after in zip(dense.layers, rough.layers, strict=True):
        for name, value in vars(before).items():
            other = getattr(after, name)
            if name in ("wqkv", "wo"):
                expected = linear(x_RD, value).float()
                error = (linear(x_RD, other).float() - expected).norm()
                assert 0 < error <= OUTPUT_ERROR[mode] * expected.norm(), name
            elif name != "qkv_sizes":
                assert other.equal(value), name
    for name in ("embedding_VD", "final_norm_D", "lm_head_VD"):
        assert getattr(rough, name).equal(getattr(dense, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_an_expert_computes_nearly_the_same_in_the_dtype_of_its_rows(
    mode: str, dtype: torch.dtype
) -> None:
    dense = random_expert(192, 224, dtype)
    x_RD = random_matrix(7, 192, dtype, seed=2) * 192**0.5
    expected = expert_ffn(dense, x_RD).float()
    output = expert_ffn(quantized_expert(dense, mode), x_RD)
    assert output.dtype == dtype
    assert (output.float() - expected).norm() <= OUTPUT_ERROR[mode] * expected.norm()


@given(
    mode=st.sampled_from(MODES),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_is_held_within_the_error_of_its_bits(
    mode: str, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """Every weight is within one and a half steps of its row's range cut in 2^bits."""
    weight = random_matrix(outputs, inputs, dtype)
    held = matrix(quantize(weight, mode), mode, (outputs, inputs), dtype)
    assert held.nbytes == quantized_bytes(mode, (outputs, inputs))
    assert sum(tensor.nbytes for tensor in held.tensors) == held.nbytes
    read_back = held.linear(torch.eye(inputs, dtype=dtype)).T
    assert read_back.shape == weight.shape
    # nf4's blocks do not end with rows, and its levels are widest at the ends
    largest = weight.float().abs().max()
    step = 2 * largest / (2 ** BITS[mode] - 1)
    assert (read_back.float() - weight.float()).abs().max() <= 1.5 * step


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_cpu_kernel_multiplies_by_the_same_weights_as_plain_torch(mode: str) -> None:
    parts = quantize(random_matrix(48, 96, torch.float32), mode)
    x_RI = random_matrix(5, 96, torch.bfloat16, seed=3)
    by_kernel = matrix(parts, mode, (48, 96), torch.bfloat16).linear(x_RI).float()
    by_torch = matrix(parts, mode, (48, 96), torch.float32).linear(x_RI.float())
    # bfloat16 has 8 bits: its own rounding is all that may differ
    assert (by_kernel - by_torch).norm() <= 2**-7 * by_torch.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_constant_matrix_stays_what_it_is(mode: str, value: float) -> None:
    weight = torch.full((16, 64), value)
    held = matrix(quantize(weight, mode), mode, (16, 64), torch.float32)
    difference = held.linear(torch.eye(64)).T - weight
    assert difference.abs().max() <= abs(value) * 2**-8  # scales are bfloat16


def test_int8_codes_do_not_add_up_to_more_than_float16_holds() -> None:
    weight = torch.full((16, 4096), 0.25, dtype=torch.float16)
    product = quantized(weight, "int8").linear(torch.ones(1, 4096, dtype=torch.float16))
    assert (product.float() - 1024).abs().max() <= 1024 * 2**-8


@pytest.mark.parametrize("mode", MODES)
def test_no_rows_give_no_rows(mode: str) -> None:
    expert = quantized_expert(random_expert(32, 48, torch.bfloat16), mode)
    assert expert_ffn(expert, torch.empty(0, 32, dtype=torch.bfloat16)).shape == (0, 32)


# --- memory ---


@pytest.mark.parametrize(
    ("mode", "ratio"), [("nf4", 0.30), ("nf4-double", 0.27), ("int8", 0.51), ("int4", 0.32)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_bytes_are_a_fraction_of_bfloat16s(
    mode: str, ratio: float, dtype: torch.dtype, tiny_folder: Path
) -> None:
    checkpoint = Checkpoint(
        tiny_folder, dtype=dtype, expert_quantization=mode, attention_quantization=mode
    )
    arrived: list[int] = []
    weights = checkpoint.load_unit(Unit(3, 5), arrived.append)
    assert sum(arrived) == weights.num_bytes == checkpoint.expert_bytes
    assert weights.num_bytes <= ratio * 2 * checkpoint.config.num_expert_parameters
    arrived.clear()
    wqkv, wo = checkpoint.load_attention(3, arrived.append)
    assert sum(arrived) == wqkv.nbytes + wo.nbytes
    assert sum(arrived) <= ratio * 2 * (192 * (192 + 2 * 64) + 192 * 192)


# --- copies ---


@pytest.mark.parametrize("sizes", [(64, 32), (40, 10)], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_read_back_gives_the_same_bits(
    mode: str, sizes: tuple[int, int], tmp_path: Path
) -> None:
    config = small_config(
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        num_hidden_layers=2,
        torch_dtype="bfloat16",
    )
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(config).items()}
    (tmp_path / "source").mkdir()
    source = write_checkpoint(tmp_path / "source", config, tensors)
    copy, attention = tmp_path / "copy", OTHER_MODE[mode]
    written: list[int] = []
    save_quantized(Checkpoint(source), copy, mode, written.append, attention_mode=attention)
    assert sum(written) <= sum(file.stat().st_size for file in copy.glob("*.safetensors"))
    read_back = Checkpoint(copy)
    assert (read_back.expert_quantization, read_back.attention_quantization) == (mode, attention)
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (
            whole_pass(*load(folder, dtype, *wanted), [[1, 5, 3, 7], [1, 22]])
            for folder, wanted in ((source, (mode, attention)), (copy, ()))
        )
        assert first.equal(second)


def test_attention_that_a_copy_left_dense_may_be_quantised_at_load(
    small: Path, tmp_path: Path
) -> None:
    save_quantized(Checkpoint(small), tmp_path / "copy", "int4")
    first, second = (
        whole_pass(*load(folder, torch.float32, "int4", "int8"), [[1, 5, 3, 7]])
        for folder in (small, tmp_path / "copy")
    )
    assert first.equal(second)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_everything_but_the_experts_is_copied_as_it_is(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = small_config(**changes)
    (tmp_path / "source").mkdir()
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config), num_shards=3)
    (source / "tokenizer.model").write_bytes(b"any")
    save_quantized(Checkpoint(source), tmp_path / "copy", "int8")
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == b"any"
    before, after = Checkpoint(source), Checkpoint(tmp_path / "copy")
    assert before.config == after.config
    for name, stored in before.sources.items():
        if stored.part != "experts":
            assert before.load_tensor(name).equal(after.load_tensor(name)), name


def test_a_copy_of_mistrals_release_equals_a_copy_of_hugging_faces(tmp_path: Path) -> None:
    config = small_config()
    tensors = random_tensors(config)
    for name in ("hugging_face", "release"):
        (tmp_path / name).mkdir()
    write_checkpoint(tmp_path / "hugging_face", config, tensors)
    released = mistrals(config, tensors, stacked=True)
    write_release(tmp_path / "release", config, released, files=["consolidated.safetensors"])
    logits = []
    for name in ("hugging_face", "release"):
        copy = tmp_path / f"copy of {name}"
        save_quantized(Checkpoint(tmp_path / name, dtype=torch.float32), copy, "int4")
        assert Checkpoint(copy).dtype == torch.float32
        decoder, experts = load(copy, torch.float32)
        logits.append(whole_pass(decoder, experts, [[1, 5, 3, 7]]))
    assert logits[0].equal(logits[1])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    config = small_config()
    (tmp_path / "source").mkdir()
    return write_checkpoint(tmp_path / "source", config, random_tensors(config))


def set_first(value: float) -> Callable[[Tensor], Tensor]:
    def change(part: Tensor) -> Tensor:
        part.view(-1)[0] = value
        return part

    return change


@pytest.mark.parametrize(
    ("mode", "part", "change"),
    [
        *[
            (mode, "w13.scales", set_first(value))
            for mode in ("nf4", "int8", "int4")
            for value in (math.nan, math.inf, -1.0)
        ],
        ("int4", "w2.zeros", set_first(math.nan)),
        ("int4", "w2.zeros", set_first(-math.inf)),
        ("int8", "w2.codes", set_first(-128)),
        ("nf4-double", "w2.scale_scales", set_first(-1.0)),
        ("nf4-double", "w2.scale_offset", set_first(math.nan)),
        *[(mode, "w2.scales", lambda part: part[:-1]) for mode in MODES],
        *[(mode, "w2.codes", lambda part: part[1:].clone()) for mode in MODES],
        ("nf4", "w2.scales", Tensor.half),
        ("int8", "w13.codes", lambda part: part.view(torch.uint8)),
    ],
)
def test_a_part_that_was_tampered_with_is_refused_by_name(
    small: Path, tmp_path: Path, mode: str, part: str, change: Callable[[Tensor], Tensor]
) -> None:
    save_quantized(Checkpoint(small), tmp_path / "copy", mode)
    file = tmp_path / "copy" / "experts-000-002.safetensors"
    parts = load_file(file)
    save_file(parts | {part: change(parts[part].clone()).contiguous()}, file)
    checkpoint = Checkpoint(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=f"experts-000-002.*{part}"):
        checkpoint.load_unit(Unit(0, 2))
    assert checkpoint.load_unit(Unit(0, 1))


def test_a_part_missing_or_too_many_is_refused(small: Path, tmp_path: Path) -> None:
    save_quantized(Checkpoint(small), tmp_path / "copy", "int8")
    file = tmp_path / "copy" / "experts-000-000.safetensors"
    parts = load_file(file)
    save_file(parts | {"w2.zeros": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"w2\.zeros"):
        Checkpoint(tmp_path / "copy").load_unit(Unit(0, 0))
    save_file({name: part for name, part in parts.items() if name != "w2.scales"}, file)
    with pytest.raises(CheckpointError, match=r"experts-000-000"):
        Checkpoint(tmp_path / "copy").load_unit(Unit(0, 0))


def test_attention_that_was_tampered_with_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    save_quantized(Checkpoint(small), tmp_path / "copy", "int4", attention_mode="int8")
    file = tmp_path / "copy" / "attention-000.safetensors"
    parts = load_file(file)
    for part, change in (("wo.scales", set_first(math.nan)), ("wqkv.codes", set_first(-128))):
        save_file(parts | {part: change(parts[part].clone())}, file)
        with pytest.raises(CheckpointError, match=f"attention-000.*{part}"):
            Checkpoint(tmp_path / "copy").load_decoder()
    file.unlink()
    with pytest.raises(CheckpointError, match="attention-000"):
        Checkpoint(tmp_path / "copy").load_decoder()
    assert Checkpoint(tmp_path / "copy").load_unit(Unit(0, 0))


def test_a_cut_or_missing_file_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    save_quantized(Checkpoint(small), tmp_path / "copy", "int4")
    file = tmp_path / "copy" / "experts-000-003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=file.name):
        Checkpoint(tmp_path / "copy").load_unit(Unit(0, 3))
    file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        Checkpoint(tmp_path / "copy").load_unit(Unit(0, 3))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "JSON"),
        ("[]", "format"),
        ({"format": "other"}, "format"),
        ({"version": 1}, "version 1"),
        ({"experts": "int3"}, "'int3'"),
        ({"experts": None}, "None"),
        ({"experts": ["int8"]}, "int8"),
        ({"attention": "int3"}, "'int3'"),
        ({"attention": {}}, "{}"),
    ],
)
def test_a_marker_of_something_else_is_refused(
    small: Path, tmp_path: Path, content: Any, named: str
) -> None:
    save_quantized(Checkpoint(small), tmp_path / "copy", "int8")
    marker = tmp_path / "copy" / "quantization.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(marker.read_text()) | content)
    marker.write_text(content)
    with pytest.raises(CheckpointError, match=f"quantization.json.*{named}"):
        Checkpoint(tmp_path / "copy")


def test_a_copy_is_not_quantised_again(small: Path, tmp_path: Path) -> None:
    save_quantized(Checkpoint(small), tmp_path / "copy", "int8", attention_mode="nf4")
    read_back = Checkpoint(tmp_path / "copy", expert_quantization="int8")
    assert read_back.expert_quantization == "int8"
    with pytest.raises(QuantizationError, match="experts as int8, not as int4"):
        Checkpoint(tmp_path / "copy", expert_quantization="int4")
    with pytest.raises(QuantizationError, match="attention as nf4, not as int4"):
        Checkpoint(tmp_path / "copy", attention_quantization="int4")
    with pytest.raises(QuantizationError, match="int8 already"):
        save_quantized(read_back, tmp_path / "again", "int8")
    with pytest.raises(QuantizationError, match="nf4 already"):
        save_quantized(Checkpoint(small, attention_quantization="nf4"), tmp_path / "again", "int8")


def test_a_copy_goes_into_a_folder_of_its_own(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not empty"):
        save_quantized(Checkpoint(small), small, "int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_quantized(Checkpoint(small), tmp_path / "file", "int8")


# --- modes that cannot be had ---


def test_an_unknown_mode_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="'awq' is not one of nf4, nf4-double, int8, int4"):
        Checkpoint(small, expert_quantization="awq")
    with pytest.raises(QuantizationError, match="awq"):
        Checkpoint(small, attention_quantization="awq")
    with pytest.raises(QuantizationError, match="awq"):
        save_quantized(Checkpoint(small), tmp_path / "copy", "awq")
    with pytest.raises(QuantizationError, match="awq"):
        save_quantized(Checkpoint(small), tmp_path / "copy", "int8", attention_mode="awq")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("mode", MODES)
def test_only_nf4_needs_bitsandbytes(
    mode: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_quantized(Checkpoint(small), tmp_path / "copy", mode)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    # a head reads everything but the experts, whatever they are
    assert Checkpoint(tmp_path / "copy").load_decoder()
    if not mode.startswith("nf4"):
        assert Checkpoint(small, expert_quantization=mode).load_unit(Unit(0, 0))
        return
    with pytest.raises(QuantizationError, match=r"bitsandbytes.*maestrale\[quant\]"):
        Checkpoint(small, expert_quantization=mode)
    with pytest.raises(QuantizationError, match="bitsandbytes"):
        Checkpoint(tmp_path / "copy").load_unit(Unit(0, 0))
