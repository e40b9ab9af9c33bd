"""What several test files share: exact rational checks, dense Jacobians, the smallest of all bodies."""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState

Call = Callable[..., tuple[int, str, str]]
"""The fixture `call`: words of the command line to exit code, standard output and standard error."""


def fractions(matrix: Tensor) -> list[list[Fraction]]:
    """Return the entries of a floating matrix as exact rationals."""
    return [[Fraction(v) for v in row] for row in matrix.detach().double().tolist()]


def is_norm_bound(weight: Tensor, value: float) -> bool:
    """Decide exactly, in rationals, whether `||W||_2 <= value`: `value^2 I - W^T W` is semidefinite.

    Symmetric elimination: a semidefinite matrix has no negative pivot, and a zero pivot has a zero row.
    """
    w = fractions(weight)
    n = len(w[0])
    a = [[-sum((row[i] * row[j] for row in w), Fraction(0)) for j in range(n)] for i in range(n)]
    for i in range(n):
        a[i][i] += Fraction(value) ** 2
    for k in range(n):
        pivot = a[k][k]
        if pivot < 0 or (pivot == 0 and any(a[k][j] for j in range(k + 1, n))):
            return False
        if pivot == 0:
            continue
        for i in range(k + 1, n):
            factor = a[i][k] / pivot
            for j in range(k + 1, n):
                a[i][j] -= factor * a[k][j]
    return True


def spectral_norm(matrix: Tensor) -> float:
    """Return `||M||_2` from a float64 SVD: exact to about `1e-15 n` relative, in either direction."""
    return torch.linalg.matrix_norm(matrix.detach().double(), 2).item()


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the dense Jacobian of a batch of one, shape `(outputs, inputs)`."""
    j = torch.autograd.functional.jacobian(lambda v: function(v), x)
    return j.reshape(-1, x.numel())


def rotations(*batch: int, n: int, seed: int, det: int | None = None) -> Tensor:
    """Return orthogonal matrices by QR, float64, independent of `lipnext.manifold.haar`."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64)).Q
    if det is not None:
        q[..., 0] = q[..., 0] * (torch.linalg.det(q).sign() * det).unsqueeze(-1)
    return q


def skew_with_angles(angles: Tensor, seed: int) -> Tensor:
    """Return a skew matrix with the eigenvalues `+-i angles`, in a random orthonormal basis."""
    n = 2 * len(angles)
    blocks = torch.zeros(n, n, dtype=torch.float64)
    for k, angle in enumerate(angles.tolist()):
        blocks[2 * k, 2 * k + 1], blocks[2 * k + 1, 2 * k] = angle, -angle
    q = rotations(n=n, seed=seed)
    a = q @ blocks @ q.mT
    return (a - a.mT) / 2


class Flatten(LipschitzModule):
    """Images `(B, c, H, W)` to features `(B, c H W)`: the identity as a body."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def lipschitz_bound(self) -> LipschitzBound:
        return LipschitzBound(value=1.0, norm=2.0, proof="isometry")

    def rounding(self, state: RoundingState) -> RoundingState:
        return state
