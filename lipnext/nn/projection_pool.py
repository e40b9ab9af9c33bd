"""Pooling of two channels into one: their maximum, or the signed distance to a cone (Singla & Feizi, NeurIPS 2022)."""

import math

import torch
from torch import Tensor, nn

from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_relative
from lipnext.core.rounding import RoundingState

_RELATIVE = 512  # in units of the unit roundoff, see `rounding`


class PairMax(LipschitzModule):
    """The larger of the two numbers of each pair: `(B, c, H, W)` to `(B, c / 2, H, W)`; pairs are halves of the channels."""

    def forward(self, images: Tensor) -> Tensor:
        """Pool."""
        a, b = images.chunk(2, dim=1)
        return torch.maximum(a, b)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: `|max(a, b) - max(c, d)| <= max(|a - c|, |b - d|)`, and the pairs are disjoint."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """Exact in floating point."""
        return state


class ProjectionPool(LipschitzModule):
    """The signed distance of each pair to a cone: `(B, c, H, W)` to `(B, c / 2, H, W)`; pairs are halves of the channels.

    The cone lies around the positive first axis with half its angle `t / 2`, t in `[0, pi]`; the distance is negative inside.
    With the polar angle f in `[0, 2 pi)` of `(x, y)` it is `-x sin t/2 + y cos t/2` for `f < (pi + t) / 2`, the norm for
    `f < (3 pi - t) / 2`, and `-x sin t/2 - y cos t/2` from there on. The exact map is the one with real functions and pi; the
    assumption on torch's is that of `lipnext.nn.householder`.

    Args:
        channels: c, even.
        generator: source of randomness; the angles, clamped to `[0, pi]`, start uniform there.
    """

    def __init__(self, channels: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.angle = nn.Parameter(math.pi * torch.rand(channels // 2, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        """Pool."""
        t = self.angle.clamp(0.0, math.pi).view(-1, 1, 1)
        x, y = images.chunk(2, dim=1)
        polar = torch.atan2(y, x) % (2 * math.pi)
        sine, cosine = torch.sin(t / 2), torch.cos(t / 2)
        above, below = y * cosine - x * sine, -y * cosine - x * sine
        # dim=0 of a stack: its gradient at zero is zero, unlike that of hypot
        apart = torch.linalg.vector_norm(torch.stack([x, y]), dim=0)
        return torch.where(
            polar < (math.pi + t) / 2, above, torch.where(polar < (3 * math.pi - t) / 2, apart, below)
        )

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: continuous, with a gradient of length 1 in each of the three sectors; the pairs are disjoint."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """An error of at most 512 u times the norm of the pair: far less in a sector, and as for `Householder2` between them.

        Within an angle a of a ray the branches differ by at most `1 - cos a < a` on the rays of the norm, and by `2 sin a` on
        the axis of the cone, where those of both sides meet.
        """
        return after_relative(state, _RELATIVE)
