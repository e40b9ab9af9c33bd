"""Upper bounds on the l2 norm of a matrix that are proved, rounding included.

The matrices are taken as exact real numbers (a float32 weight is one). Products run in float64, whose standard model
`fl(sum) = exact (1 + gamma)` holds for any order of summation with `gamma_n = n u / (1 - n u)`, `u = 2^-53`; scalars are
rounded upwards. Power iteration approaches the norm from below and appears here only under the
name `estimate_spectral_norm`, whose result no bound accepts.
"""

import math

import torch
from torch import Tensor

from lipnext.core.bound import Estimate, LipschitzBound
from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, add_up, gamma, mul_up, sqrt_up

_U = UNIT_ROUNDOFF[torch.float64]
TINY = 1e-290  # covers every underflow in a product of matrices scaled to a Frobenius norm near 1


def near_orthogonal_bound(weight: Tensor, squarings: int = 2) -> LipschitzBound:
    """Bound `||W||_2` for a nearly orthogonal matrix through its residual (soundness analysis 5.4).

    `||W||_2^2 = ||W^T W||_2 <= 1 + ||G - I||_2 + gamma_m ||W||_F^2` where `G = fl(W^T W)`. The norm of the residual is
    bounded by its Frobenius norm after `squarings` squarings, `||E||_2 <= ||E^(2^k)||_F^(1/2^k)`, each with
    its rounding term. For a matrix whose residual is not small the general bound is used instead.

    Args:
        weight: shape `(m, n)`, any floating dtype; taken as exact.
        squarings: 0, 1 or 2 are sensible; each costs one product.

    Raises:
        UnsoundError: if the weight holds NaN or infinity.
    """
    w = as_exact(weight)
    gram = mirrored(w.mT @ w)
    diagonal = torch.diagonal(gram)
    if bool((diagonal < 0.5).any()) or bool((diagonal > 2).any()):
        return spectral_bound(weight)
    gram.diagonal().sub_(1.0)  # exact: Sterbenz's lemma for entries in [1/2, 2]
    frobenius = frobenius_up(w)
    rounding = add_up(mul_up(gamma(w.shape[0], _U), mul_up(frobenius, frobenius)), TINY)
    excess = add_up(_symmetric_norm_up(gram, squarings), rounding)
    return LipschitzBound(value=sqrt_up(add_up(1.0, excess)), norm=2.0, proof="gram-residual")


def spectral_bound(weight: Tensor, squarings: int = 7) -> LipschitzBound:
    """Bound `||W||_2` of any dense matrix from above by Gram iteration.

    `||W||_2^2 <= ||(W^T W)^(2^k)||_F^(1/2^k)` for every `k` (Delattre et al. 2023), with a rounding term for
    each product. The excess over the true norm is below `n^(1/2^(k+2))`, about 1.4 % at `k = 7` in the worst case
    (all singular values equal) for `n = 1024`, and far smaller with a spectral gap.

    Args:
        weight: shape `(m, n)`, any floating dtype; taken as exact.
        squarings: how many times the Gram matrix is squared.

    Raises:
        UnsoundError: if the weight holds NaN or infinity.
    """
    w = as_exact(weight)
    scale = power_of_two(frobenius_up(w))
    w = w / scale  # exact: a power of two, up to underflow that `TINY` covers
    gram = mirrored(w.mT @ w)
    frobenius = frobenius_up(w)
    rounding = add_up(mul_up(gamma(w.shape[0], _U), mul_up(frobenius, frobenius)), TINY)
    squared = add_up(_symmetric_norm_up(gram, squarings), rounding)
    return LipschitzBound(value=mul_up(sqrt_up(squared), scale), norm=2.0, proof="gram-iteration")


def absolute_norm_bound(weight: Tensor, steps: int = 4) -> float:
    """Bound `|| |W| ||_2`, the norm of the matrix of absolute values, by Collatz-Wielandt.

    For the non-negative matrix `A = |W|^T |W|` and any positive vector `v`, `||A||_2 <= max_i (A v)_i / v_i`; power
    iteration on `v` therefore gives an upper bound at every step. It measures how rounding errors of `W x` can add up.

    Args:
        weight: shape `(m, n)`, any floating dtype; taken as exact.
        steps: power iterations on `v`.

    Raises:
        UnsoundError: if the weight holds NaN or infinity, or squares of its entries overflow.
    """
    a = as_exact(weight).abs()
    m, n = a.shape
    v = torch.ones(n, dtype=torch.float64, device=a.device)
    for _ in range(steps):
        image = a.mT @ (a @ v)
        peak = image.max()
        if not bool(peak > 0):
            break
        v = (image / peak).clamp_min(1e-6)  # stays positive whatever the zeros of A
    ratio = (a.mT @ (a @ v) / v).max().item()
    if not math.isfinite(ratio):
        raise UnsoundError(
            "the entries of a weight matrix are so large that their squares overflow; rescale it"
        )
    ratio = mul_up(ratio, add_up(1.0, gamma(m + n + 4, _U)))
    return sqrt_up(add_up(ratio, TINY))


