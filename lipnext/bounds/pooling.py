"""Proved bounds of two-dimensional pooling, for the maps that torch computes.

Windows are products of intervals, one a row axis and one a column axis. What an axis can contribute is read off the list of its
intervals, so that padding, incomplete windows and overlaps of any kind count as they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from lipnext.bounds.geometry import Pair, as_pair, is_integer
from lipnext.bounds.spectral import absolute_norm_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import ConfigError
from lipnext.core.rounding import fraction_up, sqrt_up

_STEPS = 30  # of power iteration, on small matrices


def average_pooling_bound(
    input_size: tuple[int, int],
    kernel_size: Pair,
    *,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> LipschitzBound:
    """Bound the l2 norm of `torch.nn.AvgPool2d` by the Schur test or Collatz-Wielandt, whichever is smaller.

    A row of the map sums to (pixels in the window) / divisor, a column to the sum of 1 / divisor over the windows of a
    pixel; both are exact rationals. Without padding the Schur test gives `sqrt(max overlap / window area)`, the norm itself
    where windows are disjoint.

    Args:
        input_size: height and width of the images, before padding.
        kernel_size: as in `torch.nn.AvgPool2d`, like all below.
        stride: the kernel size where it is None.
        padding: at most half the window.
        ceil_mode: whether windows may stick out at the end.
        count_include_pad: whether the divisor counts padding.
        divisor_override: a divisor for all windows; not 0.

    Raises:
        ConfigError: for settings that torch refuses.
    """
    if divisor_override is not None and (not is_integer(divisor_override) or divisor_override == 0):
        raise ConfigError(f"divisor_override must be an integer other than 0, got {divisor_override!r}")
    axes = []
    for axis in _axes(input_size, kernel_size, stride, padding, 1, ceil_mode):
        if divisor_override is not None:
            windows = [(pixels, 1) for pixels, _ in axis.windows]
        elif count_include_pad:
            windows = axis.windows
        else:
            windows = [(pixels, len(pixels)) for pixels, _ in axis.windows]
        axes.append(_Axis(axis.size, windows))
    return _average_bound(axes, 1 if divisor_override is None else abs(divisor_override))


def adaptive_average_pooling_bound(input_size: tuple[int, int], output_size: Pair) -> LipschitzBound:
    """Bound the l2 norm of `torch.nn.AdaptiveAvgPool2d` as `average_pooling_bound` does; `1 / sqrt(H W)` for global pooling.

    Args:
        input_size: height and width of the images.
        output_size: of the result, both at least 1.

    Raises:
        ConfigError: for sizes that are no positive integers.
    """
    axes = []
    for size, outputs in zip(
        as_pair("input_size", input_size, 1), as_pair("output_size", output_size, 1), strict=True
    ):
        # as torch: from floor(i H / n) up to ceil((i + 1) H / n)
        spans = [range(i * size // outputs, -(-(i + 1) * size // outputs)) for i in range(outputs)]
        axes.append(_Axis(size, [(span, len(span)) for span in spans]))
    return _average_bound(axes, 1)


def max_pooling_bound(
    input_size: tuple[int, int],
    kernel_size: Pair,
    *,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> LipschitzBound:
    """Bound the l2 constant of `torch.nn.MaxPool2d` by `sqrt(max number of windows that a pixel belongs to)`.

    A maximum changes by at most the l2 change of its window, and the squares of the windows' changes count a pixel as
    often as windows contain it.

    Args:
        input_size: height and width of the images, before padding.
        kernel_size: as in `torch.nn.MaxPool2d`, like all below.
        stride: the kernel size where it is None.
        padding: at most half the window.
        dilation: distance between the pixels of a window.
        ceil_mode: whether windows may stick out at the end.

    Raises:
        ConfigError: for settings that torch refuses.
    """
    return _overlap_bound(_axes(input_size, kernel_size, stride, padding, dilation, ceil_mode))


def l2_pooling_bound(
    input_size: tuple[int, int], kernel_size: Pair, *, stride: Pair | None = None
) -> LipschitzBound:
    """Bound the l2 constant of `torch.nn.LPPool2d` with power 2: the norms of windows; 1 where they are disjoint.

    `ceil_mode` is not offered: torch scales the incomplete windows up.

    All arguments and errors are those of `max_pooling_bound`.
    """
    return _overlap_bound(_axes(input_size, kernel_size, stride, 0, 1, ceil_mode=False))


@dataclass(frozen=True)
class _Axis:
    """The windows of one axis, each as its pixels inside the image and a divisor, first its length including padding."""

    size: int
    windows: list[tuple[range, int]]


def _axes(
    input_size: tuple[int, int],
    kernel_size: Pair,
    stride: Pair | None,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> list[_Axis]:
    kernels = as_pair("kernel_size", kernel_size, 1)
    settings = zip(
        as_pair("input_size", input_size, 1),
        kernels,
        kernels if stride is None else as_pair("stride", stride, 1),
        as_pair("padding", padding, 0),
        as_pair("dilation", dilation, 1),
        strict=True,
    )
    return [_axis(*numbers, ceil_mode) for numbers in settings]


def _axis(size: int, kernel: int, stride: int, pad: int, dilation: int, ceil_mode: bool) -> _Axis:
    reach = dilation * (kernel - 1) + 1
    if pad > reach // 2:
        raise ConfigError(f"padding must be at most half the window, got {pad} for a window of {reach}")
    free = size + 2 * pad - reach
    outputs = (-(-free // stride) if ceil_mode else free // stride) + 1
    if ceil_mode and (outputs - 1) * stride >= size + pad:
        outputs -= 1  # torch leaves out a window that would begin behind the image and its left padding
    if outputs < 1:
        raise ConfigError(
            f"a pooling window of {reach} pixels does not fit into {size + 2 * pad} padded ones"
        )
    windows = []
    for start in range(-pad, outputs * stride - pad, stride):
        first = start if start >= 0 else start % dilation
        inside = range(first, min(start + reach, size), dilation)
        windows.append((inside, min(start + kernel, size + pad) - start))
    return _Axis(size, windows)


def _overlap_bound(axes: Sequence[_Axis]) -> LipschitzBound:
    overlap = 1
    for axis in axes:
        members = [0] * axis.size
        for pixels, _ in axis.windows:
            for pixel in pixels:
                members[pixel] += 1
        overlap *= max(members)
    return LipschitzBound(value=sqrt_up(float(overlap)), norm=2.0, proof="window-overlap")


def _average_bound(axes: Sequence[_Axis], divisor: int) -> LipschitzBound:
    """Bound averages over windows, the second number of each being its divisor; `divisor` divides all of them.

    The map is the Kronecker product of two matrices, one an axis, whose norms multiply.
    """
    schur = sqrt_up(fraction_up(math.prod(_schur_squared(axis) for axis in axes) / Fraction(divisor) ** 2))
    collatz = fraction_up(Fraction(math.prod(_collatz(axis) for axis in axes)) / divisor)
    value, proof = min((schur, "schur"), (collatz, "collatz-wielandt"))
    return LipschitzBound(value=value, norm=2.0, proof=proof)


def _schur_squared(axis: _Axis) -> Fraction:
    """`(max row sum) (max column sum)`, exactly."""
    columns = [Fraction(0)] * axis.size
    for pixels, divisor in axis.windows:
        for pixel in pixels:
            columns[pixel] += Fraction(1, divisor)
    return max(Fraction(len(pixels), divisor) for pixels, divisor in axis.windows) * max(columns)


def _collatz(axis: _Axis) -> Fraction:
    """A bound of the norm by Collatz-Wielandt. Rounding entries up only raises the norm of a non-negative matrix."""
    matrix = torch.zeros(len(axis.windows), axis.size, dtype=torch.float64)
    for row, (pixels, divisor) in enumerate(axis.windows):
        matrix[row, list(pixels)] = fraction_up(Fraction(1, divisor))
    return Fraction(absolute_norm_bound(matrix, _STEPS))
