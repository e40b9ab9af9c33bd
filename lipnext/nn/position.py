"""Translations: input centring, the learned positional encoding and the channel bias. Norm 1, one rounding each."""

import math

import torch
from torch import Tensor, nn

from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_addition, norm_up
from lipnext.core.rounding import RoundingState, sqrt_up


class Centre(LipschitzModule):
    """`x - 0.5` for images in [0, 1], shape `(B, C, H, W)`: an isometry, unlike a division by a standard deviation.

    Args:
        shape: `(C, H, W)` of one image.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        """Return `images - 0.5`."""
        return images - 0.5

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: a translation."""
        return LipschitzBound(value=1.0, norm=2.0, proof="translation")

    def rounding(self, state: RoundingState) -> RoundingState:
        """One subtraction of a constant image of norm `0.5 sqrt(C H W)`."""
        return after_addition(state, sqrt_up(0.25 * math.prod(self.shape)))


class PositionalEncoding(LipschitzModule):
    """`X + p` on tokens `(B, H, W, C)`, `p` of shape `(H, W, 1)` as published, or `(H, W, C)`.

    Args:
        height: H.
        width: W.
        channels: C.
        each: learn a number for each channel of a position instead of one for all of them.
    """

    def __init__(self, height: int, width: int, channels: int, *, each: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.zeros(height, width, channels if each else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Add the encoding."""
        return tokens + self.weight

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: a translation."""
        return LipschitzBound(value=1.0, norm=2.0, proof="translation")

    def rounding(self, state: RoundingState) -> RoundingState:
        """One addition; one number for all channels counts in each, so the encoding's norm is `sqrt(C) ||p||` then."""
        return after_addition(state, norm_up(self.weight, copies=self.channels // self.weight.shape[-1]))


class ChannelBias(LipschitzModule):
    """`X + b` with `b` of shape `(C,)` on tokens `(B, H, W, C)`."""

    def __init__(self, channels: int, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Add the bias at every position."""
        return tokens + self.weight

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: a translation."""
        return LipschitzBound(value=1.0, norm=2.0, proof="translation")

    def rounding(self, state: RoundingState) -> RoundingState:
        """One addition; the bias repeats at every position, so its norm is `sqrt(H W) ||b||`."""
        return after_addition(state, norm_up(self.weight, copies=self.positions))
