"""Layers that move numbers and compute nothing: isometries, exact in floating point."""

from torch import Tensor
from torch.nn import functional

from lipnext.core.bound import LipschitzBound
from lipnext.core.local import ReshapeModule
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState


class _Isometry(LipschitzModule):
    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: no number is lost, none is changed."""
        return LipschitzBound(value=1.0, norm=2.0, proof="isometry")

    def rounding(self, state: RoundingState) -> RoundingState:
        """No arithmetic, no error."""
        return state


class Flatten(_Isometry, ReshapeModule):
    """`(B, ...)` to `(B, n)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten all but the batch."""
        return x.flatten(1)

    def feeds(self, varying: Tensor) -> Tensor:
        """Every input is an output."""
        return varying


class PadChannels(_Isometry):
    """`(B, c, H, W)` to `(B, channels, H, W)`: what is missing is zero.

    Args:
        channels: at least c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """Append channels of zeros."""
        spare = self.channels - images.shape[1]
        if spare < 0:  # a negative padding would silently cut channels off
            raise ValueError(f"`channels` must be at least {images.shape[1]}, got {self.channels}.")
        return functional.pad(images, (0, 0, 0, 0, 0, spare))


class Unshuffle(_Isometry):
    """Space-to-depth: `(B, c, H, W)` to `(B, c s^2, H / s, W / s)`; channels are ordered (c, row, column in the patch).

    An image whose sides are no multiple of s is padded with zeros on the right and below.

    Args:
        factor: s.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        """Rearrange."""
        s = self.factor
        pad_h, pad_w = -images.shape[2] % s, -images.shape[3] % s
        if pad_h or pad_w:
            images = functional.pad(images, (0, pad_w, 0, pad_h))
        batch, channels, height, width = images.shape
        # pixel_unshuffle, spelled out because that returns an empty batch unchanged
        patches = images.reshape(batch, channels, height // s, s, width // s, s).permute(0, 1, 3, 5, 2, 4)
        return patches.reshape(batch, channels * s * s, height // s, width // s)


class ChannelsFirst(_Isometry):
    """Tokens `(B, H, W, C)` to `(B, C, H, W)`, as convolutions take them."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Rearrange."""
        return tokens.permute(0, 3, 1, 2)
