"""Activations and their slopes on intervals, and straight lines above and below a product, an activation, a size.

A line with any slope bounds a function as long as its constant is large enough; so slopes may be rounded as they come, and
constants are enlarged by more than their roundings; what underflows is paid for in `substitution`. A convex function is below
a line where it is at both ends.

For tanh and sigmoid the library is assumed right to within 64 units of roundoff, absolutely, as in
`lipnext.certificates.operations.saturating`. Their slopes grow up to 0 and fall behind it, so that on an interval they are
smallest at an end and largest next to 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SAFE = 1 + 2.0**-49  # covers eight roundings of a number
_CURVE = 2.0**-44  # covers the error of a slope, and of a value, of tanh and sigmoid


@dataclass(frozen=True)
class Lines:
    """`lower_slope x + lower <= y <= upper_slope x + upper` wherever x lies in its interval; all of one shape."""

    lower_slope: Tensor
    lower: Tensor
    upper_slope: Tensor
    upper: Tensor


Box = tuple[Tensor, Tensor]


def activate(activation: str, x: Tensor) -> Tensor:
    """Compute the activation."""
    function = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}.get(activation)
    return x if function is None else function(x)


def activated(activation: str, box: Box) -> Box:
    """The interval of `sigma(z)`, all of them monotone."""
    lower, upper = (activate(activation, z) for z in box)
    if activation in ("relu", "identity"):
        return lower, upper
    return lower - _CURVE, upper + _CURVE


def slopes(activation: str, box: Box) -> Box:
    """The interval of the Clarke derivative of sigma for z in the box: 0 <= lower <= upper <= 1.

    ReLU has slope 1 where z > 0 for certain, 0 where z < 0 for certain, and anything between where neither is known.
    """
    lower, upper = box
    if activation == "identity":
        return torch.ones_like(lower), torch.ones_like(upper)
    if activation == "relu":
        return (lower > 0).double(), 1 - (upper < 0).double()  # NaN counts as unknown
    far = torch.maximum(lower.abs(), upper.abs())
    near = torch.where((lower <= 0) & (upper >= 0), 0.0, torch.minimum(lower.abs(), upper.abs()))
    steepest = 1.0 if activation == "tanh" else 0.25
    return (
        (_slope(activation, far) - _CURVE).clamp_min(0),
        (_slope(activation, near) + _CURVE).clamp_max(steepest),
    )


def _slope(activation: str, z: Tensor) -> Tensor:
    value = activate(activation, z)
    return 1 - value * value if activation == "tanh" else value * (1 - value)


def activation_lines(activation: str, box: Box) -> Lines:
    """Lines around `sigma(z)`. ReLU: the chord above, z or 0 below (CROWN, Zhang et al. 2018).

    The others are bounded with the smallest slope d on the interval: `sigma(u) - sigma(z) >= d (u - z)`, and from below alike.
    """
    lower, upper = box
    zero = torch.zeros_like(lower)
    if activation == "identity":
        return Lines(zero + 1, zero, zero + 1, zero)
    if activation == "relu":
        active, unstable = (lower >= 0).double(), (lower < 0) & (upper > 0)
        chord = torch.where(unstable, upper / (upper - lower), active)
        above = torch.maximum(-lower * chord, upper * (1 - chord)) * _SAFE
        below = torch.where(unstable, (upper > -lower).double(), active)
        return Lines(below, zero, chord, torch.where(unstable, above, zero))
    slope, _ = slopes(activation, box)
    low, high = activated(activation, box)
    return Lines(
        slope,
        low - slope * lower - _rounding(low, slope * lower),
        slope,
        high - slope * upper + _rounding(high, slope * upper),
    )


def product_box(box: Box, slope: Box) -> Box:
    """The interval of `v d` for v in its interval and d in the interval of slopes, `0 <= d`."""
    (lower, upper), (least, most) = box, slope
    low = lower * torch.where(lower < 0, most, least)
    high = upper * torch.where(upper > 0, most, least)
    return low - low.abs() * 2.0**-52, high + high.abs() * 2.0**-52


def product_lines(box: Box, slope: Box, joint: bool) -> Lines:
    """Lines around `v d` in terms of v, for any d in the interval of slopes.

    Of one sign, v times the larger or smaller slope is exact. Otherwise `max_d v d` is convex, and its chord the best line
    above (Shi et al. 2022, section 4); without `joint` it is the constant that RecurJac takes (Zhang et al. 2019).
    """
    (lower, upper), (least, most) = box, slope
    upper_slope, above = _above_product(lower, upper, least, most, joint)
    lower_slope, below = _above_product(-upper, -lower, least, most, joint)
    return Lines(lower_slope, -below, upper_slope, above)


def _above_product(
    lower: Tensor, upper: Tensor, least: Tensor, most: Tensor, joint: bool
) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(lower)
    mixed = (lower < 0) & (upper > 0) & (least < most)
    left, right = least * lower, most * upper
    chord = torch.where(mixed, (right - left) / (upper - lower), zero) if joint else zero
    start, end = left - chord * lower, right - chord * upper
    above = torch.maximum(start + _rounding(left, chord * lower), end + _rounding(right, chord * upper))
    slope = torch.where(mixed, chord, torch.where(upper <= 0, least, most))
    return slope, torch.where(mixed, above, zero)


def lines_above_size(box: Box) -> tuple[Tensor, Tensor]:
    """Slope k and constant b with `|v| <= k v + b` in the interval: the chord of the size."""
    lower, upper = box
    mixed = (lower < 0) & (upper > 0)
    chord = torch.where(mixed, (upper + lower) / (upper - lower), torch.where(upper <= 0, -1.0, 1.0))
    left = -lower - chord * lower + _rounding(lower, chord * lower)
    right = upper - chord * upper + _rounding(upper, chord * upper)
    return chord, torch.where(mixed, torch.maximum(left, right), 0.0)


def _rounding(a: Tensor, b: Tensor) -> Tensor:
    """More than the rounding errors of a sum of two numbers that are rounded themselves."""
    return (a.abs() + b.abs()) * 2.0**-50
