"""Implicit layers: the solution of `z = relu(A z + v)`, for a matrix A that is well-posed by construction (NEMON).

    A = m I + T - diag(sum_j |T_ij|)        T free, m < 1

has the matrix measure `max_i (m + T_ii - |T_ii|) <= m` in the l-infinity norm, and every matrix of measure up to m is of this
form (Jafarpour et al., NeurIPS 2021): hence one solution, which the averaged iteration finds at a proved rate
(`lipnext.bounds.matrix_measure`). The paper's weights E of the norm, `E^-1 T E` instead of T, are left out: for relu, `E z`
solves the equation of `E A E^-1` and `E v`, and the layers before and behind are free to scale.

A convolution is the same matrix with shared rows: the sum runs over *all* taps of a row, `c k k` of them. The published
convolutional variant takes `c` times the largest tap instead, which is below that sum and lets the measure exceed 1 from the
start; there is no guarantee of a solution then.
"""

import math
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lipnext.bounds.matrix_measure import Averaging, averaging, diagonal, measure_up, with_diagonal
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import ConfigError, UnsoundError
from lipnext.core.implicit import ImplicitModule
from lipnext.core.rounding import RoundingState, down

TRAINING_TOLERANCE = 1e-3
"""Distance to the solution, as a share of the largest unit, at which training stops iterating, forth and back."""

CHECK_EVERY = 4
"""Steps from one look at the distance to the next: a look costs half a step of a small layer."""


