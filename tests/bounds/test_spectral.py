import math

import pytest
import torch
from helpers import is_norm_bound, rotations, spectral_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.bounds.spectral import (
    _symmetric_norm_up,
    absolute_norm_bound,
    estimate_spectral_norm,
    mirrored,
    near_orthogonal_bound,
    nonnegative_bound,
    spectral_bound,
)
from lipnext.core.bound import Estimate, LipschitzBound
from lipnext.core.errors import UnsoundError
from lipnext.manifold.haar import haar

BOUNDS = [near_orthogonal_bound, spectral_bound]

# LAPACK's largest singular value may itself be off by a few n u, in either direction.
SVD_ERROR = 1e-13


def _gaussian(m: int, n: int, seed: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def _sparse(m: int, n: int, seed: int, share: float) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=g) * (torch.rand(m, n, generator=g) < share)


small = st.integers(1, 4)
entries = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.7071067811865476, 1e-8, 3.0]),
    st.floats(-2, 2, allow_subnormal=False),
)


@st.composite
def small_matrices(draw):
    m, n = draw(small), draw(small)
    return torch.tensor([[draw(entries) for _ in range(n)] for _ in range(m)])


@pytest.mark.parametrize("bound", BOUNDS)
@given(w=small_matrices(), exponent=st.integers(-660, 500))
@settings(max_examples=60, deadline=None)
def test_bounds_hold_in_exact_arithmetic(bound, w, exponent):
    """`value^2 I - W^T W` is semidefinite as a matrix of rationals, at any scale from 1e-198 to 1e150."""
    w = w * 2.0**exponent
    assert is_norm_bound(w, bound(w).value)


@pytest.mark.parametrize("bound", BOUNDS)
@given(
    n=st.integers(1, 4), seed=st.integers(0, 2**20), noise=st.sampled_from([0.0, 1e-16, 1e-8, 1e-3, 0.1, 0.3])
)
@settings(max_examples=60, deadline=None)
def test_bounds_hold_in_exact_arithmetic_near_orthogonal(bound, n, seed, noise):
    w = rotations(n=n, seed=seed) + noise * _gaussian(n, n, seed)
    assert is_norm_bound(w, bound(w).value)
    assert is_norm_bound(w.float(), bound(w.float()).value)


@pytest.mark.parametrize("squarings", [0, 1, 2, 7])
def test_the_rounding_terms_carry_the_bound_where_the_exact_norm_is_met(squarings):
    """Vectors and plane rotations: nothing but rounding terms separates the bound from the norm."""
    g = torch.Generator().manual_seed(squarings)
    for _ in range(150):
        vector = torch.randn(3, 1, generator=g)
        angle = 7 * torch.rand((), generator=g)
        plane = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        for w in (vector, vector[:2].mT, vector / vector.norm(), plane):
            assert is_norm_bound(w, spectral_bound(w, squarings).value)
            assert is_norm_bound(w, near_orthogonal_bound(w, squarings).value)
            assert is_norm_bound(w.abs(), absolute_norm_bound(w, squarings))


@pytest.mark.parametrize("squarings", [0, 1, 2, 3])
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 2**20),
    noise=st.floats(0, 0.3),
)
@settings(max_examples=20, deadline=None)
def test_near_orthogonal_bound_is_never_below_the_svd(squarings, m, n, seed, noise):
    w = rotations(n=max(m, n), seed=seed)[:m, :n] + noise * _gaussian(m, n, seed) / math.sqrt(max(m, n))
    assert near_orthogonal_bound(w, squarings).value >= spectral_norm(w) * (1 - SVD_ERROR)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 2**20),
    exponent=st.integers(-200, 150),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_no_bound_is_below_the_svd_at_any_scale(m, n, seed, exponent, share):
    w = _sparse(m, n, seed, share) * 10.0**exponent
    truth = spectral_norm(w) * (1 - SVD_ERROR)
    assert near_orthogonal_bound(w).value >= truth
    assert spectral_bound(w).value >= truth
    absolute = spectral_norm(w.abs()) * (1 - SVD_ERROR)
    assert absolute_norm_bound(w) >= absolute


