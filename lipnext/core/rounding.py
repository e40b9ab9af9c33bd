"""Floating-point arithmetic that errs on the safe side.

Every function here rounds its exact result in the stated direction, so that chains of them stay bounds.
The error model of matrix products is chapter 3 of Higham, "Accuracy and Stability of Numerical Algorithms",
second edition.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lipnext.core.errors import UnsoundError

UNIT_ROUNDOFF: dict[torch.dtype, float] = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
ARITHMETIC = {"float64": torch.float64, "float32": torch.float32}
"""In which a deployed program may run."""

# By unit roundoff: what all underflows in one layer can add to the l2 error of one sample. A product loses at most half of the
# smallest subnormal number, 2^-1075 or 2^-150, and the root of a sum of squares at most the root of what was lost;
# the constants are above 2^28 times that root.
UNDERFLOW = {2.0**-53: 2.0**-500, 2.0**-24: 2.0**-46}

# By unit roundoff: activations up to this size square and add up without overflow, 2^28 of them and more. Partial sums of a
# product are covered too: their size times the unit roundoff enters the error, which has the same limit.
LARGEST = {2.0**-53: 2.0**450, 2.0**-24: 2.0**45}


@dataclass(frozen=True)
class RoundingState:
    """What is known, before a layer, about the floating-point evaluation of one sample.

    Attributes:
        norm: bound from above on ||x||_2 of the exact activations of one sample.
        error: bound from above on the l2 distance between the computed and the exact activations.
        unit: unit roundoff of the arithmetic, `UNIT_ROUNDOFF[dtype]`; with subnormal numbers kept.

    Raises:
        UnsoundError: where one of the three is not finite or negative, or the activations may overflow.
    """

    norm: float
    error: float
    unit: float

    @property
    def dtype(self) -> torch.dtype:
        """In which the program runs."""
        return torch.float64 if self.unit == UNIT_ROUNDOFF[torch.float64] else torch.float32

    @property
    def underflow(self) -> float:
        """What underflow can add to the error in one layer."""
        return UNDERFLOW[self.unit]

    def __post_init__(self) -> None:
        for name in ("norm", "error", "unit"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UnsoundError(
                    f"rounding state: {name} must be finite and not negative, got {value!r}; "
                    "the activations may overflow, check the weights"
                )
        if self.unit not in LARGEST:
            raise UnsoundError(f"rounding state: unit must be that of float64 or float32, got {self.unit!r}")
        if self.norm + self.error > LARGEST[self.unit]:
            raise UnsoundError(
                f"rounding state: activations of norm {self.norm:g} with error {self.error:g} may overflow; "
                "check the weights, or use float64"
            )


def up(x: float) -> float:
    """Return the next float above `x`."""
    return math.nextafter(x, math.inf)


def down(x: float) -> float:
    """Return the next float below `x`."""
    return math.nextafter(x, -math.inf)


def tensor_up(tensor: Tensor) -> Tensor:
    """Return the next numbers above, entry by entry."""
    return torch.nextafter(tensor, torch.full_like(tensor, math.inf))


def tensor_down(tensor: Tensor) -> Tensor:
    """Return the next numbers below, entry by entry."""
    return torch.nextafter(tensor, torch.full_like(tensor, -math.inf))


def fraction_up(exact: Fraction) -> float:
    """Return the smallest float64 that is not below `exact` (inf where there is none)."""
    return -fraction_down(-exact)


def fraction_down(exact: Fraction) -> float:
    """Return the largest float64 that is not above `exact` (-inf where there is none)."""
    try:
        rounded = float(exact)
    except OverflowError:
        rounded = math.inf if exact > 0 else -math.inf
    if rounded == -math.inf:
        return rounded
    return down(rounded) if rounded == math.inf or Fraction(rounded) > exact else rounded


def add_up(a: float, b: float) -> float:
    """Return `a + b`, rounded up."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    return fraction_up(Fraction(a) + Fraction(b))


def mul_up(a: float, b: float) -> float:
    """Return `a * b`, rounded up; exact where the product is a float, so that factors of 1 cost nothing."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    return fraction_up(Fraction(a) * Fraction(b))


def div_down(a: float, b: float) -> float:
    """Return `a / b`, rounded down.

    Raises:
        ZeroDivisionError: where `b` is zero.
    """
    if not (math.isfinite(a) and math.isfinite(b)):
        return a / b
    return fraction_down(Fraction(a) / Fraction(b))


def sqrt_up(x: float) -> float:
    """Return the square root of `x >= 0`, rounded up.

    Raises:
        ValueError: where `x` is negative.
    """
    root = math.sqrt(x)
    if not math.isfinite(root):
        return root
    return up(root) if Fraction(root) ** 2 < Fraction(x) else root


def sum_up(values: Iterable[float]) -> float:
    """Return the sum of `values`, rounded up after each addition."""
    total = 0.0
    for value in values:
        total = add_up(total, value)
    return total


def gamma(n: int, u: float) -> float:
    """Return `n u / (1 - n u)` rounded up: the relative error of a sum of `n` products in any order.

    The bound is Higham's gamma_n (lemma 3.1): it holds for every order of summation, with fused products or
    without, as long as nothing overflows.

    Args:
        n: number of rounded operations on the longest path, at least 0.
        u: unit roundoff, `UNIT_ROUNDOFF[dtype]`.

    Raises:
        UnsoundError: where `n u >= 1`: the bound does not exist.
    """
    if n < 0:
        raise UnsoundError(f"gamma: n must not be negative, got {n}")
    product = n * Fraction(u)
    if product >= 1:
        raise UnsoundError(
            f"gamma: n u = {float(product):g} is not below 1, no error bound for {n} terms; use float64"
        )
    return fraction_up(product / (1 - product))