def nonnegative_bound(weight: Tensor, steps: int = 4) -> LipschitzBound:
    """Bound `||W||_2` of a matrix without negative entries by Collatz-Wielandt, as `absolute_norm_bound`.

    Args:
        weight: shape `(m, n)`, any floating dtype; taken as exact.
        steps: power iterations on `v`.

    Raises:
        UnsoundError: if an entry is negative, NaN or infinite, or squares of the entries overflow.
    """
    if bool((as_exact(weight) < 0).any()):
        raise UnsoundError(
            "the Collatz-Wielandt bound needs a matrix without negative entries; use spectral_bound for others"
        )
    return LipschitzBound(value=absolute_norm_bound(weight, steps), norm=2.0, proof="collatz-wielandt")


def estimate_spectral_norm(weight: Tensor, steps: int = 50, seed: int = 0) -> Estimate:
    """Estimate `||W||_2` by power iteration: a value from *below*, for comparison and never for a certificate."""
    w = as_exact(weight)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(w.shape[1], generator=generator, dtype=torch.float64).to(w.device)
    for _ in range(steps):
        v = w.mT @ (w @ v)
        v = v / torch.linalg.vector_norm(v).clamp_min(1e-300)
    value = torch.linalg.vector_norm(w @ v).item()
    return Estimate(value=value, method=f"power iteration, {steps} steps")


def as_exact(weight: Tensor) -> Tensor:
    """Upcast to float64, which is exact for every smaller floating dtype, with the smaller side last."""
    if weight.dim() != 2:
        raise ValueError(f"`weight` must be a matrix, got shape {tuple(weight.shape)}.")
    if not bool(torch.isfinite(weight).all()):
        raise UnsoundError(
            "a weight matrix holds NaN or infinity; nothing can be proved about it, train again or reload"
        )
    w = weight.detach().double()
    return w if w.shape[0] >= w.shape[1] else w.mT


def frobenius_up(matrix: Tensor) -> float:
    """`||M||_F` rounded up: the sum of squares and the root have relative error below `gamma_(entries + 3)`.

    The entries are first scaled by a power of two to at most 1, so that squares of tiny ones cannot vanish unnoticed.
    """
    peak = matrix.abs().max().item() if matrix.numel() else 0.0
    if peak == 0.0:
        return 0.0
    scale = power_of_two(peak)
    scaled = matrix / scale
    value = math.sqrt(torch.sum(scaled * scaled).item())
    relative = add_up(mul_up(value, add_up(1.0, gamma(matrix.numel() + 3, _U))), TINY)
    return mul_up(relative, scale)


def _symmetric_norm_up(matrix: Tensor, squarings: int) -> float:
    """`||M||_2` of a symmetric matrix from above: `||M||_2^2 = ||M^2||_2 <= ||fl(M^2)||_2 + gamma_n ||M||_F^2`."""
    frobenius = frobenius_up(matrix)
    if squarings == 0 or frobenius == 0.0:
        return frobenius
    scale = power_of_two(frobenius)
    scaled = matrix / scale
    relative = mul_up(frobenius, 1.0 / scale)
    rounding = add_up(mul_up(gamma(matrix.shape[0], _U), mul_up(relative, relative)), TINY)
    square = mirrored(scaled @ scaled)
    squared = add_up(_symmetric_norm_up(square, squarings - 1), rounding)
    return min(frobenius, mul_up(sqrt_up(squared), scale))


def mirrored(product: Tensor) -> Tensor:
    """Copy the upper triangle of a computed `A^T A` onto the lower one.

    BLAS may sum the two triangles in different orders. Each entry keeps its own error bound, and what is
    squared next is exactly symmetric: without that, `||M||_2^2 = ||M^2||_2` is false (the square of a
    nilpotent `M` is zero).
    """
    upper = product.triu()
    return upper + upper.triu(1).mT


def power_of_two(value: float) -> float:
    """A power of two within a factor 2 of `value`, clamped to where its reciprocal is a normal number too."""
    return 2.0 ** min(max(math.frexp(value)[1], -1000), 1000)
