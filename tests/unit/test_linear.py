"""Rows through matrices on processors with and without half precision of their own."""

import pytest
import torch
import torch.nn.functional as F

from model import linear as subject
from model.quantized_int import int8_matrix, int8_parts

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["native half", "no native half"])
def _native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_IS_NATIVE", dict.fromkeys(HALVES, request.param))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_rows_are_never_widened(dtype: torch.dtype) -> None:
    assert not subject.widening_pays(torch.zeros(10_000, 2, dtype=dtype), rows_per_thread=1)


def test_few_rows_do_not_repay_widening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_IS_NATIVE", {torch.bfloat16: False})
    enough = 6 * torch.get_num_threads()
    rows = torch.zeros(enough, 2, dtype=torch.bfloat16)
    assert subject.widening_pays(rows, rows_per_thread=6)
    assert not subject.widening_pays(rows[1:], rows_per_thread=6)
