"""Perturbations measured without any rounding: floats and 8-bit pixels are rational numbers, so integers decide."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from lipnext.core.bound import norm_label
from lipnext.core.eps import parse_eps
from lipnext.core.errors import DataError
from lipnext.core.rounding import fraction_up


def exact_within(image: Tensor, other: Tensor, radius: float, norm: float = 2.0) -> bool:
    """Decide exactly whether `||other - image|| <= radius`.

    Args:
        image: one image of any shape, float32 or float64.
        other: of the same shape and type.
        radius: at least 0 and finite, taken as the binary number that it is.
        norm: 2.0 or inf.

    Raises:
        DataError: where the images do not fit or are not finite, or the radius is not usable.
        UnsoundError: for another norm.
    """
    if not (math.isfinite(radius) and radius >= 0):
        raise DataError(f"a radius must be finite and at least 0, got {radius!r}")
    power, shift = _power(image, other, norm)
    numerator, denominator = float(radius).as_integer_ratio()
    if norm == math.inf:
        return power * denominator <= numerator << shift
    return power * denominator**2 <= numerator**2 << 2 * shift


def exact_norm_up(image: Tensor, other: Tensor, norm: float = 2.0) -> float:
    """Return `||other - image||` rounded up, at most two floats above the exact value.

    Raises:
        DataError: where the images do not fit or are not finite.
        UnsoundError: for another norm.
    """
    power, shift = _power(image, other, norm)
    return (
        fraction_up(Fraction(power, 1 << shift)) if norm == math.inf else _root_up(Fraction(power, 4**shift))
    )


def lsb_budget(eps: str | int | float | Fraction) -> int:
    """Return the largest N such that `sum of (change in 8-bit levels)^2 <= N` means an l2 norm of at most `eps`.

    36/255 gives 1296. The statement is about pixel values k/255 as real numbers; the float that stands for k/255 is off by
    its rounding.

    Raises:
        ConfigError: where eps is no number in (0, 10].
    """
    return math.floor((255 * parse_eps(eps)) ** 2)


def lsb_squares(images: Tensor, others: Tensor) -> Tensor:
    """Return int64 (n,): the sums of squared changes in 8-bit levels of images (n, ...), exactly.

    Raises:
        DataError: where they are not uint8 or of different shapes.
    """
    if images.dtype != torch.uint8 or others.dtype != torch.uint8 or images.shape != others.shape:
        raise DataError(
            f"8-bit images of one shape are needed, got {images.dtype} of {tuple(images.shape)} and "
            f"{others.dtype} of {tuple(others.shape)}; compare float images with exact_within"
        )
    return (others.long() - images.long()).flatten(1).square().sum(dim=1)


def lsb_norms_up(images: Tensor, others: Tensor) -> Tensor:
    """Return float64 (n,): the l2 norms of changes of 8-bit images in units of [0, 1], rounded up.

    Raises:
        DataError: as `lsb_squares`.
    """
    norms = [_root_up(Fraction(squares, 255**2)) for squares in lsb_squares(images, others).tolist()]
    return torch.tensor(norms, dtype=torch.float64)


def _power(image: Tensor, other: Tensor, norm: float) -> tuple[int, int]:
    """Return integers (p, s): the norm is `p / 2^s` for linf, its square `p / 4^s` for l2."""
    norm_label(norm)
    if image.shape != other.shape or image.dtype != other.dtype or not image.is_floating_point():
        raise DataError(
            f"two float images of one shape and type are needed, got {image.dtype} of {tuple(image.shape)} and "
            f"{other.dtype} of {tuple(other.shape)}"
        )
    first, second = image.detach().double().flatten().tolist(), other.detach().double().flatten().tolist()
    if not all(map(math.isfinite, (*first, *second))):
        raise DataError("an exact norm needs finite images, got NaN or infinity")
    changed = [
        (a.as_integer_ratio(), b.as_integer_ratio()) for a, b in zip(first, second, strict=True) if a != b
    ]
    # Denominators are powers of two; on the finest of them all differences are integers.
    shift = max((max(a[1], b[1]) for a, b in changed), default=1).bit_length() - 1
    differences = [(b[0] << shift) // b[1] - (a[0] << shift) // a[1] for a, b in changed]
    if norm == math.inf:
        return max(map(abs, differences), default=0), shift
    return sum(d * d for d in differences), shift


def _root_up(square: Fraction) -> float:
    """Return the square root of `square >= 0`, rounded up."""
    # An integer root of at least 64 significant bits, so that its own rounding is far below that of a float.
    extra = max(0, 64 + (square.denominator.bit_length() - square.numerator.bit_length()) // 2 + 1)
    scaled = -(-square.numerator * 4**extra // square.denominator)
    root = math.isqrt(scaled)
    return fraction_up(Fraction(root + (root * root < scaled), 2**extra))
