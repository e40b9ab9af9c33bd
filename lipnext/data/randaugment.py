"""RandAugment on batches of float images (B, C, H, W) in [0, 1].

Each image gets `ops` operations drawn one after the other, uniformly with replacement, all of one magnitude
on a scale of 0..30. Operations, ranges and conventions (nearest pixel, black outside, shear about the corner)
are those that torchvision and Pillow made standard. Images between two operations keep their float values,
where Pillow rounds to bytes. Source: Cubuk, Zoph, Shlens, Le, "RandAugment", arXiv:1909.13719.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAGNITUDES = 30  # the largest
RGB_TO_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow's conversion to grey
AXES = ("shear-x", "shear-y", "translate-x", "translate-y", "rotate")


def randaugment(
    images: Tensor, generator: torch.Generator, *, probability: float = 1.0, ops: int = 2, magnitude: int = 9
) -> Tensor:
    """Apply `ops` random operations to each image, with `probability` for each image to be touched at all.

    Args:
        images: float `(B, C, H, W)` in [0, 1], C = 1 or 3; not changed.
        generator: a CPU generator, the source of all choices.
        probability: of an image being augmented.
        ops: operations on each such image.
        magnitude: their strength, 0 to 30.

    Returns:
        Images of the same shape and dtype, in [0, 1].
    """
    images = images.clone()
    chosen = torch.rand(len(images), generator=generator, dtype=torch.float32) < probability
    for _ in range(ops):
        kind = torch.randint(len(OPERATIONS), (len(images),), generator=generator)
        sign = 1 - 2 * torch.randint(2, (len(images),), generator=generator)
        for number, operation in enumerate(OPERATIONS.values()):
            members = (chosen & (kind == number)).nonzero().flatten()
            if len(members):
                signs = sign[members].to(images.dtype)[:, None, None, None]
                members = members.to(images.device, non_blocking=True)
                images[members] = operation(images[members], magnitude, signs)
    return images


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Move pixels: the output at (x, y) is the input pixel around `matrix @ (x, y, 1)`, black outside.

    Args:
        images: `(B, C, H, W)`, on any device.
        matrices: float64 `(B, 2, 3)` on the CPU, where it is decided which pixel goes where; centres are
            (column + 1/2, row + 1/2), as in Pillow's `transform`.

    Returns:
        `(B, C, H, W)`.
    """
    channels, height, width = images.shape[1:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.stack((x + 0.5, y + 0.5, torch.ones_like(x)), 0).flatten(1).to(matrices)  # (3, H W)
    column, row = (matrices @ centres).floor().long().unbind(1)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = (row * width + column).where(inside, 0).to(images.device, non_blocking=True)
    inside = inside.to(images.device, non_blocking=True)
    pixels = images.flatten(2).gather(2, source[:, None].expand(-1, channels, -1)) * inside[:, None]
    return pixels.reshape(images.shape)


def geometric_matrices(name: str, strength: Tensor, height: int, width: int) -> Tensor:
    """Return the matrices for `warp` of one of `AXES`.

    Args:
        name: "shear-x" or "shear-y" (up to 0.3, about the upper left corner), "translate-x" or "translate-y"
            (up to 150/331 of the side, whole pixels), "rotate" (up to 30 degrees about the centre,
            anticlockwise above 0).
        strength: float64 `(B,)`, from -1 to 1.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        float64 `(B, 2, 3)`, output to input.
    """
    matrices = torch.eye(2, 3).to(strength).repeat(len(strength), 1, 1)
    if name == "shear-x":
        matrices[:, 0, 1] = 0.3 * strength
    elif name == "shear-y":
        matrices[:, 1, 0] = 0.3 * strength
    elif name == "translate-x":
        matrices[:, 0, 2] = (150 / 331 * width * strength).trunc()
    elif name == "translate-y":
        matrices[:, 1, 2] = (150 / 331 * height * strength).trunc()
    else:
        angle = math.radians(30) * strength
        matrices[:, 0, 0] = matrices[:, 1, 1] = angle.cos()
        matrices[:, 0, 1], matrices[:, 1, 0] = -angle.sin(), angle.sin()
        centre = strength.new_tensor([width / 2, height / 2])
        matrices[:, :, 2] = centre - matrices[:, :, :2] @ centre
    return matrices


def _geometric(name: str) -> Callable[[Tensor, int, Tensor], Tensor]:
    def apply(images: Tensor, magnitude: int, signs: Tensor) -> Tensor:
        strength = signs.flatten().double() * magnitude / MAGNITUDES
        return warp(images, geometric_matrices(name, strength, *images.shape[2:]))

    return apply


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return `other + factor (images - other)`, clamped to [0, 1]; the factor may be on the CPU."""
    factor = factor.to(images.device, non_blocking=True)
    return torch.lerp(other.expand_as(images), images, factor.expand_as(images)).clamp_(0, 1)


def grey(images: Tensor) -> Tensor:
    """Return the brightness, `(B, 1, H, W)`; of grey images, themselves."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(RGB_TO_LUMA, dtype=images.dtype).to(images.device, non_blocking=True)
    return torch.tensordot(images, weights, ([1], [0])).unsqueeze(1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale all values by `factor`, `(B, 1, 1, 1)`."""
    return (images * factor.to(images.device, non_blocking=True)).clamp_(0, 1)


def colour(images: Tensor, factor: Tensor) -> Tensor:
    """Move each pixel away from (factor > 1) or towards its own grey; grey images stay as they are."""
    return images if images.shape[1] == 1 else blend(images, grey(images), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move each pixel away from (factor > 1) or towards the mean grey of its image."""
    return blend(images, grey(images).mean((1, 2, 3), keepdim=True), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Move each pixel away from (factor > 1) or towards its smoothed self; the outermost pixels stay.

    Smoothing weighs the pixel 5/13 and each of its eight neighbours 1/13. Images of less than 3 pixels stay.
    """
    if min(images.shape[2:]) < 3:
        return images
    smooth = images.clone()
    inner = images[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = (9 * F.avg_pool2d(images, 3, stride=1) + 4 * inner) / 13
    return blend(images, smooth, factor)


def levels(images: Tensor) -> Tensor:
    """Return the nearest bytes of values in [0, 1], int64 of the same shape."""
    return (images * 255).round_().long()


def posterize(images: Tensor, bits: int) -> Tensor:
    """Keep the upper `bits` of each byte."""
    return (levels(images) & (256 - (1 << (8 - bits)))).to(images) / 255


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values whose byte is at least `threshold`."""
    return torch.where(levels(images) >= threshold, 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of each image to reach from 0 to 1; a constant channel stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low) / (high - low)
    return torch.where(high > low, stretched, images).clamp_(0, 1)


def equalize(images: Tensor) -> Tensor:
    """Flatten the histogram of each channel of each image, by Pillow's rule in whole numbers.

    With h the histogram of the 256 bytes and step = (pixels - h[largest byte]) // 255, byte v becomes
    (step // 2 + h[0] + ... + h[v - 1]) // step, at most 255. Where step is 0 (few pixels), nothing changes.
    """
    value = levels(images).flatten(2).flatten(0, 1)  # (B C, H W)
    histogram = value.new_zeros(len(value), 256).scatter_add_(1, value, torch.ones_like(value))
    step = (value.shape[1] - histogram.gather(1, value.amax(1, keepdim=True))) // 255
    before = histogram.cumsum(1) - histogram
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(1, value).to(images).reshape(images.shape) / 255
    return torch.where((step > 0).reshape(*images.shape[:2], 1, 1), equalized, images)


def _factor(magnitude: int, signs: Tensor) -> Tensor:
    """Return 1 +- 0.9 at the largest magnitude."""
    return 1 + 0.9 * magnitude / MAGNITUDES * signs


# What each name does to (images, magnitude, signs); signs are +-1, `(B, 1, 1, 1)`, on the CPU.
OPERATIONS: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "identity": lambda images, magnitude, signs: images,
    **{name: _geometric(name) for name in AXES},
    "brightness": lambda images, magnitude, signs: brightness(images, _factor(magnitude, signs)),
    "colour": lambda images, magnitude, signs: colour(images, _factor(magnitude, signs)),
    "contrast": lambda images, magnitude, signs: contrast(images, _factor(magnitude, signs)),
    "sharpness": lambda images, magnitude, signs: sharpness(images, _factor(magnitude, signs)),
    "posterize": lambda images, magnitude, signs: posterize(images, 8 - round(4 * magnitude / MAGNITUDES)),
    "solarize": lambda images, magnitude, signs: solarize(images, 255 * (1 - magnitude / MAGNITUDES)),
    "autocontrast": lambda images, magnitude, signs: autocontrast(images),
    "equalize": lambda images, magnitude, signs: equalize(images),
}
