import math
from fractions import Fraction

import pytest
import torch
from helpers import rotations, spectral_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.core.errors import UnsoundError
from lipnext.manifold.polar import polar_svd, residual, retract


def _with_singular_values(values: Tensor, seed: int) -> Tensor:
    n = len(values)
    return rotations(n=n, seed=seed) * values @ rotations(n=n, seed=seed + 1).mT


def test_residual_is_the_frobenius_norm_of_the_defect():
    x = torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    # X^T X - I = [[0, 0.5], [0.5, 3.25]]
    assert residual(x).item() == pytest.approx(math.sqrt(0.5 + 3.25**2), rel=1e-15)
    assert residual(torch.stack([x, torch.eye(2)]).float()).dtype == torch.float64


@given(n=st.integers(1, 20), seed=st.integers(0, 2**16), spread=st.floats(0, 0.9))
@settings(max_examples=40, deadline=None)
def test_retract_is_the_polar_factor(n, seed, spread):
    g = torch.Generator().manual_seed(seed)
    squares = 1 + spread * (2 * torch.rand(n, generator=g) - 1)
    x = _with_singular_values(squares.sqrt(), seed)
    # The polar factor's condition number is 2 / (s_min + s_min) <= 3.2 here; the iteration ends at 64 n u.
    assert torch.allclose(retract(x), polar_svd(x), rtol=0, atol=200 * n * 2.0**-53)
    assert residual(retract(x)) <= 64 * n * 2.0**-53


@given(n=st.integers(1, 32), seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_retract_of_float32_rounds_the_polar_factor_once(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = (rotations(n=n, seed=seed) + 1e-3 * torch.randn(n, n, generator=g) / math.sqrt(n)).float()
    result = retract(x)
    assert result.dtype == torch.float32
    # entries are at most 1: half an ulp is 2^-25
    assert (result.double() - polar_svd(x.double())).abs().max() <= 2.0**-25 + 1e-12
    assert residual(result) <= 2 * n * 2.0**-24


@given(numerator=st.integers(-40, 40))
@settings(deadline=None)
def test_one_step_maps_the_residual_as_stated(numerator):
    """`s -> s (3 - s^2) / 2` turns `e = 1 - s^2` into `3/4 e^2 + 1/4 e^3`, exactly."""
    s = 1 + Fraction(numerator, 100)
    e, moved = 1 - s**2, s * (3 - s**2) / 2
    assert 1 - moved**2 == Fraction(3, 4) * e**2 + Fraction(1, 4) * e**3


def test_six_steps_suffice_from_one_half_and_five_do_not():
    x = _with_singular_values(torch.tensor([math.sqrt(0.5), 1.0, 1.1, 1.2]), seed=5)
    result = retract(x, max_steps=7)  # six steps, and the check that ends the iteration
    assert torch.allclose(result, polar_svd(x), rtol=0, atol=1e-14)
    with pytest.raises(UnsoundError):
        retract(x, max_steps=6)


def test_retract_is_idempotent():
    x = _with_singular_values(torch.tensor([0.8, 0.9, 1.0, 1.1, 1.2]), seed=0)
    once = retract(x)
    assert torch.equal(retract(once), once)
    single = retract(x.float())
    # a float32 point is a rounding away from the manifold; its polar factor rounds back to within one ulp
    assert (retract(single) - single).abs().max() <= 2.0**-24


def test_a_batch_is_its_matrices_one_by_one():
    x = torch.stack([_with_singular_values(torch.tensor([0.7, 1.0, 1.3]), seed=k) for k in range(4)])
    x[0] = torch.eye(3)
    result = retract(x.reshape(2, 2, 3, 3))
    for k in range(4):
        assert torch.allclose(result[k // 2, k % 2], retract(x[k]), rtol=0, atol=1e-14)


def test_many_moderate_residuals_are_within_reach():
    """The condition is on the spectral norm: 30 times 1.4 has `||E||_F = 5`, `||E||_2 = 0.96`."""
    x = 1.4 * rotations(n=30, seed=0)
    assert residual(x) > 5
    assert torch.allclose(retract(x), x / 1.4, rtol=0, atol=1e-13)


def test_an_average_inside_the_hull_is_within_reach():
    x = _with_singular_values(torch.tensor([1e-3, 0.01, 0.1, 1.0]), seed=0)
    # condition number 2 / (s3 + s4) = 180 of the polar factor
    assert torch.allclose(retract(x), polar_svd(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("largest", [1.45, 1.75, 2.0, 2.2, 3.0, 1e10])
def test_a_large_singular_value_is_refused_not_sent_to_the_wrong_sign(largest):
    x = _with_singular_values(torch.tensor([0.9, 1.0, 1.1, largest]), seed=0)
    with pytest.raises(UnsoundError, match=r"cannot be retracted.*spectral norm below 1.*retract more often"):
        retract(x)
    with pytest.raises(UnsoundError):
        retract(torch.stack([torch.eye(4), x]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_is_refused(bad):
    x = torch.eye(3).repeat(2, 1, 1)
    x[1, 0, 0] = bad
    with pytest.raises(UnsoundError, match=r"cannot be retracted: \|\|X\^T X - I\|\|_F is (nan|inf)"):
        retract(x)


def test_a_singular_matrix_is_refused():
    with pytest.raises(UnsoundError, match="cannot be retracted"):
        retract(torch.diag(torch.tensor([1.0, 1.0, 0.0])))


def test_polar_svd_is_the_nearest_orthogonal_matrix():
    x = _with_singular_values(torch.tensor([0.3, 1.0, 2.5]), seed=1)
    q = polar_svd(x)
    assert residual(q) < 1e-14
    # ||X - Q||_F^2 = sum (s - 1)^2 is the least possible; and Q^T X is symmetric
    assert torch.linalg.matrix_norm(x - q).item() == pytest.approx(math.sqrt(0.7**2 + 1.5**2), rel=1e-13)
    assert spectral_norm(q.mT @ x - x.mT @ q) < 1e-14
