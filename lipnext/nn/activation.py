"""Activations that are 1-Lipschitz in the l2 norm."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState


class BetaAbs(LipschitzModule):
    """`|x_i|` on the first `folded` channels, identity on the others (LipNeXt's beta-Abs; beta is `folded / C`).

    With beta = 1/2 it contains MinMax: rotate each pair by 45 degrees, fold one coordinate, rotate back.
    """

    def __init__(self, folded: int) -> None:
        super().__init__()
        self.folded = folded

    def forward(self, tokens: Tensor) -> Tensor:
        """Fold the first channels of `(..., C)`."""
        return torch.cat([tokens[..., : self.folded].abs(), tokens[..., self.folded :]], dim=-1)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: absolute values never move two points apart."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """Exact in floating point; `| |a| - |b| | <= |a - b|` for the error that is already there."""
        return state


class MaxMin(LipschitzModule):
    """Pairs `(a, b)` of the two halves of the channels become `(max(a, b), min(a, b))` (GroupSort of size 2).

    Args:
        dim: of the channels; their number must be even.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Sort each pair."""
        if self.training:
            y: Tensor = _MaxMin.apply(x, self.dim)
            return y
        a, b = x.chunk(2, dim=self.dim)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=self.dim)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: sorting never moves two points apart."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """Exact in floating point; an error that is there is not enlarged, as for any two points."""
        return state


class ReLU(LipschitzModule):
    """`max(x, 0)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Cut off below 0."""
        return torch.relu(x)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """Exact in floating point."""
        return state


class _MaxMin(Function):
    """The same for training: one mask says where gradients go, for which torch's maximum and minimum take a dozen passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        a, b = x.chunk(2, dim=dim)
        ctx.save_for_backward(a >= b)
        ctx.dim = dim
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (first,) = ctx.saved_tensors
        larger, smaller = grad.chunk(2, dim=ctx.dim)
        return torch.cat(
            [torch.where(first, larger, smaller), torch.where(first, smaller, larger)], dim=ctx.dim
        ), None
