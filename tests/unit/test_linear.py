"""Rows through matrices on processors with and without half precision of their own."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model import linear as subject
from model import quantized_int
from model.quantized_int import int4_matrix, int4_parts, int8_matrix, int8_parts

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["native half", "no native half"])
def _native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "multiplies", lambda dtype: request.param)


def rows_and_matrix(num_rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 96 inputs, and more outputs than are widened at once, not a multiple of them."""
    torch.manual_seed(num_rows)
    return torch.randn(num_rows, 96).to(dtype), torch.randn(600, 96).to(dtype)


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_rows", [0, 1, 5, 64])
def test_a_product_is_exact_to_the_rows_dtype(num_rows: int, dtype: torch.dtype) -> None:
    x, matrix = rows_and_matrix(num_rows, dtype)
    product = subject.linear(x, matrix)
    assert product.dtype == dtype
    torch.testing.assert_close(
        product.double(), F.linear(x.double(), matrix.double()), rtol=1e-2, atol=5e-2
    )


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("num_rows", [1, 64])
def test_int8_gives_what_its_codes_say(num_rows: int) -> None:
    x, matrix = rows_and_matrix(num_rows, torch.bfloat16)
    parts = int8_parts(matrix)
    product = int8_matrix(parts, (600, 96), torch.bfloat16).linear(x)
    held = parts["codes"].double() * parts["scales"].double()[:, None]
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product.double(), F.linear(x.double(), held), rtol=2e-2, atol=5e-2)


@pytest.mark.skipif(not quantized_int._MULTIPLIES_BYTES, reason="needs a processor with VNNI")
@pytest.mark.parametrize("dtype", HALVES)
@given(
    num_rows=st.integers(quantized_int._BYTES_ROWS, 40),
    num_outputs=st.integers(1, 70),
    num_inputs=st.integers(1, 200),
    outlier=st.sampled_from([1.0, 30.0, 1000.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_in_two_bytes_lose_no_more_than_half_precision_does(
    dtype: torch.dtype, num_rows: int, num_outputs: int, num_inputs: int, outlier: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_inputs, generator=generator)
    x[1] = 0
    x[2, 0] *= outlier
    x[3] *= 1e-6
    x = x.to(dtype)
    parts = int8_parts(torch.randn(num_outputs, num_inputs, generator=generator))
    matrix = int8_matrix(parts, (num_outputs, num_inputs), dtype)
    assert isinstance(matrix, quantized_int.Int8Matrix)
    assert matrix._bytes_pay(x)
    held = parts["codes"].double() * parts["scales"].double()[:, None]
    product, expected = matrix.linear(x), F.linear(x.double(), held)
    assert product.dtype == dtype
    # what two bytes leave of an input, times the weights; then one rounding to the rows' dtype
    left = x.double().abs().amax(1, keepdim=True) / 64_516 * held.abs().sum(1)
    rounding = expected.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
    assert ((product.double() - expected).abs() <= left + rounding).all()


@pytest.mark.parametrize("num_inputs", [32, 70, 300])
def test_int4_gives_the_same_for_many_rows_as_for_few(
    num_inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantized_int._block_outputs() or not torch.cpu._is_avx2_supported()
    x, matrix = torch.randn(9, num_inputs).bfloat16(), torch.randn(640, num_inputs)
    parts = int4_parts(matrix)
    products = []
    for pays in (False, True):
        monkeypatch.setattr(quantized_int, "widening_pays", lambda *_, pays=pays: pays)
        products.append(int4_matrix(parts, (640, num_inputs), torch.bfloat16).linear(x))
    few, many = products
    assert many.dtype == torch.bfloat16
    torch.testing.assert_close(few, many, rtol=1e-2, atol=0.1)


def test_a_dtype_without_instructions_is_multiplied_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subject, "_HAS_INSTRUCTIONS", {torch.bfloat16: False})
    assert not subject.multiplies.__wrapped__(torch.bfloat16)
    assert subject.multiplies.__wrapped__(torch.float32)


@pytest.mark.parametrize(("native_s", "widened_s"), [(1.0, 2.0), (2.0, 2.0), (2.0, 1.0)])
def test_instructions_that_are_slower_than_float32_are_not_used(
    native_s: float, widened_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0

    def taking(seconds: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            nonlocal now_s
            assert x.dtype == weight.dtype == torch.bfloat16
            now_s += seconds
            return x

        return linear

    monkeypatch.setattr(subject, "_HAS_INSTRUCTIONS", {torch.bfloat16: True})
    monkeypatch.setattr(subject, "_TRIAL", (8, 64, 64))
    monkeypatch.setattr(subject, "time", SimpleNamespace(perf_counter=lambda: now_s))
    monkeypatch.setattr(subject, "F", SimpleNamespace(linear=taking(native_s)))
    monkeypatch.setattr(subject, "_widened_dense", taking(widened_s))
    assert subject.multiplies.__wrapped__(torch.bfloat16) is (native_s <= widened_s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_rows_are_never_widened(dtype: torch.dtype) -> None:
    assert not subject.widening_pays(torch.zeros(10_000, 2, dtype=dtype), rows_per_thread=1)


def test_few_rows_do_not_repay_widening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "multiplies", lambda dtype: False)
    enough = 6 * torch.get_num_threads()
    rows = torch.zeros(enough, 2, dtype=torch.bfloat16)
    assert subject.widening_pays(rows, rows_per_thread=6)
    assert not subject.widening_pays(rows[1:], rows_per_thread=6)
