import math

import pytest
import torch
from helpers import rotations, spectral_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.bounds import stack as module
from lipnext.bounds.stack import largest_norm_up
from lipnext.core.errors import UnsoundError

# LAPACK's largest singular value may itself be off by a few n u, in either direction.
SVD_ERROR = 1e-13


def _complex_gaussian(b: int, m: int, n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.complex(torch.randn(b, m, n, generator=g), torch.randn(b, m, n, generator=g))


def _stacked(matrices: Tensor) -> Tensor:
    return torch.cat([matrices.real, matrices.imag], dim=1)


def _truth(matrices: Tensor) -> float:
    return torch.linalg.matrix_norm(matrices, 2).max().item()


def _unitary(b: int, n: int, seed: int) -> Tensor:
    return torch.linalg.qr(_complex_gaussian(b, n, n, seed)).Q


@given(
    b=st.integers(1, 6),
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    seed=st.integers(0, 2**20),
    exponent=st.integers(-140, 140),
    spread=st.sampled_from([0, 3, 40]),
    squarings=st.integers(0, 8),
)
@settings(max_examples=150, deadline=None)
def test_never_below_the_svd(b, m, n, seed, exponent, spread, squarings):
    """Also where the matrices of a stack differ by factors of up to `10^(5 spread)`."""
    scales = 10.0 ** (exponent - spread * torch.arange(b, dtype=torch.float64))
    matrices = _complex_gaussian(b, m, n, seed) * scales[:, None, None]
    truth = _truth(matrices)
    bound = largest_norm_up(_stacked(matrices), squarings)
    assert bound >= truth * (1 - SVD_ERROR)
    # the documented excess; 1e-12 for the rounding terms of `squarings + 1` products
    assert bound <= truth * (n ** (0.5 ** (squarings + 2)) + 1e-12)


@given(b=st.integers(1, 4), n=st.integers(1, 12), seed=st.integers(0, 2**20), noise=st.floats(0, 0.02))
@settings(max_examples=60, deadline=None)
def test_multiples_of_isometries_are_bounded_through_their_residual(b, n, seed, noise):
    matrices = 3.7 * (_unitary(b, n, seed) + noise * _complex_gaussian(b, n, n, seed) / n)
    truth, bound = _truth(matrices), largest_norm_up(_stacked(matrices))
    assert truth * (1 - SVD_ERROR) <= bound
    # ||E||_F <= sqrt(n) ||E||_2, halved by each of two squarings: n^(1/8) of a residual near 2 noise
    assert bound <= truth * (1 + 8 * noise * n) + 1e-12


def test_unitary_matrices_are_exact_to_rounding():
    n = 64
    bound = largest_norm_up(_stacked(_unitary(3, n, 0)))
    # rounding of the Gram product: 2 gamma_(2 n + 1) n, halved by the root
    assert 1 - SVD_ERROR <= bound <= 1 + 2.5 * n * n * 2.0**-53
    # Gram iteration alone would exceed by n^(1/2^9)
    assert n ** (1 / 2**9) - 1 > 8e-3


def test_real_matrices_agree_with_their_svd():
    w = rotations(n=7, seed=0) @ torch.diag(torch.arange(1.0, 8.0)) @ rotations(n=7, seed=1)
    stack = torch.cat([w, torch.zeros_like(w)])[None]
    assert largest_norm_up(stack, squarings=10) == pytest.approx(spectral_norm(w), rel=1e-12)


def test_the_floor_only_loosens_what_lies_below_it():
    small, large = _complex_gaussian(3, 5, 5, 0), 2 * _complex_gaussian(3, 5, 5, 1)
    least, most = sorted([_truth(small), _truth(large)])
    assert largest_norm_up(_stacked(small), floor=most) >= least * (1 - SVD_ERROR)
    assert largest_norm_up(_stacked(small), floor=most) <= most * (1 + 1e-12)
    assert largest_norm_up(_stacked(large), floor=least) == largest_norm_up(_stacked(large))
    assert largest_norm_up(_stacked(small), floor=1e300) < math.inf


def test_pruned_matrices_stay_in_the_maximum():
    """Two matrices of equal norm: the first has rank one, the second full rank and a larger Frobenius norm."""
    n = 16
    one = torch.zeros(n, n)
    one[0, 0] = 1.0
    full = torch.diag(torch.linspace(0.1, 0.9, n))
    stack = torch.stack([one, full])
    assert 1 <= largest_norm_up(torch.cat([stack, torch.zeros_like(stack)], dim=1), squarings=9) <= 1 + 1e-9


def test_the_gram_matrix_is_hermitian_and_exact_to_rounding():
    matrices = _complex_gaussian(2, 8, 5, 0)
    gram = module._gram(_stacked(matrices))
    real, imaginary = gram[:, :5], gram[:, 5:]
    assert torch.equal(real, real.mT)
    assert torch.equal(imaginary, -imaginary.mT)
    truth = matrices.mH @ matrices
    error = torch.linalg.matrix_norm(torch.complex(real, imaginary) - truth, 2).max().item()
    assert error <= 1e-14 * _truth(matrices) ** 2


@pytest.mark.parametrize("part", [0, 1])
def test_a_gram_matrix_that_is_not_hermitian_would_be_caught(monkeypatch, part):
    """Planted bug: half of the real or of the imaginary part is lost; the comparison with the SVD notices."""
    exact = module._gram

    def lossy(stack):
        n = stack.shape[2]
        gram = exact(stack).clone()
        block = gram[:, part * n : (part + 1) * n]
        block.copy_(block.triu())
        return gram

    matrices = _complex_gaussian(4, 6, 6, 3)
    assert largest_norm_up(_stacked(matrices)) >= _truth(matrices)
    monkeypatch.setattr(module, "_gram", lossy)
    assert largest_norm_up(_stacked(matrices)) < _truth(matrices)


def test_zero_and_tiny_stacks():
    assert largest_norm_up(torch.zeros(2, 4, 3)) == 0.0
    assert largest_norm_up(torch.full((1, 2, 1), 5e-324)) >= 5e-324


def test_nan_infinity_and_overflow_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(UnsoundError, match="holds NaN or infinity"):
            largest_norm_up(torch.full((1, 2, 1), bad))
    with pytest.raises(UnsoundError, match="overflows"):
        largest_norm_up(torch.full((1, 8, 4), 1e308))
