"""The trunk on which Prach, Brau, Buttazzo & Lampert compared 1-Lipschitz convolutions (CVPR 2024)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import ConfigError
from lipnext.core.module import LipschitzModule
from lipnext.core.network import LipschitzNetwork
from lipnext.core.rounding import RoundingState
from lipnext.nn.activation import MaxMin
from lipnext.nn.head import UnitRowHead
from lipnext.nn.position import Centre
from lipnext.nn.reshape import Flatten, PadChannels, Unshuffle

MakeConvolution = Callable[[int, int, tuple[int, int]], LipschitzModule]
"""From channels, kernel and `(H, W)` to a convolution that keeps all three sizes."""


class EverySecondChannel(LipschitzModule):
    """`(B, c, H, W)` to `(B, c / 2, H, W)`: channels 0, 2, 4, ...

    For c a multiple of 4 these are both partners of every second pair that `MaxMin` sorted.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Leave the other channels out."""
        return images[:, ::2]

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: a projection."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """No arithmetic, no error."""
        return state


def shrinking_trunk(
    input_shape: tuple[int, int, int],
    convolution: MakeConvolution,
    *,
    width: int,
    blocks: int,
    convolutions: int,
    patch: int,
) -> tuple[list[LipschitzModule], int]:
    """Return the layers from images to features, and the number of features.

    `centre -> space-to-depth -> zero channels up to width -> 1x1 convolution -> MaxMin`, then blocks of
    `(3x3 convolution -> MaxMin) * convolutions -> half the channels -> space-to-depth`, the last one with 1x1 convolutions. A
    block halves the sides and doubles the channels. What is left is flattened: the published trunk pools it by its maximum,
    but with its five blocks and images of 32 x 32 one position is left.

    Args:
        input_shape: `(c, H, W)` of the images.
        convolution: makes the layers that are compared.
        width: channels of the first block, a multiple of 4.
        blocks: at least 1, 5 as published.
        convolutions: in each block, 5 as published.
        patch: side of the patches that become channels at the start, 1 as published.

    Raises:
        ConfigError: if a value is out of range or the width too small for a patch.
    """
    if min(blocks, convolutions, patch) < 1:
        raise ConfigError(
            f"model: blocks, convolutions and patch must be at least 1, got {blocks}, {convolutions} and {patch}"
        )
    least = input_shape[0] * patch**2
    if width < max(least, 4) or width % 4:
        raise ConfigError(
            f"model.width: must be a multiple of 4 that holds the {least} channels of a patch, got {width}"
        )
    size = _shrunk(input_shape[1:], patch)
    layers = [
        Centre(input_shape),
        Unshuffle(patch),
        PadChannels(width),
        convolution(width, 1, size),
        MaxMin(),
    ]
    for block in range(blocks):
        kernel = 1 if block == blocks - 1 else 3
        for _ in range(convolutions):
            layers += [convolution(width, kernel, size), MaxMin()]
        layers += [EverySecondChannel(), Unshuffle(2)]
        width, size = 2 * width, _shrunk(size, 2)
    return [*layers, Flatten()], width * math.prod(size)


def trunk_network(
    convolution: Callable[[int, int, tuple[int, int], torch.Generator], LipschitzModule],
) -> Callable[..., LipschitzNetwork]:
    """Return the `build` of a system that is `shrinking_trunk` with its own convolution and a unit-row head.

    Args:
        convolution: as `MakeConvolution`, with a source of randomness.
    """

    def build(
        *,
        input_shape: tuple[int, int, int],
        classes: int,
        width: int = 64,
        blocks: int = 3,
        convolutions: int = 3,
        patch: int = 4,
        seed: int = 0,
    ) -> LipschitzNetwork:
        """Build the network `shrinking_trunk -> unit-row head`.

        Args:
            input_shape: `(c, H, W)` of the images.
            classes: number of classes K.
            width: channels of the first block, a multiple of 4; each block doubles them.
            blocks: of which each halves the sides; the last one has 1x1 convolutions.
            convolutions: in each block.
            patch: side of the patches that become channels at the start.
            seed: of the initial weights.

        Raises:
            ConfigError: if a value is out of range or the width too small for a patch.
        """
        generator = torch.Generator().manual_seed(seed)

        def seeded(channels: int, kernel: int, size: tuple[int, int]) -> LipschitzModule:
            return convolution(channels, kernel, size, generator)

        layers, features = shrinking_trunk(
            input_shape, seeded, width=width, blocks=blocks, convolutions=convolutions, patch=patch
        )
        return LipschitzNetwork(layers, UnitRowHead(features, classes, generator=generator), input_shape)

    return build


def _shrunk(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-size[0] // factor), -(-size[1] // factor)
