"""Reshapes and pooling: space-to-depth with zero-padded channels, L2 pooling over all positions, sums of windows."""

import torch
from torch import Tensor
from torch.nn import functional

from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import ConfigError
from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_pooling, after_product
from lipnext.core.rounding import RoundingState


def patch_grid(input_shape: tuple[int, int, int], patch: int, width: int) -> tuple[int, int]:
    """Return how many patches of `patch x patch` pixels cover an image `(c, H, W)`, down and across.

    Raises:
        ConfigError: if `width` channels cannot hold the pixels of a patch.
    """
    channels, height, breadth = input_shape
    if width < channels * patch**2:
        raise ConfigError(
            f"model.width: {width} channels cannot hold patches of {channels} x {patch} x {patch} = "
            f"{channels * patch**2} pixels; take a width of at least that or a smaller model.patch"
        )
    return -(-height // patch), -(-breadth // patch)


class SpaceToDepth(LipschitzModule):
    """Images `(B, c, H, W)` to tokens `(B, H/s, W/s, width)`: patches become channels, missing channels are zero.

    Both steps are isometries, so the stem needs no weight: the first block's rotation mixes. An image whose sides are no
    multiple of the patch is padded with zeros on the right and below, another isometry.
    """

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        """Rearrange; channels are ordered (c, row in patch, column in patch)."""
        s = self.patch
        pad_h, pad_w = -images.shape[2] % s, -images.shape[3] % s
        if pad_h or pad_w:
            images = functional.pad(images, (0, pad_w, 0, pad_h))
        batch, channels, height, width = images.shape
        # pixel_unshuffle, spelled out because that returns an empty batch unchanged
        patches = images.reshape(batch, channels, height // s, s, width // s, s).permute(0, 2, 4, 1, 3, 5)
        tokens = patches.reshape(batch, height // s, width // s, channels * s * s)
        spare = self.width - tokens.shape[-1]
        if spare < 0:  # a negative padding would silently cut channels off
            raise ValueError(
                f"`width` must be at least {tokens.shape[-1]} to hold the patches, got {self.width}."
            )
        return functional.pad(tokens, (0, spare))

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: a permutation of coordinates and padding with zeros."""
        return LipschitzBound(value=1.0, norm=2.0, proof="isometry")

    def rounding(self, state: RoundingState) -> RoundingState:
        """No arithmetic, no error."""
        return state


class L2Pool(LipschitzModule):
    """`y_c = sqrt(sum_hw x_hwc^2)` over all positions: tokens `(B, H, W, C)` to features `(B, C)`.

    1-Lipschitz: each channel's norm is, and the channels are disjoint. The subgradient at zero is zero. In half precision
    the sum runs in float32.
    """

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool; the result is at least float32."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return torch.linalg.vector_norm(tokens, dim=(1, 2), dtype=dtype)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """A sum of `H W` squares and a root."""
        return after_pooling(state, self.positions)


class SumPool(LipschitzModule):
    """The sum of each window of `w x w` pixels divided by w: `(B, c, H, W)` to `(B, c, H / w, W / w)`, norm exactly 1.

    Args:
        window: w; pixels on the right and below that fill no window are left out.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, images: Tensor) -> Tensor:
        """Pool."""
        return functional.avg_pool2d(images, self.window) * self.window

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: `w^2` numbers of size 1 / w have the norm 1, and the windows are disjoint."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """Sums of `w^2` terms, a quotient and a product: three more roundings of each term cover both."""
        return after_product(state, self.window**2 + 3, 1.0, 1.0)
