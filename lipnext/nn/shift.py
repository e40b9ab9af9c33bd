"""Circular spatial shift: the only circular depthwise convolution that preserves norms on a grid large enough.

On a grid of at least `2k - 1` pixels a side, a circular convolution with one `k x k` kernel per channel is an
isometry if and only if the kernel has a single entry, +1 or -1 (LipNeXt, theorem on spatial mixing). So spatial
mixing needs no weight.
"""

import torch
from torch import Tensor

from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState

# (dimension of (B, H, W, C), pixels) for each of the four groups of channels: down, up, right, left
DIRECTIONS = ((1, 1), (1, -1), (2, 1), (2, -1))


class CircularShift(LipschitzModule):
    """Shift the first `4 * group` channels by one pixel each way (down, up, right, left); the rest stay.

    Args:
        channels: width `C` of the tokens `(B, H, W, C)`.
        group: channels per direction; LipNeXt's fraction alpha is `group / C`.
    """

    def __init__(self, channels: int, group: int) -> None:
        super().__init__()
        if not 0 <= 4 * group <= channels:
            raise ValueError(
                f"`group` must be between 0 and a quarter of the {channels} channels, got {group}."
            )
        self.group = group

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the shifted tokens (out of place; the adjoint is the opposite shift)."""
        k = self.group
        parts = [
            torch.roll(tokens[..., i * k : (i + 1) * k], step, dim)
            for i, (dim, step) in enumerate(DIRECTIONS)
        ]
        return torch.cat([*parts, tokens[..., 4 * k :]], dim=-1)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: a permutation of coordinates."""
        return LipschitzBound(value=1.0, norm=2.0, proof="isometry")

    def rounding(self, state: RoundingState) -> RoundingState:
        """No arithmetic, no error."""
        return state


def shift_(tokens: Tensor, group: int, sign: int = 1) -> None:
    """Shift in place: the same map as `CircularShift` (`sign=1`) or its inverse (`sign=-1`), touching only what moves.

    Args:
        tokens: contiguous `(B, H, W, C)`, overwritten.
        group: channels per direction.
        sign: 1 or -1.
    """
    if group == 0:
        return
    moving = tokens[..., : 4 * group].clone()
    for i, (dim, step) in enumerate(DIRECTIONS):
        lo, hi = i * group, (i + 1) * group
        source, target = moving[..., lo:hi], tokens[..., lo:hi]
        size = tokens.shape[dim]
        if sign * step > 0:
            target.narrow(dim, 1, size - 1).copy_(source.narrow(dim, 0, size - 1))
            target.narrow(dim, 0, 1).copy_(source.narrow(dim, size - 1, 1))
        else:
            target.narrow(dim, 0, size - 1).copy_(source.narrow(dim, 1, size - 1))
            target.narrow(dim, size - 1, 1).copy_(source.narrow(dim, 0, 1))
