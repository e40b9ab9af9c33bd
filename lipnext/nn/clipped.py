"""Activations with learned limits (Local-Lip, NeurIPS 2021).

Behind a limit a unit is constant, and a bound around an image can leave it out. Limits are parameters of the shape of one
sample and may have any sign: the published code moves negative ones of ReLU-theta back to 0, where the unit is constant, too.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lipnext.core.bound import LipschitzBound
from lipnext.core.local import MonotoneModule
from lipnext.core.propagation import norm_up
from lipnext.core.rounding import RoundingState, add_up


class Clipped(MonotoneModule):
    """What both have in common: comparisons only, 1-Lipschitz, and a value at zero that need not be zero."""

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: sorting and clipping move no two points apart."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """Exact in floating point; the result is at most `||x|| + ||f(0)||` long."""
        norm = add_up(state.norm, norm_up(self.at_zero()))
        return RoundingState(norm=norm, error=state.error, unit=state.unit)

    @abstractmethod
    def at_zero(self) -> Tensor:
        """`f(0)` of one sample, or what of it is not 0."""

    @abstractmethod
    def openness(self, lower: Tensor, upper: Tensor) -> Tensor:
        """How far the boxes `[lower, upper]` reach into where units vary, a scalar: a loss can push it towards 0."""


class ClippedReLU(Clipped):
    """`min(max(x, 0), theta)`, called ReLU-theta.

    Args:
        shape: of one sample.
        start: of all thresholds theta.
    """

    def __init__(self, shape: tuple[int, ...], start: float = 1.0) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full(shape, start))

    def forward(self, x: Tensor) -> Tensor:
        """Clip `(B, *shape)`."""
        return torch.clamp(x, x.new_zeros(()), self.threshold)

    def feeds(self, varying: Tensor) -> Tensor:
        """An input matters where its output can change."""
        return varying

    def at_zero(self) -> Tensor:
        """0, or a threshold below it."""
        return self.threshold.detach().clamp_max(0.0)

    def openness(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Above 0 on average, and a tenth of what is below the threshold, as published for Tiny-ImageNet."""
        return torch.relu(upper).mean() + 0.1 * torch.relu(self.threshold - lower).mean()


class ClippedMaxMin(Clipped):
    """`(min(max(a, b), ceiling), max(min(a, b), floor))` for the two halves `a`, `b` of the channels.

    Args:
        shape: of one sample; the number of channels is even.
        ceiling: start of all upper limits, which have half the shape.
        floor: start of all lower limits.
    """

    def __init__(self, shape: tuple[int, ...], ceiling: float = 1.0, floor: float = -1.0) -> None:
        super().__init__()
        half = (shape[0] // 2, *shape[1:])
        self.ceiling = nn.Parameter(torch.full(half, ceiling))
        self.floor = nn.Parameter(torch.full(half, floor))

    def forward(self, x: Tensor) -> Tensor:
        """Sort and clip `(B, *shape)`; the maxima come first."""
        a, b = x.chunk(2, dim=1)
        upper = torch.minimum(torch.maximum(a, b), self.ceiling)
        return torch.cat([upper, torch.maximum(torch.minimum(a, b), self.floor)], dim=1)

    def feeds(self, varying: Tensor) -> Tensor:
        """Both inputs of a pair matter where one of its outputs can change."""
        upper, lower = varying.chunk(2, dim=1)
        return torch.cat([upper | lower] * 2, dim=1)

    def at_zero(self) -> Tensor:
        """0, or a limit on the other side of it."""
        return torch.cat([self.ceiling.detach().clamp_max(0.0), self.floor.detach().clamp_min(0.0)])

    def openness(self, lower: Tensor, upper: Tensor) -> Tensor:
        """What the smallest maximum lacks to the ceiling, and the largest minimum exceeds the floor by, on average."""
        smallest, largest = torch.maximum(*lower.chunk(2, dim=1)), torch.minimum(*upper.chunk(2, dim=1))
        return torch.relu(self.ceiling - smallest).mean() + torch.relu(largest - self.floor).mean()
