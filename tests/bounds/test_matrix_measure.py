"""The matrix measure and the comparison of solutions, against rationals and linear systems; a convolution without either."""

import math
from fractions import Fraction

import pytest
import torch
from helpers import fractions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipnext.bounds import matrix_measure
from lipnext.bounds.matrix_measure import (
    TOLERANCE,
    averaging,
    comparison,
    comparison_up,
    diagonal,
    measure_up,
    off_diagonal,
    with_diagonal,
)
from lipnext.core.errors import UnsoundError
from lipnext.nn.implicit import ImplicitConvolution, ImplicitDense


def _matrix(seed: int, n: int = 6, measure: float = 0.3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    layer = ImplicitDense(n, measure=measure, generator=g).double()
    with torch.no_grad():
        layer.weight.copy_(2 * torch.randn(n, n, generator=g, dtype=torch.float64))
    return layer.matrix().detach()


def _product(z: Tensor, matrix: Tensor) -> Tensor:
    return z @ matrix.mT


def _exact_measure(matrix: Tensor) -> Fraction:
    rows = fractions(matrix)
    return max(row[i] + sum(abs(v) for j, v in enumerate(row) if j != i) for i, row in enumerate(rows))


@given(st.integers(0, 10**6), st.floats(-30, 30))
@settings(max_examples=20)
def test_the_measure_is_that_of_rational_arithmetic_rounded_up(seed: int, exponent: float) -> None:
    matrix = (
        torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2**exponent
    )
    exact, found = _exact_measure(matrix), measure_up(matrix)
    size = float(matrix.abs().sum(1).max())
    assert exact <= Fraction(found) <= exact + Fraction(size * 1e-14)


def test_a_measure_below_the_exact_one_would_be_seen() -> None:
    # 1/3 added up in floats is not exact: without rounding up some of these would come out too small.
    matrices = [_matrix(seed, n=7) for seed in range(20)]
    plain = [float((diagonal(a) + off_diagonal(a).abs().sum(1)).max()) for a in matrices]
    assert any(Fraction(p) < _exact_measure(a) for p, a in zip(plain, matrices, strict=True))
    assert all(Fraction(measure_up(a)) >= _exact_measure(a) for a in matrices)


@given(st.integers(0, 10**6), st.floats(-3, 0.99))
@settings(max_examples=20)
def test_the_step_is_allowed_and_the_count_suffices(seed: int, measure: float) -> None:
    a = _matrix(seed, measure=measure)
    found = averaging(a)
    assert found.step == torch.tensor(found.step, dtype=torch.float32).item()
    assert Fraction(found.step) * (1 - min(Fraction(float(diagonal(a).min())), Fraction(0))) <= 1
    rate = 1 - Fraction(found.step) * (1 - max(_exact_measure(a), Fraction(0)))
    # The logarithm of the exact rate in floats is good to 1e-12 here.
    assert float(found.count) * math.log(float(rate)) <= math.log(found.left)
    assert found.left <= TOLERANCE * (1 + 1e-9)
    assert (found.count - 1) * math.log(float(rate)) >= math.log(TOLERANCE) * (1 + 1e-9)


@given(st.integers(0, 10**6), st.floats(-2, 0.9))
@settings(max_examples=20)
def test_the_averaged_iteration_contracts_at_the_proved_rate(seed: int, measure: float) -> None:
    a, g = _matrix(seed, measure=measure), torch.Generator().manual_seed(seed)
    found = averaging(a)
    z, other, v = (3 * torch.randn(50, 6, generator=g, dtype=torch.float64) for _ in range(3))
    for step in (found.step, found.step / 2):
        moved, others = (x + step * (torch.relu(_product(x, a) + v) - x) for x in (z, other))
        ratio = (moved - others).abs().amax(1) / (z - other).abs().amax(1)
        assert ratio.max() <= (1 - step * found.gap) * (1 + 1e-12)


@given(st.integers(0, 10**6), st.floats(-2, 0.5))
@settings(max_examples=8)
def test_the_comparison_falls_to_the_solution_of_its_equation_and_not_below(
    seed: int, measure: float
) -> None:
    a = _matrix(seed, measure=measure)
    forcing = torch.rand(1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = torch.linalg.solve(
        torch.eye(6) * 1.0 - with_diagonal(off_diagonal(a).abs(), diagonal(a)), forcing[0]
    )
    first = comparison_up(_product, a, forcing, steps=0)
    assert first.unique().numel() == 1
    assert first[0, 0] <= forcing.max() / (1 - max(measure, 0)) * (1 + 1e-9)
    few, many = comparison_up(_product, a, forcing, steps=5), comparison_up(_product, a, forcing, steps=1000)
    assert (many <= few).all()
    assert (few <= first).all()
    # a solver is good to 1e-12 here
    assert (many[0] >= best * (1 - 1e-12)).all()
    torch.testing.assert_close(many[0], best, rtol=1e-9, atol=0)
    assert (comparison(_product, a, forcing, steps=5) <= few).all()


def test_diagonals_of_kernels_are_centre_taps() -> None:
    kernel = torch.arange(2 * 2 * 9.0).view(2, 2, 3, 3)
    assert diagonal(kernel).tolist() == [4.0, 31.0]
    replaced = with_diagonal(kernel, torch.tensor([-1.0, -2.0]))
    assert replaced[0, 0, 1, 1] == -1
    assert replaced[1, 1, 1, 1] == -2
    changed = (replaced != kernel).nonzero().tolist()
    assert changed == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert off_diagonal(kernel).sum() == kernel.sum() - 35


def test_the_measure_of_a_kernel_is_that_of_its_matrix() -> None:
    layer = ImplicitConvolution(2, 3, measure=0.2, generator=torch.Generator().manual_seed(0)).double()
    kernel = layer.matrix().detach()
    unit = torch.eye(2 * 25, dtype=torch.float64).view(-1, 2, 5, 5)
    matrix = layer.product(unit, kernel).flatten(1).mT.contiguous()
    assert float(_exact_measure(matrix)) == pytest.approx(measure_up(kernel), abs=1e-14)
    assert measure_up(kernel) <= 0.2 + 1e-14


def test_the_published_convolution_is_not_well_posed_and_ours_is() -> None:
    """At its initialisation, for 8 channels and kernel 5; the number is that of the reference vectors."""
    torch.manual_seed(0)
    kernel = nn.Conv2d(8, 8, 5, dtype=torch.float32).weight.detach().double()
    kernel = kernel / kernel.norm()
    published = with_diagonal(kernel, diagonal(kernel) - 8 * kernel.abs().max())
    assert measure_up(published) == pytest.approx(4.1794500, abs=1e-6)
    with pytest.raises(UnsoundError, match=r"has the measure 4\.17945, which must be below 1"):
        averaging(published)
    ours = ImplicitConvolution(8, 5).double()
    with torch.no_grad():
        ours.weight.copy_(kernel)
    assert measure_up(ours.matrix()) <= 1e-12


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308])
def test_matrices_of_unusable_numbers_are_refused(value: float) -> None:
    matrix = torch.full((3, 3), value, dtype=torch.float64)
    with pytest.raises(UnsoundError, match="NaN, infinity or numbers that overflow"):
        averaging(matrix)


def test_steps_that_vanish_are_refused() -> None:
    with pytest.raises(UnsoundError, match=r"needs steps below 1\.52588e-05 or has a measure too close to 1"):
        averaging(torch.tensor([[-1e6, 1e6], [0.0, 0.0]], dtype=torch.float64))
    with pytest.raises(UnsoundError, match="must be below 1"):
        averaging(torch.eye(2))


def test_a_matrix_without_feedback_takes_one_step() -> None:
    found = averaging(torch.zeros(2, 2))
    assert (found.step, found.count) == (1.0 - 2.0**-16, 2)
    assert matrix_measure._GRID == 2.0**16
