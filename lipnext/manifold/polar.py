"""Back onto the orthogonal group: the polar factor, by Newton-Schulz in matrix products alone, or by SVD."""

import torch
from torch import Tensor

from lipnext.core.errors import UnsoundError


def residual(matrix: Tensor) -> Tensor:
    """Return `||X^T X - I||_F` for each matrix, shape `(...)`, computed in float64.

    A measurement for logs and tests (not rounded outwards); the proved bound is `spectral.near_orthogonal_bound`.
    """
    x = matrix.double()
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.matrix_norm(x.mT @ x - eye)


def retract(matrix: Tensor, max_steps: int = 30) -> Tensor:
    """Return the polar factor `U V^T` of nearly orthogonal matrices: Newton-Schulz in float64, rounded once.

    The step `X <- X (3 I - X^T X) / 2` sends a singular value `s` to `s (3 - s^2) / 2`, so with `E = I - X^T X`
    the new residual is `3/4 E^2 + 1/4 E^3`: from `||E||_2 <= 1/2` it falls below `2.5e-1, 5.1e-2, 2.0e-3, 2.9e-6,
    6.4e-12, 3.1e-23` in six steps. The iteration ends once `||E||_F` is at most `64 n 2^-53` in float64,
    before the rounding. A singular value above `sqrt(3)` would converge too, to the wrong sign, so large ones
    are refused. (LAPACK's float32 SVD can fail to converge on
    nearly orthogonal matrices, whose singular values all coincide; this does not.)

    Args:
        matrix: shape `(..., n, n)`, float32 or float64, `||X^T X - I||_2 < 1`.
        max_steps: a cap for inputs near the edge of the region of convergence.

    Raises:
        UnsoundError: if a matrix is not finite or too far from orthogonal to have a trustworthy polar factor.
    """
    x = matrix.double()
    n = x.shape[-1]
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    target = 64 * n * 2.0**-53
    for step in range(max_steps):
        gram = x.mT @ x
        error = torch.linalg.matrix_norm(gram - eye)
        if bool((error <= target).all()):
            return x.to(matrix.dtype)
        if step == 0 and not _within_reach(gram, error):
            break
        x = x @ (1.5 * eye - 0.5 * gram)
    worst = residual(matrix).max().item()
    raise UnsoundError(
        f"a matrix cannot be retracted: ||X^T X - I||_F is {worst:.3g}, and Newton-Schulz needs a spectral norm "
        "below 1 there; retract more often or lower the learning rate"
    )


def _within_reach(gram: Tensor, error: Tensor) -> bool:
    """Whether every `X^T X` is finite and below `2 I`: by `||E||_F`, or by Cholesky where that is too large."""
    if bool((error < 1).all()):
        return True
    if not bool(torch.isfinite(error).all()):
        return False
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return not bool(torch.linalg.cholesky_ex(2 * eye - gram).info.any())


def polar_svd(matrix: Tensor) -> Tensor:
    """Return the polar factor `U V^T` from a float64 SVD, in the input dtype; the slow reference for `retract`."""
    u, _, vh = torch.linalg.svd(matrix.double())
    return (u @ vh).to(matrix.dtype)
