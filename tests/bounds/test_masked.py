"""Norms of masked matrices are never below what an SVD or exact arithmetic finds, and close above it."""

import math

import pytest
import torch
from helpers import is_norm_bound, spectral_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.bounds.masked import masked_absolute_bounds, masked_gram_bounds


def _problem(seed: int, batch: int = 12, m: int = 9, n: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix and masks, among them an empty and a full one."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.rand(batch, m, generator=g) < 0.5, torch.rand(batch, n, generator=g) < 0.4
    rows[0], columns[1] = False, False
    rows[2], columns[2] = True, True
    return torch.randn(m, n, generator=g), rows, columns


def _masked(matrix: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
    pairs = zip(rows.double(), columns.double(), strict=True)
    return [torch.diag(row) @ matrix @ torch.diag(column) for row, column in pairs]


@given(st.integers(0, 10**6), st.floats(-60, 60))
@settings(max_examples=10)
def test_gram_bounds_are_just_above_the_norm(seed: int, exponent: float) -> None:
    matrix, rows, columns = _problem(seed)
    matrix = matrix * 2.0**exponent
    bounds = masked_gram_bounds(matrix, rows, columns, largest=9)
    for bound, masked in zip(bounds.tolist(), _masked(matrix, rows, columns), strict=True):
        norm = spectral_norm(masked)
        assert norm * (1 - 1e-13) <= bound <= norm * 9 ** (1 / 2**8) * (1 + 1e-9) + 1e-40


def test_a_gram_bound_holds_in_exact_arithmetic_where_only_the_rounding_terms_are_left() -> None:
    # After 40 squarings the excess of Gram iteration is below one part in 1e12.
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        matrix = torch.randint(-4, 5, (3, 4), generator=g).double() / 3
        rows, columns = torch.rand(1, 3, generator=g) < 0.8, torch.rand(1, 4, generator=g) < 0.8
        (bound,) = masked_gram_bounds(matrix, rows, columns, largest=4, squarings=40).tolist()
        (masked,) = _masked(matrix, rows, columns)
        assert is_norm_bound(masked, bound)
        assert not is_norm_bound(masked, bound * (1 - 1e-11)) or not masked.any()


def test_matrices_of_a_larger_side_have_no_gram_bound() -> None:
    matrix, rows, columns = _problem(0)
    bounds = masked_gram_bounds(matrix, rows, columns, largest=3)
    side = torch.minimum(rows.sum(1), columns.sum(1))
    assert torch.equal(bounds.isinf(), side > 3)
    assert bounds.isinf().any()
    assert not bounds.isinf().all()


def test_a_matrix_with_nan_has_no_number_as_its_bound() -> None:
    matrix, rows, columns = _problem(0)
    matrix[0, 0] = math.nan
    assert masked_gram_bounds(matrix, rows, columns, largest=9)[2].isnan()  # the full mask


@pytest.mark.parametrize("steps", [0, 3])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_absolute_bounds_are_above_the_norm_of_the_absolute_values(seed: int, steps: int) -> None:
    matrix, rows, columns = _problem(seed)
    sizes = matrix.abs()
    bounds = masked_absolute_bounds(lambda x: x @ sizes.mT, lambda y: y @ sizes, rows, columns, steps)
    for bound, masked in zip(bounds.tolist(), _masked(sizes, rows, columns), strict=True):
        norm = spectral_norm(masked)
        assert norm * (1 - 1e-13) <= bound <= (1.1 * norm if steps else 4 * norm) + 1e-100
