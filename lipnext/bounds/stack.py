"""The largest l2 norm in a stack of complex matrices, from above, rounding included.

The matrices are taken as exact, products run in float64, and scalars are rounded upwards, as in `lipnext.bounds.spectral`. A
complex matrix `A + iB` of shape `(m, n)` is kept as the real one `[A; B]` of shape `(2m, n)`.
"""

import math

import torch
from torch import Tensor

from lipnext.bounds.spectral import TINY, mirrored, power_of_two
from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, add_up, gamma, mul_up, sqrt_up, tensor_up

_U = UNIT_ROUNDOFF[torch.float64]

_RESIDUAL_SQUARINGS = 2
_NEAR = 2e-3  # a residual this small costs at most 0.1 % of the norm, less than Gram iteration may


def largest_norm_up(stack: Tensor, squarings: int = 7, floor: float = 0.0) -> float:
    """Bound `max_b ||A_b + i B_b||_2` from above.

    With `G = M^H M`, `||M||^2 = ||G|| <= t + ||G - t I||` for any `t > 0`, which is tight for multiples of isometries, and
    `||G|| <= ||G^(2^k)||_F^(1/2^k)` (Delattre et al. 2023) for all others. The former is taken where it is within 0.1 % of
    the norm; the latter is too large by less than a factor `n^(1/2^(k+2))`.

    Args:
        stack: shape `(b, 2 m, n)`, float64, the real parts above the imaginary ones; fastest for `m >= n`.
        squarings: how many times the Gram matrices are squared.
        floor: matrices of a smaller norm than this need no tight bound, since the caller has met a larger one.

    Returns:
        An upper bound of the largest norm, or of `floor` where no norm exceeds it.

    Raises:
        UnsoundError: if an entry is NaN or infinite, or a norm overflows.
    """
    if not bool(torch.isfinite(stack).all()):
        raise UnsoundError(
            "a transfer matrix holds NaN or infinity; nothing can be proved, rescale or reload"
        )
    peak = _frobenius_up(stack).max().item() if stack.numel() else 0.0
    if peak <= floor:
        return peak
    scale = power_of_two(peak)
    scaled = stack / scale  # exact: a power of two, up to underflow that `TINY` covers
    gram = _gram(scaled)
    rounding = _gram_rounding(scaled.shape[1], mul_up(peak, 1.0 / scale))
    shift, residual = _shifted_norm_up(gram)
    squared = add_up(shift, residual)
    if residual > _NEAR * shift:
        squared = min(squared, _hermitian_norm_up(gram, squarings, (floor / scale) ** 2))
    value = mul_up(sqrt_up(add_up(squared, rounding)), scale)
    if not math.isfinite(value):
        raise UnsoundError("the norm of a transfer matrix overflows; rescale the weights")
    return value


def _shifted_norm_up(gram: Tensor) -> tuple[float, float]:
    """Return `t` and a bound of `||G - t I||`; infinite where `G - t I` cannot be formed without rounding."""
    n = gram.shape[2]
    diagonal = torch.diagonal(gram[:, :n], dim1=1, dim2=2)
    shift = diagonal.mean().item()
    if not bool(((diagonal >= shift / 2) & (diagonal <= shift * 2)).all()):
        return shift, math.inf
    residual = gram.clone()
    # exact: Sterbenz's lemma for entries in [t/2, 2t]
    torch.diagonal(residual[:, :n], dim1=1, dim2=2).sub_(shift)
    return shift, _hermitian_norm_up(residual, _RESIDUAL_SQUARINGS, 0.0)


def _hermitian_norm_up(stack: Tensor, squarings: int, floor: float) -> float:
    """Bound the largest norm of exactly Hermitian matrices by `||M||^2 = ||M^2|| <= ||fl(M^2)|| + rounding`.

    Matrices below the floor keep their Frobenius norm. So do those below `1 / sqrt(n)` of the largest one, which cannot have
    the largest norm. Both only save work: every number that enters the maximum is a bound.
    """
    norms = _frobenius_up(stack)
    peak, n = norms.max().item(), stack.shape[2]
    if squarings == 0 or n == 1 or peak == 0.0:
        return peak
    floor = max(floor, peak / math.sqrt(n))
    leading = norms > floor
    if not bool(leading.any()):
        return peak
    others = norms[~leading].max().item() if not bool(leading.all()) else 0.0
    scale = power_of_two(peak)
    scaled = stack[leading] / scale
    rounding = _gram_rounding(scaled.shape[1], mul_up(peak, 1.0 / scale))
    # The square of a Hermitian matrix is its Gram matrix.
    squared = add_up(_hermitian_norm_up(_gram(scaled), squarings - 1, (floor / scale) ** 2), rounding)
    return max(others, min(peak, mul_up(sqrt_up(squared), scale)))


def _gram(stack: Tensor) -> Tensor:
    """`(A + iB)^H (A + iB) = (A^T A + B^T B) + i (A^T B - B^T A)`, exactly Hermitian as stored.

    The real part is mirrored as in `lipnext.bounds.spectral`: BLAS may sum its two triangles in different orders, and the
    squaring of a matrix that is not quite Hermitian proves nothing. The imaginary part is skew as it stands, because
    floating-point subtraction is: `fl(a - b) = -fl(b - a)`.
    """
    m = stack.shape[1] // 2
    cross = stack[:, :m].mT @ stack[:, m:]
    return torch.cat([mirrored(stack.mT @ stack), cross - cross.mT], dim=1)


def _gram_rounding(rows: int, norm: float) -> float:
    """Bound the l2 norm of the error of `_gram` for `rows = 2 m` and Frobenius norms up to `norm`.

    The real part errs by `gamma_rows (|A|^T |A| + |B|^T |B|)`, the imaginary one by
    `gamma_(rows/2 + 1) (|A|^T |B| + |B|^T |A|)` in every entry. Either matrix has a Frobenius norm of at most `norm^2`, and
    the complex error at most the sum of both.
    """
    return add_up(mul_up(2.0 * gamma(rows + 1, _U), mul_up(norm, norm)), TINY)


def _frobenius_up(stack: Tensor) -> Tensor:
    """`||A_b + i B_b||_F` rounded up, shape `(b,)`.

    The sum of squares, its root and the two operations after it have a relative error below `gamma_(entries + 3)`. A power of
    two shared by the stack keeps the largest square from overflow; what underflows is at most `sqrt(entries 2^-1074)`,
    below 1e-150 in all.
    """
    peak = stack.abs().amax().item()
    if peak == 0.0:
        return stack.new_zeros(len(stack))
    scale = power_of_two(peak)
    norms = torch.linalg.vector_norm((stack / scale).flatten(1), dim=1)
    entries = stack.shape[1] * stack.shape[2]
    scaled = (norms * add_up(1.0, gamma(entries + 3, _U)) + 1e-150) * scale
    return tensor_up(scaled)  # the scale may lead to a subnormal number