@given(w=small_matrices(), exponent=st.integers(-660, 500), steps=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_absolute_norm_bound_holds_in_exact_arithmetic(w, exponent, steps):
    w = w * 2.0**exponent
    assert is_norm_bound(w.abs(), absolute_norm_bound(w, steps))


@pytest.mark.parametrize("n", [2, 7, 64, 200, 256])
def test_a_stored_haar_matrix_is_bounded_within_a_millionth(n):
    w = haar(n, generator=torch.Generator().manual_seed(n), dtype=torch.float32)
    truth, bound = spectral_norm(w), near_orthogonal_bound(w)
    assert truth * (1 - SVD_ERROR) <= bound.value <= truth + 1e-6
    assert bound.norm == 2.0
    assert bound.proof == "gram-residual"


def test_squaring_the_residual_tightens_the_bound():
    w = haar(128, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    values = [near_orthogonal_bound(w, squarings).value for squarings in (0, 1, 2)]
    assert values[0] > values[1] > values[2]
    # soundness analysis 5.4: about 2.9e-7, 1e-7 and 5e-8 above 1
    assert values[2] - 1 < 1.5e-7


def test_a_float64_orthogonal_matrix_is_bounded_to_rounding():
    n = 100
    # gamma_n ||W||_F^2 = n^2 u dominates: 1.1e-12 here, halved by the root
    assert near_orthogonal_bound(haar(n)).value - 1 < n**2 * 2.0**-53


@pytest.mark.parametrize("n", [4, 30, 100])
def test_gram_iteration_is_as_tight_as_documented(n):
    """Equal singular values are the worst case, `n^(1/2^(k+2))`; a spectral gap leaves next to nothing."""
    flat = 3.0 * haar(n)
    for squarings in (3, 7):
        excess = spectral_bound(flat, squarings).value / 3.0 - 1
        assert 0 <= excess <= n ** (0.5 ** (squarings + 2)) - 1 + 1e-9
    gap = flat + 10 * torch.outer(flat[0], flat[1])
    assert spectral_bound(gap).value == pytest.approx(spectral_norm(gap), rel=1e-9)
    assert spectral_bound(gap).proof == "gram-iteration"


def test_the_documented_worst_case_is_attained():
    """`256^(1/512) - 1` at k = 7; for the docstring's n = 1024 that is 1.4 %."""
    assert spectral_bound(torch.eye(256)).value == pytest.approx(256 ** (1 / 512), rel=1e-9)
    assert 0.013 < 1024 ** (1 / 512) - 1 < 0.014


def test_far_from_orthogonal_falls_back_to_gram_iteration():
    w = 5 * haar(6)
    assert near_orthogonal_bound(w).proof == "gram-iteration"
    assert near_orthogonal_bound(w).value < 5.1


def test_absolute_norm_bound_converges():
    w = haar(64)
    # soundness analysis 5.4: three steps reach 1e-4; the largest value of a positive matrix stands alone
    assert absolute_norm_bound(w) == pytest.approx(spectral_norm(w.abs()), rel=1e-3)
    assert absolute_norm_bound(w, steps=0) > absolute_norm_bound(w)


@given(w=small_matrices(), exponent=st.integers(-660, 500))
@settings(max_examples=60, deadline=None)
def test_nonnegative_bound_holds_in_exact_arithmetic(w, exponent):
    w = w.abs() * 2.0**exponent
    bound = nonnegative_bound(w)
    assert is_norm_bound(w, bound.value)
    assert bound.proof == "collatz-wielandt"


def test_nonnegative_bound_is_tight_and_refuses_negative_entries():
    w = haar(40).abs()
    assert spectral_norm(w) <= nonnegative_bound(w, steps=10).value <= spectral_norm(w) * (1 + 1e-9)
    w[3, 5] = -1e-300
    with pytest.raises(UnsoundError, match="needs a matrix without negative entries; use spectral_bound"):
        nonnegative_bound(w)


def test_zero_matrices():
    zero = torch.zeros(3, 2)
    for value in (near_orthogonal_bound(zero).value, spectral_bound(zero).value, absolute_norm_bound(zero)):
        assert 0 <= value < 1e-100


def test_a_computed_gram_matrix_is_made_symmetric():
    """A nilpotent matrix squares to zero: without the copy its "norm" would come out 1e-8 instead of 1."""
    nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert _symmetric_norm_up(mirrored(nilpotent), 2) >= 1
    computed = torch.randn(9, 9)
    symmetric = mirrored(computed)
    assert torch.equal(symmetric, symmetric.mT)
    assert torch.equal(symmetric.triu(), computed.triu())


def test_a_product_summed_in_another_order_below_the_diagonal(monkeypatch):
    """Both bounds mirror what they square: a product whose lower triangle is lost changes no bound."""
    w = rotations(n=6, seed=0) + 0.05 * _gaussian(6, 6, 0)
    whole = [bound(w).value for bound in BOUNDS]
    product = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: product(a, b).triu())
    assert [bound(w).value for bound in BOUNDS] == whole


@pytest.mark.parametrize("function", [near_orthogonal_bound, spectral_bound, absolute_norm_bound])
def test_bad_weights_are_refused(function):
    for bad in (math.nan, math.inf):
        w = torch.eye(3)
        w[0, 1] = bad
        with pytest.raises(UnsoundError, match="a weight matrix holds NaN or infinity; nothing"):
            function(w)
    with pytest.raises(ValueError, match=r"`weight` must be a matrix, got shape \(2, 3, 3\)"):
        function(torch.zeros(2, 3, 3))


def test_numbers_that_overflow_are_refused():
    huge = torch.full((4, 4), 1e308)
    for bound in BOUNDS:
        with pytest.raises(UnsoundError, match="finite"):
            bound(huge)
    with pytest.raises(UnsoundError, match="overflow"):
        absolute_norm_bound(huge)


def test_power_iteration_gives_an_estimate_that_no_bound_accepts():
    w = haar(30) + 0.01 * torch.randn(30, 30)
    estimate = estimate_spectral_norm(w, steps=10)
    assert isinstance(estimate, Estimate)
    assert "power iteration, 10 steps" in estimate.method
    assert estimate.value < spectral_norm(w)
    with pytest.raises(UnsoundError, match=r"power iteration, 10 steps.*is not a bound"):
        LipschitzBound(value=estimate, norm=2.0, proof="gram-residual")
    with pytest.raises(TypeError):
        float(estimate)


def test_the_exact_check_catches_a_planted_power_iteration():
    w = rotations(n=4, seed=0) + 0.01 * _gaussian(4, 4, 1)
    assert is_norm_bound(w, near_orthogonal_bound(w).value)
    assert is_norm_bound(w, spectral_bound(w).value)
    assert not is_norm_bound(w, estimate_spectral_norm(w, steps=50).value)
    assert not is_norm_bound(w, math.nextafter(spectral_norm(w), 0) * (1 - 1e-14))
