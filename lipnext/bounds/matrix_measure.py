"""The matrix measure in the l-infinity norm, and what follows from it about `z = relu(A z + v)`, rounding included.

    mu(A) = max_i (a_ii + sum_{j != i} |a_ij|)

With `mu(A) < 1` and `mu_+ = max(mu, 0)` (Jafarpour et al., NeurIPS 2021, theorems 1 and 2; here with the weights of their norm
at 1, since relu commutes with a positive diagonal matrix E, and `E A E^-1` is as good a matrix as A):

    one solution z* for every v, `1 / (1 - mu_+)`-Lipschitz in v
    the averaged iteration `z <- z + alpha (relu(A z + v) - z)` brings z closer to z* by the factor `1 - alpha (1 - mu_+)`
        at every step, for any alpha up to `1 / (1 - min_i min(a_ii, 0))`
    `||z - z*|| <= ||z - relu(A z + v)|| / (1 - mu_+)` for any z, hence `||z*|| <= ||relu(v)|| / (1 - mu_+)`

The step without averaging, `z <- relu(A z + v)`, need not converge at all. Between solutions for v and v', unit by unit,

    (1 - a_ii) |z_i - z'_i| <= sum_{j != i} |a_ij| |z_j - z'_j| + |v_i - v'_i|

for with a slope s in [0, 1] of relu, `(1 - s a_ii) (z_i - z'_i) = s (sum ... )`, and `s / (1 - s a_ii)` grows with s. So where
`|v - v'| <= f eps`, any h with `|z - z'| <= h eps` gives another, `(sum_{j != i} |a_ij| h_j + f_i) / (1 - a_ii)`.

A matrix is stored as `(n, n)`, or as the kernel `(c, c, k, k)`, k odd, of a convolution of stride 1 padded with `k // 2` zeros:
its diagonal are the centre taps, and its rows are parts of the rows of the kernel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, add_up, down, gamma, tensor_up, up

_U = UNIT_ROUNDOFF[torch.float64]
_TINY = 1e-290  # covers every underflow in a sum
TOLERANCE = 2.0**-20
"""What the steps of a network in evaluation leave of the distance to the solution, at most."""
_GRID = 2.0**16

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Averaging:
    """The averaged iteration of one matrix.

    Attributes:
        measure: mu, rounded up, below 1.
        gap: `1 - mu_+`, rounded down.
        step: alpha, a multiple of 2^-16, so that it is the same number in float32 and float64.
        count: steps after which at most `TOLERANCE` is left of the distance to the solution.
        left: bound on what is left, `(1 - alpha gap)^count`.
    """

    measure: float
    gap: float
    step: float
    count: int
    left: float


def diagonal(matrix: Tensor) -> Tensor:
    """Return the diagonal, `(n,)` or `(c,)`, differentiable."""
    if matrix.dim() == 4:
        centre = matrix.shape[-1] // 2
        matrix = matrix[:, :, centre, centre]
    return torch.diagonal(matrix)


def with_diagonal(matrix: Tensor, entries: Tensor) -> Tensor:
    """Return a copy with another diagonal, `(n,)`, differentiable in both."""
    on = torch.zeros_like(matrix, dtype=torch.bool)
    diagonal(on).fill_(True)
    return torch.where(on, entries.view(-1, *[1] * (matrix.dim() - 1)), matrix)


def off_diagonal(matrix: Tensor) -> Tensor:
    """Return a copy with zeros on the diagonal."""
    return with_diagonal(matrix, torch.zeros_like(diagonal(matrix)))


def measure_up(matrix: Tensor) -> float:
    """Return mu(A), rounded up.

    Raises:
        UnsoundError: if A holds NaN or infinity.
    """
    a = matrix.detach().double()
    sums = off_diagonal(a).abs().flatten(1).sum(1)
    rows = diagonal(a) + (sums * add_up(1.0, gamma(a[0].numel() + 4, _U)) + _TINY)
    measure = up(float(rows.max()))  # one rounded addition in each row
    if not bool(torch.isfinite(a).all()) or not math.isfinite(measure):
        raise UnsoundError(
            "the matrix of an implicit layer holds NaN, infinity or numbers that overflow; reload it"
        )
    return measure


def averaging(matrix: Tensor) -> Averaging:
    """Return the averaged iteration of A at the largest step for which it is proved to contract.

    Raises:
        UnsoundError: if mu(A) is not proved to be below 1, or A holds NaN or infinity.
    """
    measure = measure_up(matrix)
    if measure >= 1:
        raise UnsoundError(
            f"the matrix of an implicit layer has the measure {measure:g}, which must be below 1: its equation may have no "
            "solution or several; train with the parametrisation of lipnext.nn.implicit"
        )
    gap = down(1.0 - max(measure, 0.0))
    largest = down(1.0 / up(1.0 - min(float(diagonal(matrix.detach().double()).min()), 0.0)))
    step = math.floor(largest * _GRID) / _GRID
    gain = down(step * gap)
    if not gain > 0:
        raise UnsoundError(
            f"the matrix of an implicit layer needs steps below {1 / _GRID:g} or has a measure too close to 1 ({measure!r}); "
            "train again with a smaller learning rate"
        )
    # The step is at most 1 - 2^-16, and so is the gain.
    count = math.ceil(math.log(TOLERANCE) / math.log1p(-gain))
    # The exponent is off by a few units in its last place, far less than 1e-9.
    left = math.exp(count * math.log1p(-gain)) * (1 + 1e-9)
    return Averaging(measure=measure, gap=gap, step=step, count=count, left=left)


def comparison(product: Product, matrix: Tensor, forcing: Tensor, steps: int) -> Tensor:
    """Return h with `|z - z'| <= h eps` wherever `|v - v'| <= forcing eps`, unit by unit; *not* rounded upwards.

    Differentiable. It starts from the constant `max_i forcing_i / (1 - mu)`; every step takes it closer to the smallest h.

    Args:
        product: `(z, M) -> M z`, for M of the form of A.
        matrix: A, `mu(A) < 1`.
        forcing: `(1, ...)`, not negative, of the shape of z.
        steps: how many.
    """
    gap = (1.0 - diagonal(matrix) - off_diagonal(matrix).abs().flatten(1).sum(1)).min()
    return _refine(product, matrix, forcing, (forcing.max() / gap).expand_as(forcing), steps, 1.0)


def comparison_up(product: Product, matrix: Tensor, forcing: Tensor, steps: int = 50) -> Tensor:
    """Return `comparison`, rounded up, float64.

    Raises:
        UnsoundError: if mu(A) is not proved to be below 1.
    """
    a, forcing = matrix.detach().double(), forcing.double() + _TINY
    start = tensor_up(forcing.max() / averaging(a).gap).expand_as(forcing)
    # A step sums t products of positive numbers and divides: below gamma_(t + 8).
    slack = add_up(1.0, gamma(2 * a[0].numel() + 32, _U))
    return _refine(product, a, forcing, start, steps, slack)


def _refine(product: Product, matrix: Tensor, forcing: Tensor, h: Tensor, steps: int, slack: float) -> Tensor:
    rest, room = off_diagonal(matrix).abs(), 1.0 - per_unit(diagonal(matrix), forcing)
    for _ in range(steps):
        # The smaller of two solutions of (1 - a_ii) h_i >= sum_j |a_ij| h_j + forcing_i is another.
        h = torch.minimum(h, (product(h, rest) + forcing) / room * slack)
    return h


def per_unit(entries: Tensor, like: Tensor) -> Tensor:
    """Return `(n,)` or `(c,)` in the shape of z, `(1, n)` or `(1, c, 1, 1)`."""
    return entries.view(1, -1, *[1] * (like.dim() - 2))
