"""Householder activations of order 1 and 2 (Singla, Singla & Feizi, ICLR 2022): learned folds of pairs of channels.

Both cut the plane of a pair `(x, y)` into sectors and apply an isometry in each; on the rays between the sectors the two
isometries agree. The exact map is the one with real sines, cosines, arcus tangens and pi at the stored angles. The assumption
is that torch's functions are right to within 4 units in the last place; the rounding terms leave room beyond that.
"""

import math

import torch
from torch import Tensor, nn

from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_relative
from lipnext.core.rounding import RoundingState

_TURN = 2 * math.pi
_FIRST, _SECOND = 64, 512  # in units of the unit roundoff, see `rounding`


class Householder(LipschitzModule):
    """Order 1: pairs `(x, y)` of the two halves of the channels of `(B, c, H, W)` are reflected to one side of a line.

    With `n = (sin t/2, -cos t/2)`, points with `n . (x, y) > 0` are reflected at the line through 0 of angle t / 2, the others
    stay. Every angle is allowed; `t = pi / 2`, the start, sorts the pair, smaller number first.

    Args:
        channels: c, even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    def forward(self, images: Tensor) -> Tensor:
        """Fold each pair."""
        t = self.angle.view(-1, 1, 1)
        x, y = images.chunk(2, dim=1)
        folded = x * torch.sin(t / 2) - y * torch.cos(t / 2) > 0
        a, b = _reflected(x, y, t)
        return torch.cat([torch.where(folded, a, x), torch.where(folded, b, y)], dim=1)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: a continuous map that is an isometry on either side of a line."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """An error of at most 64 u times the norm of the pair.

        A computed reflection is off by at most 22 u: two terms each with an error of 8 u in the sine or cosine and three
        roundings, in two coordinates. Next to the line the wrong side may be taken, if the computed distance, off by 16 u, has
        the wrong sign: the reflection moves a point by twice its distance, 32 u.
        """
        return after_relative(state, _FIRST)


class Householder2(LipschitzModule):
    """Order 2: four sectors for each pair of the two halves of the channels, with angles `t0, t1, t2` clamped to `[0, 2 pi]`.

    In polar angles counted from `t0 / 2` the sectors end at `t1 / 2`, `(t1 + t2) / 2`, `pi + t2 / 2` and `2 pi`; they are left
    as they are, reflected at the line of angle `(t0 + t1) / 2`, turned by `-t2`, and reflected at the line of angle `t0 / 2`.

    Args:
        channels: c, even.
        generator: source of randomness; the angles start uniform in `[0, pi]`.
    """

    def __init__(self, channels: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.angles = nn.Parameter(math.pi * torch.rand(3, channels // 2, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        """Fold each pair."""
        t0, t1, t2 = self.angles.clamp(0.0, _TURN).view(3, -1, 1, 1)
        x, y = images.chunk(2, dim=1)
        polar = (torch.atan2(y, x) - t0 / 2) % _TURN
        early, late = _reflected(x, y, t0 + t1), _reflected(x, y, t0)
        turned = x * torch.cos(t2) + y * torch.sin(t2), y * torch.cos(t2) - x * torch.sin(t2)
        first, second, third = polar < t1 / 2, polar < (t1 + t2) / 2, polar < math.pi + t2 / 2
        parts = [
            torch.where(first, same, torch.where(second, a, torch.where(third, b, c)))
            for same, a, b, c in zip((x, y), early, turned, late, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: a continuous map that is an isometry in every sector."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """An error of at most 512 u times the norm of the pair.

        An angle of an isometry is off by 13 u, which with 22 u as for order 1 makes 41 u. The polar angle and the end of a
        sector are off by at most 100 u together: within that distance of a ray the wrong sector may be taken, whose isometry
        differs by at most twice the angle to the ray, 200 u.
        """
        return after_relative(state, _SECOND)


def _reflected(x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Reflect at the line through 0 of angle t / 2."""
    return x * torch.cos(t) + y * torch.sin(t), x * torch.sin(t) - y * torch.cos(t)
