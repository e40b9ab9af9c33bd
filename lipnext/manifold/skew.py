"""Skew-symmetric matrices: the tangent directions of the orthogonal group in the body frame."""

import torch
from torch import Tensor


def skew(matrix: Tensor) -> Tensor:
    """Return `(matrix - matrix^T) / 2`, the nearest skew-symmetric matrix. Shape `(..., n, n)`."""
    half = matrix / 2
    return half - half.mT


def tangent(point: Tensor, gradient: Tensor) -> Tensor:
    """Return the Riemannian gradient at `point` as a skew matrix, `(X^T G - G^T X) / 2`.

    Args:
        point: orthogonal matrices `X`, shape `(..., n, n)`.
        gradient: Euclidean gradients `G` of the same shape.

    Returns:
        Skew matrices `A` such that `X A` is the steepest ascent direction in the metric `<A, B> = tr(A^T B)`.
    """
    return skew(point.mT @ gradient)


def skew_sign(direction: Tensor, steps: int = 6, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate the orthogonal factor `J` of a skew matrix (its matrix sign); `J` is exactly skew.

    The polar factor of a regular skew matrix is skew with `J^2 = -I`. Each step is an odd polynomial in
    `J`, so skewness is kept by construction (and re-imposed against rounding). The first steps use the quintic
    of Muon (coefficients 3.4445, -4.7750, 2.0315), which lifts small singular values fast but leaves
    them scattered in about [0.68, 1.14]; the last two use the convergent quintic (15, -10, 3)/8. Singular values
    below about `4e-3` of the Frobenius norm are not lifted all the way to 1 (0.94 at `3e-3`, 0.47 at `1e-3`): this
    is *not* the exact polar factor, and nothing that is proved depends on it. A zero matrix gives zero, and the
    scale of `direction` does not matter.

    Args:
        direction: skew matrices, shape `(..., n, n)`.
        steps: polynomial steps, at least 2; three products each.
        dtype: in which the products run, None for the direction's own; bfloat16 costs half a per cent in the singular
            values and is more than twice as fast where it is native.

    Returns:
        Skew matrices of the same shape and dtype with singular values near 1.
    """
    # The largest entry goes first: the squares of float32 gradients below 1e-23 would vanish from the norm.
    tiny = torch.finfo(direction.dtype).tiny
    j = direction / direction.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    j = (j / torch.linalg.matrix_norm(j, keepdim=True).clamp_min(tiny)).to(dtype or direction.dtype)
    for step in range(steps):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < steps - 2 else (1.875, -1.25, 0.375)
        gram = -(j @ j)  # J^T J for a skew J; symmetric
        j = a * j + j @ (b * gram + c * (gram @ gram))
    return skew(j.to(direction.dtype))
