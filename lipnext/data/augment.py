"""Batched augmentation of float images (B, C, H, W) in [0, 1]: flip, crop, cutout, and `Augment`, the chain.

All randomness comes from the CPU generator that is passed in, so a batch is a function of its images and a seed, whatever
device the images are on. What was drawn travels to them without waiting for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lipnext.core.experiment import AugmentSpec
from lipnext.data.randaugment import randaugment


class Augment:
    """The augmentations that `spec` asks for, in the usual order: flip, crop, RandAugment, cutout."""

    def __init__(self, spec: AugmentSpec) -> None:
        self.spec = spec

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return augmented `images`, float `(B, C, H, W)` in [0, 1], of the same shape and dtype."""
        spec = self.spec
        if spec.flip:
            images = flip(images, generator)
        if spec.crop:
            images = crop(images, spec.crop, generator)
        if spec.randaugment:
            images = randaugment(
                images,
                generator,
                probability=spec.randaugment,
                ops=spec.randaugment_ops,
                magnitude=spec.randaugment_magnitude,
            )
        if spec.cutout:
            images = cutout(images, spec.cutout, generator)
        return images


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2. `(B, C, H, W)` to the same shape."""
    mirrored = torch.rand(len(images), generator=generator, dtype=torch.float32) < 0.5
    mirrored = mirrored.to(images.device, non_blocking=True)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `padding` pixels, uniformly, each way; what comes in from outside is black.

    That is: pad by `padding` zeros on every side, then cut a window of the old size.
    """
    count, _, height, width = images.shape
    offset = torch.randint(2 * padding + 1, (2, count), generator=generator)
    offset = offset.to(images.device, non_blocking=True)
    padded = F.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, 2p + 1, 2p + 1, H, W)
    return windows[torch.arange(count, device=images.device), :, offset[0], offset[1]]


def cutout(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Blacken in each image a square of `side` pixels around a uniform pixel; the border may cut the square.

    `(B, C, H, W)` to the same shape. Source: DeVries and Taylor, arXiv:1708.04552.
    """
    count, _, height, width = images.shape

    def hidden(length: int) -> Tensor:
        start = torch.randint(length, (count, 1), generator=generator) - side // 2
        position = torch.arange(length)
        return ((position >= start) & (position < start + side)).to(images.device, non_blocking=True)

    square = hidden(height)[:, None, :, None] & hidden(width)[:, None, None, :]
    return images.masked_fill(square, 0)
