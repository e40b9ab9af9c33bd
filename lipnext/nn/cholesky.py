"""Layers whose matrix is orthogonalised by a Cholesky factor in every step of the training (LiResNet's CHORD).

`W = L^-1 X` with `L L^T = X X^T + e I` has the singular values `s / sqrt(s^2 + e)` of X's `s`: below 1, in exact arithmetic.
That is why training takes the constant 1. What is certified is the matrix that is stored and applied, by a bound of its own.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lipnext.bounds.factor import factor_bound
from lipnext.bounds.spectral import absolute_norm_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_affine, after_product, norm_up
from lipnext.core.rounding import RoundingState
from lipnext.nn.activation import MaxMin
from lipnext.nn.dense import check_flat
from lipnext.nn.reshape import Unshuffle

RIDGE = 1e-3
"""e as a share of the mean of the diagonal of X X^T."""


def orthogonalise(x: Tensor) -> Tensor:
    """Return `L^-1 X`, `L L^T = X X^T + e I`, for matrices `(..., n, m)` with n <= m; differentiable, e taken as a constant.

    It runs in the dtype of `x`, autocast or not. A matrix without a Cholesky factor gives NaN.
    """
    with torch.autocast(x.device.type, enabled=False):
        w: Tensor = _Orthogonalise.apply(x)
    return w


class _Orthogonalise(Function):
    """The derivative through `W = L^-1 X` and the Cholesky factor, with W and L alone kept (Murray 2016, for the latter)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gram = x @ x.mT
        diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
        diagonal.add_(RIDGE * diagonal.mean(-1, keepdim=True))
        factor, failed = torch.linalg.cholesky_ex(gram)  # without a check: it would wait for the GPU
        factor = torch.where((failed == 0)[..., None, None], factor, torch.nan)
        w = torch.linalg.solve_triangular(factor, x, upper=False)
        ctx.save_for_backward(w, factor)
        return w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        w, factor = ctx.saved_tensors
        direct = torch.linalg.solve_triangular(factor.mT, grad, upper=True)
        # through L: its gradient is -tril(direct W^T), and that of the Gram matrix S, with P = tril(L^T gradient), is
        # L^-T (P + P^T - diag P) L^-1 / 2; it counts twice because S = X X^T
        lower = (factor.mT @ (-(direct @ w.mT)).tril()).tril()
        symmetric = lower + lower.tril(-1).mT
        return direct + torch.linalg.solve_triangular(factor.mT, symmetric, upper=True) @ w


class _Orthogonalised(LipschitzModule):
    """What the layers share: `parameter` X is orthogonalised in every step, a materialised copy stores `weight` W."""

    parameter: nn.Parameter | None
    weight: nn.Parameter | None

    def matrix(self) -> Tensor:
        """The matrix that is applied."""
        if self.weight is not None:
            return self.weight
        assert self.parameter is not None
        return orthogonalise(self.parameter)

    def materialise(self) -> Self:
        """Return a copy that stores the matrix, formed in the dtype of the weights."""
        with torch.no_grad():
            weight = nn.Parameter(self.matrix().detach().clone(memory_format=torch.contiguous_format))
        layer = super().materialise()
        layer.weight, layer.parameter = weight, None
        return layer


