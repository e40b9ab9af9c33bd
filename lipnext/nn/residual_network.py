"""The network that CPL and SLL share: residual layers on the image, sums of windows, residual layers on the features."""

from collections.abc import Callable

import torch

from lipnext.core.errors import ConfigError
from lipnext.core.module import LipschitzModule
from lipnext.core.network import LinearHead, LipschitzNetwork
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.gradient_step import GradientStep
from lipnext.nn.head import FirstCoordinatesHead, UnitRowHead
from lipnext.nn.pool import SumPool, patch_grid
from lipnext.nn.position import Centre
from lipnext.nn.reshape import Flatten, PadChannels, Unshuffle

WINDOW = 4
"""Side in pixels of the windows that are summed before the dense layers."""


def residual_network(layer: type[GradientStep]) -> Callable[..., LipschitzNetwork]:
    """Return the `build` of a system whose residual layers are made from their inner map by `layer`."""

    def build(
        *,
        input_shape: tuple[int, int, int],
        classes: int,
        width: int = 45,
        depth: int = 20,
        dense_depth: int = 7,
        inner: int = 5,
        dense_inner: int = 2048,
        patch: int = 1,
        unit_rows: bool = True,
        seed: int = 0,
    ) -> LipschitzNetwork:
        """Build `centre -> patches -> zero channels -> depth convolutional layers -> sums -> dense_depth dense layers -> head`.

        Args:
            input_shape: `(c, H, W)` of the images.
            classes: number of classes K.
            width: channels, the missing ones zero; at least `c * patch^2`.
            depth: convolutional residual layers, with kernels of 3 x 3.
            dense_depth: dense residual layers, on the flattened sums of windows of 4 x 4 pixels.
            inner: channels inside a convolutional layer.
            dense_inner: features inside a dense layer.
            patch: side of the patches that become channels first, 1 (as published), 2 or 4.
            unit_rows: learn a head with rows of unit length (LLN); False takes the first K features for logits, the published
                default of CPL.
            seed: of the initial weights.

        Raises:
            ConfigError: if a value is out of range, the width too small for a patch, or the image for the window.
        """
        _, height, breadth = input_shape
        if min(width, depth, dense_depth, inner, dense_inner) < 1:
            raise ConfigError(
                "model: width, depth, dense_depth, inner and dense_inner must be at least 1, got "
                f"{width}, {depth}, {dense_depth}, {inner} and {dense_inner}"
            )
        if patch not in (1, 2, 4):
            raise ConfigError(
                f"model.patch: must be 1, 2 or 4, which divide the window of {WINDOW} pixels, got {patch}"
            )
        grid, window = patch_grid(input_shape, patch, width), WINDOW // patch
        features = width * (grid[0] // window) * (grid[1] // window)
        if not features:
            raise ConfigError(
                f"images of {height} x {breadth} pixels are smaller than the window of {WINDOW} x {WINDOW} that is summed; "
                "resize them"
            )
        if not unit_rows and classes > features:
            raise ConfigError(
                f"model.width: {features} features cannot be the logits of {classes} classes; take a larger width"
            )
        generator = torch.Generator().manual_seed(seed)
        body: list[LipschitzModule] = [Centre(input_shape), Unshuffle(patch), PadChannels(width)]
        for _ in range(depth):
            step = Convolution(width, inner, 3, grid, padding=1, generator=generator)
            body.append(layer(step, generator))
        body += [SumPool(window), Flatten()]
        for _ in range(dense_depth):
            body.append(layer(Dense(features, dense_inner, generator=generator), generator))
        head: LinearHead = FirstCoordinatesHead(features, classes)
        if unit_rows:
            head = UnitRowHead(features, classes, generator=generator)
        return LipschitzNetwork(body, head, input_shape)

    return build
