"""Half-precision matrices in FBGEMM's order, for processors that only multiply float32."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import Mixtral, linear, packed_half
from model.experts import ExpertWeights, checksum
from model.linear import Weight
from model.packed_half import PackedHalfMatrix, packed_if_faster
from model.units import Unit
from model.weights import Checkpoint
from tests.fakes import random_tensors, small_config, write_checkpoint
from tests.reference import load_ours

HALVES = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(not packed_half._HAS_FBGEMM, reason="torch has FBGEMM for x86 only")


@pytest.fixture(autouse=True)
def _no_native_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_half, "multiplies", lambda dtype: dtype not in HALVES)
    monkeypatch.setattr(packed_half, "_MIN_WEIGHTS", 1)
    monkeypatch.setattr(packed_half, "_MOST_FILLED", math.inf)


def packed(weight: Tensor) -> PackedHalfMatrix:
    found = packed_if_faster(weight)
    assert isinstance(found, PackedHalfMatrix)
    return found


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 40])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 1), (33, 70), (600, 96)])
def test_a_product_is_exact_to_the_rows_dtype(
    num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(num_rows)
    x_RI = torch.randn(num_rows, num_inputs).to(dtype)
    weight_OI = torch.randn(num_outputs, num_inputs).to(dtype)
    matrix = packed(weight_OI)
    product_RO = linear.linear(x_RI, matrix)
    expected_RO = x_RI.double() @ weight_OI.double().T
    assert product_RO.dtype == dtype
    # one rounding to the rows' dtype, and float32's of a sum of num_inputs products
    torch.testing.assert_close(
        product_RO.double(), expected_RO, rtol=torch.finfo(dtype).eps, atol=1e-4
    )


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_matrix_has_a_block_for_every_thread(
    num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(packed_half, "_MIN_BLOCK_WEIGHTS", 32 * 70)
    torch.manual_seed(0)
    weight_OI, x_RI = torch.randn(90, 70).bfloat16(), torch.randn(5, 70).bfloat16()
    matrix = packed(weight_OI)
    assert len(matrix.blocks) == num_threads
    expected_RO = x_RI.double() @ weight_OI.double().T
    torch.testing.assert_close(matrix.linear(x_RI).double(), expected_RO, rtol=2**-8, atol=1e-4)
    assert packed(torch.ones(3, 70, dtype=torch.bfloat16)).blocks[1:] == []


@pytest.mark.parametrize("scale", [2.0**-9, 2.0**17])
def test_weights_that_float16_would_spoil_stay_as_they_are(scale: float) -> None:
    weight = (torch.rand(8, 8) * scale).bfloat16()
    weight[0, 0] = 0.9 * scale
    assert packed_if_faster(weight) is weight


def test_what_is_not_faster_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.ones(8, 8, dtype=torch.bfloat16)
    assert packed_if_faster(half.float()).dtype == torch.float32  # type: ignore[union-attr]
    monkeypatch.setattr(packed_half, "_MIN_WEIGHTS", half.numel() + 1)
    assert packed_if_faster(half) is half
    monkeypatch.setattr(packed_half, "_MIN_WEIGHTS", 1)
    monkeypatch.setattr(packed_half, "multiplies", lambda dtype: True)
    assert packed_if_faster(half) is half


def test_what_would_mostly_be_filling_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(packed_half, "multiplies", lambda dtype: dtype not in HALVES)
    a_third_more = torch.ones(1400, 768, dtype=torch.bfloat16)
    assert packed_if_faster(a_third_more) is a_third_more
    slices = packed(torch.ones(1024, 1792, dtype=torch.bfloat16))
    assert slices.nbytes == 2 * 1024 * 2048


def test_any_other_weight_is_another_checksum() -> None:
    torch.manual_seed(1)
    w13, w2 = torch.randn(40, 20).bfloat16(), torch.randn(20, 20).bfloat16()
    sound = ExpertWeights(packed(w13), packed(w2))
    assert checksum(sound) == checksum(ExpertWeights(packed(w13), packed(w2)))
    for bit in range(16):
        flipped = w2.clone()
        flipped.view(torch.int16)[3, 5] ^= torch.tensor(1 << bit, dtype=torch.int32).short()
        if float(flipped.abs().amax()) < 65504:
            assert checksum(ExpertWeights(packed(w13), packed(flipped))) != checksum(sound)


def test_a_checkpoint_of_large_matrices_is_packed_and_says_the_same(
    tmp_path: Path, mixtral: Mixtral, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = small_config(torch_dtype="bfloat16")
    folder = write_checkpoint(tmp_path, content, random_tensors(content))

    def weights_and_logits() -> tuple[list[Weight], Tensor]:
        ours = load_ours(folder, mixtral)
        weights = ours.decoder.weights
        expert = Checkpoint(folder).load_unit(Unit(0, 1))
        matrices = [weights.layers[0].wqkv, weights.layers[0].wo, weights.lm_head_VD]
        logits_TV = ours.forward([list(range(1, 12))]).logits_TV
        return [*matrices, expert.w13_2FD, expert.w2_DF], logits_TV

    packed_weights, actual = weights_and_logits()
    assert all(isinstance(weight, PackedHalfMatrix) for weight in packed_weights)
    monkeypatch.setattr(packed_half, "_MIN_WEIGHTS", 2**20)
    dense_weights, expected = weights_and_logits()
    assert all(isinstance(weight, Tensor) for weight in dense_weights)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