class ImplicitLayer(ImplicitModule):
    """`v -> z` with `z = relu(A z + v)`.

    `weight` is T until the layer is materialised, and from then on A itself: what is certified is the stored matrix. In
    evaluation the number of steps follows from A alone; in training the iteration stops where the proved distance to the
    solution is small. The gradient is that of the solution (implicit differentiation), by the same iteration with `A^T`.

    Args:
        start: first value of T.
        measure: m, below 1.

    Raises:
        ConfigError: if m is not below 1.
    """

    def __init__(self, start: Tensor, measure: float) -> None:
        super().__init__()
        if not measure < 1:
            raise ConfigError(
                f"model.measure: must be below 1, or the equation may have no solution, got {measure:g}"
            )
        self.measure, self.formed = measure, False
        self.weight = nn.Parameter(start)

    def matrix(self) -> Tensor:
        """Return A, formed in the dtype of T, autocast or not, differentiable."""
        if self.formed:
            return self.weight
        sums = self.weight.abs().flatten(1).sum(1)
        return with_diagonal(self.weight, self.measure + diagonal(self.weight) - sums)

    def forward(self, v: Tensor) -> Tensor:
        """Solve for all samples at once; v and z have one shape."""
        with torch.autocast(v.device.type, enabled=False):
            v, a = v.to(self.weight.dtype), self.matrix()
            iteration = averaging(a)
            tolerance = TRAINING_TOLERANCE if self.training else 0.0
            return cast(Tensor, _Solve.apply(v, a, self, iteration, tolerance))

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove `1 / (1 - mu)` from v to z, in the l-infinity norm; every number of steps has that bound."""
        gap = down(1.0 - max(measure_up(self.matrix()), 0.0))
        if not gap > 0:
            raise UnsoundError(
                "an implicit layer has a measure of 1 or more; nothing can be proved about its solution"
            )
        return LipschitzBound(
            value=math.nextafter(1.0 / gap, math.inf), norm=math.inf, proof="matrix-measure"
        )

    def rounding(self, state: RoundingState) -> RoundingState:
        """Refuse: errors are followed in the l-infinity norm here, by another certificate.

        Raises:
            UnsoundError: always.
        """
        raise UnsoundError(
            "an implicit layer has no rounding bound in l2; certify with lipnext.certificates.implicit.ImplicitCertifier"
        )

    def materialise(self) -> Self:
        """Return a copy that stores A."""
        layer = super().materialise()
        layer.weight, layer.formed = nn.Parameter(self.matrix().detach().clone()), True
        return layer


class ImplicitDense(ImplicitLayer):
    """On features `(B, n)`; `weight (n, n)`.

    Args:
        width: n.
        measure: m.
        generator: source of randomness; T starts as a linear layer of torch does, uniform within `1 / sqrt(n)`.
    """

    def __init__(self, width: int, *, measure: float = 0.0, generator: torch.Generator | None = None) -> None:
        super().__init__(_uniform(generator, width, width), measure)

    def product(self, z: Tensor, matrix: Tensor) -> Tensor:
        """Return `M z` for rows z."""
        return functional.linear(z, matrix)

    def adjoint(self, p: Tensor, matrix: Tensor) -> Tensor:
        """Return `M^T p` for rows p."""
        return p @ matrix


class ImplicitConvolution(ImplicitLayer):
    """On images `(B, c, H, W)`, zero-padded; `weight (c, c, k, k)`.

    Args:
        channels: c.
        kernel: k, odd.
        measure: m.
        generator: source of randomness; T starts as a convolution of torch does, uniform within `1 / sqrt(c k^2)`.

    Raises:
        ConfigError: if k is even.
    """

    def __init__(
        self, channels: int, kernel: int, *, measure: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        if kernel % 2 == 0:
            raise ConfigError(f"model.kernel: must be odd, so that a kernel has a centre, got {kernel}")
        super().__init__(_uniform(generator, channels, channels, kernel, kernel), measure)

    def product(self, z: Tensor, matrix: Tensor) -> Tensor:
        """Convolve."""
        return functional.conv2d(z, matrix, padding=matrix.shape[-1] // 2)

    def adjoint(self, p: Tensor, matrix: Tensor) -> Tensor:
        """Convolve back."""
        return functional.conv_transpose2d(p, matrix, padding=matrix.shape[-1] // 2)


class _Solve(torch.autograd.Function):
    """The averaged iteration, and the gradient of what it converges to."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, matrix: Tensor, layer: ImplicitLayer, iteration: Averaging, tolerance: float
    ) -> Tensor:
        z = iterate(lambda z: layer.product(z, matrix).add_(v).relu_(), v, iteration, tolerance)
        ctx.save_for_backward(z, v, matrix)
        ctx.layer, ctx.iteration, ctx.tolerance = layer, iteration, tolerance
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """With D the slopes of relu: `p = D (A^T p + g)` is the gradient for `A z + v`."""
        z, v, matrix = ctx.saved_tensors
        layer = ctx.layer
        with torch.enable_grad():
            a, shift = matrix.detach().requires_grad_(), v.detach().requires_grad_()
            before = layer.product(z, a) + shift
        slopes = (before.detach() > 0).to(z.dtype)
        p = iterate(
            lambda p: layer.adjoint(p, matrix).add_(gradient).mul_(slopes),
            gradient,
            ctx.iteration,
            ctx.tolerance,
        )
        for_a, for_v = torch.autograd.grad(before, (a, shift), p)
        return for_v, for_a, None, None, None


def iterate(map_: Callable[[Tensor], Tensor], like: Tensor, iteration: Averaging, tolerance: float) -> Tensor:
    """Return `z <- z + alpha (map(z) - z)` after `iteration.count` steps from 0.

    Args:
        map_: of which a fixed point is sought; returns a tensor of its own.
        like: of the shape of z.
        iteration: alpha, and the number of steps.
        tolerance: stops where `||map(z) - z||` is at most this share of the largest number in z times the gap, which bounds
            the distance to the solution; 0 takes all steps.
    """
    z = torch.zeros_like(like)
    for k in range(iteration.count):
        change = map_(z).sub_(z)
        z.add_(change, alpha=iteration.step)
        if tolerance and k % CHECK_EVERY == 0:
            largest = float(torch.linalg.vector_norm(change, math.inf))
            if largest <= tolerance * iteration.gap * float(torch.linalg.vector_norm(z, math.inf)):
                break
    return z


def _uniform(generator: torch.Generator | None, *shape: int) -> Tensor:
    limit = 1 / math.sqrt(math.prod(shape[1:]))
    return (2 * torch.rand(*shape, generator=generator) - 1) * limit