class OrthogonalDense(_Orthogonalised):
    """`x -> W x + b`, features `(B, n)` to `(B, m)`, `W = orthogonalise(X)`.

    Args:
        features_in: n.
        features_out: m, at most n.
        generator: source of randomness; the entries of X start with variance 1 / n.
    """

    def __init__(
        self, features_in: int, features_out: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        start = torch.randn(features_out, features_in, generator=generator) / features_in**0.5
        self.parameter, self.weight = nn.Parameter(start), None
        self.bias = nn.Parameter(torch.zeros(features_out))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        check_flat(x)
        return functional.linear(x, self.matrix(), self.bias)

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove the norm of the matrix that is applied."""
        return factor_bound(self.matrix())

    def rounding(self, state: RoundingState) -> RoundingState:
        """A product with n terms in each sum, and the bias."""
        return _after_dense(state, self.matrix(), self.bias)


class OrthogonalPatches(_Orthogonalised):
    """A convolution whose stride is its kernel, `(B, c, H, W)` to `(B, c, H / s, W / s)`: one `c x c s^2` matrix a patch.

    An image whose sides are no multiple of s is padded with zeros on the right and below.

    Args:
        channels: c.
        patch: s.
        generator: source of randomness; the entries of X start with variance 1 / (c s^2).
    """

    def __init__(self, channels: int, patch: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        fan_in = channels * patch**2
        self.unshuffle = Unshuffle(patch)
        self.parameter = nn.Parameter(torch.randn(channels, fan_in, generator=generator) / fan_in**0.5)
        self.weight = None

    def forward(self, images: Tensor) -> Tensor:
        """Apply the layer."""
        patches = self.unshuffle(images).movedim(1, -1)
        return functional.linear(patches, self.matrix()).movedim(-1, 1)

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove the norm of the matrix that is applied; the patches are disjoint."""
        return factor_bound(self.matrix())

    def rounding(self, state: RoundingState) -> RoundingState:
        """A product with `c s^2` terms in each sum."""
        w = self.matrix()
        return after_product(state, w.shape[1], factor_bound(w).value, absolute_norm_bound(w))


class OrthogonalTrunk(_Orthogonalised):
    """A chain of L square layers `x -> MaxMin(W_l x + b_l)` on features `(B, n)`, all orthogonalised in one batched call.

    `W_l = orthogonalise(I + L^-1/2 gamma_l theta_l)` with one number `gamma_l` for each row. Parameters: `theta (L, n, n)`,
    `gamma (L, n, 1)`, `bias (L, n)`; a materialised trunk stores `weight (L, n, n)` in place of the first two.

    Args:
        features: n, even.
        depth: L.
        generator: source of randomness; the entries of theta start with variance 1 / n^2.
    """

    def __init__(self, features: int, depth: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.features, self.depth = features, depth
        start = torch.randn(depth, features, features, generator=generator) / features
        self.theta: nn.Parameter | None = nn.Parameter(start)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.ones(depth, features, 1))
        self.bias = nn.Parameter(torch.zeros(depth, features))
        self.activation = MaxMin(dim=-1)
        self.weight = None

    def matrix(self) -> Tensor:
        """The matrices that are applied, `(L, n, n)`."""
        if self.weight is not None:
            return self.weight
        assert self.theta is not None
        assert self.gamma is not None
        identity = torch.eye(self.features, dtype=self.theta.dtype, device=self.theta.device)
        return orthogonalise(identity + self.depth**-0.5 * self.gamma * self.theta)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        check_flat(x)
        for weight, bias in zip(self.matrix(), self.bias, strict=True):
            x = self.activation(functional.linear(x, weight, bias))
        return x

    def lipschitz_bound(self) -> LipschitzBound:
        """The product of the proved norms of the matrices; sorting adds nothing."""
        return LipschitzBound.compose(*(factor_bound(weight) for weight in self.matrix()))

    def rounding(self, state: RoundingState) -> RoundingState:
        """Layer by layer: a product with n terms in each sum, and the bias. Sorting is exact."""
        for weight, bias in zip(self.matrix(), self.bias, strict=True):
            state = _after_dense(state, weight, bias)
        return state

    def materialise(self) -> Self:
        """Return a copy that stores the matrices."""
        trunk = super().materialise()
        trunk.theta, trunk.gamma = None, None
        return trunk


def _after_dense(state: RoundingState, weight: Tensor, bias: Tensor) -> RoundingState:
    bound, absolute = factor_bound(weight).value, absolute_norm_bound(weight)
    return after_affine(state, weight.shape[1], bound, absolute, norm_up(bias))
