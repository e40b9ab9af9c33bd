"""Perturbation sizes as exact fractions, and decimal text that stays on the safe side of a bound."""

import math
from collections.abc import Callable, Iterable
from decimal import Context, Decimal
from fractions import Fraction

from lipnext.core.errors import ConfigError, UnsoundError

LARGEST_EPS = 10

# A float64 has at most 1,074 digits after and 309 before the decimal point.
_EXACT = Context(prec=1500)


def parse_eps(value: str | int | float | Fraction) -> Fraction:
    """Read a perturbation size in pixel units of images in [0, 1], exactly.

    Args:
        value: "36/255", "0.5", 1, 0.25 or a Fraction. A decimal text is taken as written, a float as the
            binary number that it is.

    Returns:
        The exact value, in (0, 10].

    Raises:
        ConfigError: where it is no number, not above 0 or above 10.
    """
    eps = _exact(value)
    if eps <= 0:
        raise ConfigError(f"eps must be above 0, got '{value}'; write for example 36/255")
    if eps > LARGEST_EPS:
        scaled = f"{eps}/255" if eps.denominator == 1 else str(eps / 255)
        raise ConfigError(
            f"eps is in pixel units of images in [0, 1], at most {LARGEST_EPS}; "
            f"{value} looks like 8-bit units, write {scaled}"
        )
    return eps


def _exact(value: object) -> Fraction:
    refusal = ConfigError(f"eps must be a number such as 36/255 or 0.5, got '{value}'")
    if isinstance(value, bool) or not isinstance(value, str | int | float | Fraction):
        raise refusal
    try:
        if isinstance(value, str) and "/" not in value:
            # The float test comes first: Fraction("1e999999999") would fill the memory.
            number = float(value)
            return Fraction(value) if math.isfinite(number) and number != 0 else Fraction(number)
        return Fraction(value)
    except (ValueError, OverflowError, ZeroDivisionError):
        raise refusal from None


def parse_eps_list(values: str | Iterable[str]) -> dict[str, Fraction]:
    """Read several perturbation sizes: "36/255,72/255" or ["36/255", "72/255"].

    Returns:
        The exact values under the text that the user wrote, in that order.

    Raises:
        ConfigError: where there is none, one is not allowed, or two are equal.
    """
    texts = values.split(",") if isinstance(values, str) else list(values)
    result: dict[str, Fraction] = {}
    for text in texts:
        label, eps = eps_label(text), parse_eps(text)
        for known, other in result.items():
            if other == eps:
                raise ConfigError(f"eps {label} is given twice ({known}); leave one out")
        result[label] = eps
    if not result:
        raise ConfigError("eps needs at least one value, such as 36/255")
    return result


def eps_label(value: str | int | float | Fraction) -> str:
    """Return the name of a perturbation size: text as the user wrote it, a fraction as n/255 if it is one."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Fraction):
        pixels = value * 255
        return f"{pixels.numerator}/255" if pixels.denominator == 1 and value.denominator > 1 else str(value)
    return str(value)


def round_down(x: float | Fraction, digits: int) -> str:
    """Return `x` as decimal text with `digits` places that is never above `x`.

    Raises:
        UnsoundError: where `x` is not finite.
    """
    return _decimal(x, digits, math.floor)


def round_up(x: float | Fraction, digits: int) -> str:
    """Return `x` as decimal text with `digits` places that is never below `x`.

    Raises:
        UnsoundError: where `x` is not finite.
    """
    return _decimal(x, digits, math.ceil)


def _decimal(x: float | Fraction, digits: int, to_whole: Callable[[Fraction], int]) -> str:
    if not math.isfinite(x):
        raise UnsoundError(f"{x!r} is not finite and cannot be printed as a bound")
    return f"{Decimal(to_whole(Fraction(x) * 10**digits)).scaleb(-digits, _EXACT):f}"
