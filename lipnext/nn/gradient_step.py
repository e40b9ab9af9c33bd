"""The residual map `y = x - W^T S relu(W x + b)`: one step down the gradient of a convex potential.

For two inputs, `relu(u) - relu(v) = D (u - v)` with a diagonal `0 <= D <= I`. Their outputs therefore differ by
`(I - V^T D V) (x - x')` with `V = S^(1/2) W`. That matrix is symmetric and its eigenvalues lie in `[1 - ||V||^2, 1]`, so the
map is `max(1, t - 1)`-Lipschitz for any `t >= ||V||^2`, and 1-Lipschitz for `t <= 2`. CPL and SLL differ in how S is formed.
"""

import math
from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.bounds.convolution import absolute_convolution_bound
from lipnext.bounds.spectral import absolute_norm_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import UnsoundError
from lipnext.core.guard import refuse_fast_convolution
from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_affine, after_product, norm_up
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState, add_up, gamma, mul_up, sqrt_up
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense

_MARGIN = 1 - 2.0**-22  # more than rounding to float32 can add, so that t <= 2 survives it
_ROOT = add_up(1.0, gamma(4, UNIT_ROUNDOFF[torch.float64]))  # a root, a product and a norm in float64


class GradientStep(LipschitzModule):
    """`y = x - W^T S relu(W x + b)` with a diagonal `S >= 0`, on `(B, n)` or on `(B, c, H, W)`.

    Args:
        inner: `W x + b`, a dense layer or a convolution of stride 1 that keeps the size of the images; its bias starts
            uniform within one over the root of the number of inputs, as published.
        generator: source of randomness.
    """

    inner: Dense | Convolution
    scale: Tensor | None

    def __init__(self, inner: Dense | Convolution, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.inner = inner
        weight = inner.weight
        reach = 1 / math.sqrt(math.prod(weight.shape[1:]))
        inner.bias = nn.Parameter(reach * (2 * torch.rand(len(weight), generator=generator) - 1))
        self.register_buffer("scale", None)

    @abstractmethod
    def form_scale(self) -> Tensor:
        """Return S from the weights, shape `(m,)`, differentiable: for training."""

    @abstractmethod
    def prove_scale(self) -> Tensor:
        """Return S from the weights, shape `(m,)`, float64, with `||S^(1/2) W||^2 <= 2` proved: for inference."""

    @abstractmethod
    def curvature_bound(self) -> float:
        """Return a proved `t >= ||S^(1/2) W||^2` for the S that is applied."""

    def applied_scale(self) -> Tensor:
        """Return S as it is applied: stored once materialised, formed from the weights before that."""
        return self.form_scale() if self.scale is None else self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Apply the step."""
        hidden = torch.relu(self.inner(x))
        weight = self.inner.weight
        scaled = weight * self.applied_scale().view(-1, *[1] * (weight.dim() - 1))
        if isinstance(self.inner, Convolution):
            return x - functional.conv_transpose2d(hidden, scaled, padding=self.inner.padding)
        return x - hidden @ scaled

    def lipschitz_bound(self) -> LipschitzBound:
        """Return `max(1, t - 1)`."""
        value = max(1.0, add_up(self.curvature_bound(), -1.0))
        return LipschitzBound(value=value, norm=2.0, proof="gradient-step")

    def rounding(self, state: RoundingState) -> RoundingState:
        """The error that is there grows as any difference; that of both products and the subtraction comes on top.

        A relative error of a number in `W x + b` is that of the same number times a root of S, so that both products are
        followed as products with V.

        Raises:
            UnsoundError: where torch may not compute convolutions as sums of products.
        """
        inner, unit = self.inner, state.unit
        if isinstance(inner, Convolution):
            refuse_fast_convolution(inner.weight.device, state.dtype)
        scale, bound = self._checked_scale(), self.lipschitz_bound().value
        weight, bias = inner.weight.detach().double(), _bias(inner).detach().double()
        root = scale.sqrt()
        rows = weight * root.view(-1, *[1] * (weight.dim() - 1))
        copies = math.prod(inner.output_size) if isinstance(inner, Convolution) else 1
        norm, absolute = sqrt_up(self.curvature_bound()), mul_up(_absolute(inner, rows), _ROOT)
        shift = mul_up(norm_up(root * bias, copies=copies), _ROOT)
        origin = mul_up(norm, mul_up(norm_up(torch.relu(root * bias), copies=copies), _ROOT))

        start = RoundingState(norm=add_up(state.norm, state.error), error=0.0, unit=unit)  # as computed
        # Without the root of S the numbers may be larger; they are what must not overflow.
        size = add_up(mul_up(_absolute(inner, weight), start.norm), norm_up(bias, copies=copies))
        RoundingState(norm=size, error=0.0, unit=unit)
        hidden = after_affine(start, math.prod(weight.shape[1:]), norm, absolute, shift)
        lost = mul_up(sqrt_up(scale.max().item()), state.underflow)
        hidden = RoundingState(norm=hidden.norm, error=add_up(hidden.error, lost), unit=unit)
        branch = after_product(hidden, weight[:, 0].numel() + 1, norm, absolute)  # and W S, once
        value = add_up(mul_up(bound, start.norm), origin)
        fresh = add_up(branch.error, mul_up(unit, add_up(value, branch.error)))
        return RoundingState(
            norm=add_up(mul_up(bound, state.norm), origin),
            error=add_up(mul_up(bound, state.error), fresh),
            unit=unit,
        )

    def materialise(self) -> Self:
        """Return a copy that stores S, proved and rounded down to a float32 number."""
        layer = super().materialise()
        layer.inner = layer.inner.materialise()
        if layer.scale is None:
            layer.scale = (self.prove_scale() * _MARGIN).float().to(layer.inner.weight.dtype)
        return layer

    def _checked_scale(self) -> Tensor:
        """S as it is applied, in float64.

        Raises:
            UnsoundError: if it holds a negative number, NaN or infinity.
        """
        scale = self.applied_scale().detach().double()
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise UnsoundError(
                "the scale of a residual layer must be finite and not negative, or it is no step down a convex potential; "
                "train again with a smaller learning rate or reload"
            )
        return scale


def _bias(inner: Dense | Convolution) -> Tensor:
    assert inner.bias is not None
    return inner.bias


def _absolute(inner: Dense | Convolution, weight: Tensor) -> float:
    if isinstance(inner, Convolution):
        return absolute_convolution_bound(weight, inner.input_size, padding=inner.padding)
    return absolute_norm_bound(weight)
