import math

import pytest
import torch
from helpers import rotations, skew_with_angles, spectral_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.manifold.skew import skew, skew_sign, tangent


def _sign_of_value(s: Tensor, steps: int = 6) -> Tensor:
    """What the steps do to one singular value."""
    for step in range(steps):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < steps - 2 else (15 / 8, -10 / 8, 3 / 8)
        s = a * s + b * s**3 + c * s**5
    return s


def _slow_skew_sign(direction: Tensor, steps: int = 6) -> Tensor:
    """The same polynomial on the singular values of an SVD."""
    u, s, vh = torch.linalg.svd(direction)
    return u * _sign_of_value(s / torch.linalg.vector_norm(s), steps) @ vh


def test_skew_is_the_nearest_skew_matrix():
    m = torch.randn(3, 5, 5)
    assert torch.equal(skew(m), -skew(m).mT)
    assert torch.allclose(m - skew(m), (m - skew(m)).mT)
    assert torch.equal(skew(skew(m)), skew(m))


@given(n=st.integers(1, 8), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_tangent_is_the_gradient_along_every_skew_direction(n, seed):
    """`d/dt f(X exp(t B)) = <G, X B> = <A, B>` for every skew `B`."""
    g = torch.Generator().manual_seed(seed)
    x, gradient, b = rotations(n=n, seed=seed), torch.randn(n, n, generator=g), torch.randn(n, n, generator=g)
    b = b - b.T
    a = tangent(x, gradient)
    assert torch.equal(a, -a.mT)
    slope = (gradient * (x @ b)).sum().item()
    assert (a * b).sum().item() == pytest.approx(slope, abs=1e-12 * n * n)


@given(
    pairs=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8),
    seed=st.integers(0, 2**16),
    scale=st.integers(-12, 12),
)
@settings(max_examples=40, deadline=None)
def test_regular_matrices_get_their_matrix_sign(pairs, seed, scale):
    """Singular values within a factor 20 of each other are all lifted: `J^2 = -I`, `J` the polar factor."""
    a = skew_with_angles(torch.tensor(pairs), seed) * 10.0**scale
    j = skew_sign(a)
    assert torch.equal(j, -j.mT)
    u, _, vh = torch.linalg.svd(a)
    # four quintic steps bring a value into [0.68, 1.14]; the last two send that to within 6e-4 of 1
    assert spectral_norm(j - u @ vh) <= 1e-3
    assert spectral_norm(j @ j + torch.eye(len(j))) <= 2e-3
    assert torch.allclose(j, _slow_skew_sign(a), rtol=0, atol=1e-9)


def test_the_stated_reach_of_the_polynomial():
    """Values above 4e-3 of the Frobenius norm come within 2 % of 1, those below do not, none overshoots."""
    s = _sign_of_value(torch.linspace(0, 1, 100_001))
    assert s.max() < 1 + 4e-5  # the last two steps send 1.14 to 1.000035
    assert s[400:].min() > 0.98
    assert _sign_of_value(torch.tensor(3e-3)).item() == pytest.approx(0.94, abs=0.01)
    assert _sign_of_value(torch.tensor(1e-3)).item() == pytest.approx(0.47, abs=0.01)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_the_number_of_steps_is_honoured(steps):
    a = skew_with_angles(torch.tensor([0.9, 0.3, 0.5]), seed=0)
    assert torch.allclose(skew_sign(a, steps), _slow_skew_sign(a, steps), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_in_bfloat16_cost_a_per_cent_and_no_skewness(dtype):
    angles = torch.linspace(0.1, 1.0, 16)
    a = skew_with_angles(angles, seed=0).to(dtype)
    rough, exact = skew_sign(a, dtype=torch.bfloat16), skew_sign(a)
    assert rough.dtype == dtype
    assert torch.equal(rough, -rough.mT)
    assert not torch.equal(rough, exact)
    # bfloat16 keeps 8 bits: 2^-8 = 0.4 % an operation, over the three products of the last step
    assert 1e-4 < spectral_norm(rough - exact) < 0.02


def test_zero_gives_zero():
    assert torch.equal(skew_sign(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))
    assert torch.equal(skew_sign(torch.zeros(1, 1)), torch.zeros(1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_stays_finite_and_skew(dtype):
    odd = skew(torch.randn(3, 7, 7, dtype=dtype))  # an odd skew matrix is singular
    v, w = torch.randn(2, 9, 1, dtype=dtype)
    rank_two = (v @ w.mT - w @ v.mT).expand(3, 9, 9)
    for a in (odd, rank_two):
        j = skew_sign(a)
        assert torch.isfinite(j).all()
        assert torch.equal(j, -j.mT)
        assert spectral_norm(j[0]) < 1 + 5e-5


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-22, 1e-10, 1e10, 1e25, 1e36])
def test_the_scale_of_a_float32_gradient_does_not_matter(scale):
    """Squares below 1e-45 or above 1e38 must not reach the result as NaN, and a stalled step is no step."""
    a = skew(torch.randn(6, 6, dtype=torch.float32).clamp(-3, 3))
    j = skew_sign((a.double() * scale).float())
    # subnormal numbers keep few digits, hence the loose bound at 1e-40
    assert spectral_norm(j.double() - skew_sign(a).double()) < (1e-2 if scale < 1e-38 else 1e-5)
    assert math.isfinite(spectral_norm(j))


def test_a_batch_does_not_mix_scales():
    a = torch.stack(
        [skew_with_angles(torch.tensor([1.0, 0.4]), 0), skew_with_angles(torch.tensor([1e-9, 5e-10]), 1)]
    )
    for matrix, j in zip(a, skew_sign(a), strict=True):
        assert torch.allclose(j, skew_sign(matrix), rtol=0, atol=1e-12)
