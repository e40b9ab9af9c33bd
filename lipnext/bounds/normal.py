"""The standard normal distribution function between two decimal numbers, and its inverse rounded down.

`Phi(x) = 1/2 + phi(x) sum_k x^(2k+1) / (2k+1)!!` has positive terms only, so that nothing cancels; the remainder is at most
that of a geometric series. `decimal` rounds its sums, products, roots and exponentials correctly.
"""

import statistics
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import lru_cache

_DIGITS = 50
_CONTEXT = Context(prec=_DIGITS, rounding=ROUND_HALF_EVEN, Emin=-(10**6), Emax=10**6)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
_SLACK = Decimal("1e-40")  # fewer than 10^4 operations, each within 1e-49, on numbers of at most 1


def normal_cdf(x: float) -> tuple[Decimal, Decimal]:
    """Return numbers below and above `Phi(x)`, at most 1e-39 apart, for |x| <= 40.

    Raises:
        ValueError: for a larger or undefined x.
    """
    if not abs(x) <= 40:
        raise ValueError(f"`x` must lie in [-40, 40], got {x}.")
    with localcontext(_CONTEXT):
        size = abs(Decimal(x))
        square = size * size
        density = (-square / 2).exp() / (2 * _PI).sqrt()
        term, total, odd = density * size, Decimal(0), 1
        # Once the ratio of two terms, square / (odd + 2), is below 1/2, what is left is less than the next term.
        while term > _SLACK / 100 or 2 * square > odd + 2:
            total += term
            odd += 2
            term = term * square / odd
        half = total if x >= 0 else -total
        middle = Decimal("0.5") + half
        return middle - _SLACK, middle + _SLACK


@lru_cache(4096)
def normal_quantile_down(p: float) -> float:
    """Return a number of at most `Phi^-1(p)`, within 1e-14 of it, for 1/2 < p < 1.

    Raises:
        ValueError: for another p.
    """
    if not 0.5 < p < 1:
        raise ValueError(f"`p` must lie between 1/2 and 1, got {p}.")
    start, step = statistics.NormalDist().inv_cdf(p), 0.0
    # The start is believed to be good and proved to be low enough.
    while normal_cdf(start - step)[1] > Decimal(p):
        step = 2 * step or 2.0**-52
    return start - step


def cell_masses(levels: int, largest: int) -> list[Decimal]:
    """Return `P[round(levels g) = n]` for n = 0..largest and a standard normal g, each within 1e-35.

    With x = n / levels and h = 1 / (2 levels), the integral of phi over [x - h, x + h] is
    `2 phi(x) sum_j He_2j(x) h^(2j+1) / (2j+1)!`, He_k the polynomials of Hermite. Five terms are taken; by Cramer's inequality,
    `phi(x) |He_k(x)| <= 0.44 sqrt(k!)`, the others add up to less than `h^11 / 10^4`.

    Args:
        levels: at least 1,024.
        largest: at most 40 levels.
    """
    if levels < 1024 or not 0 <= largest <= 40 * levels:
        raise ValueError(
            f"`levels` must be at least 1024 and `largest` at most 40 levels, got {levels} and {largest}."
        )
    masses = []
    with localcontext(_CONTEXT):
        step = Decimal(1) / levels
        h = step / 2
        weights, power = [], 2 * h
        for j in range(5):
            weights.append(power)
            power = power * h * h / ((2 * j + 2) * (2 * j + 3))
        # phi(x + step) = phi(x) exp(-step^2 / 2) exp(-x step): two products a cell.
        density, ratio, decay = 1 / (2 * _PI).sqrt(), (-step * step / 2).exp(), (-step * step).exp()
        for n in range(largest + 1):
            x = n * step
            before, here, total = Decimal(0), Decimal(1), Decimal(0)
            for k in range(10):  # here is He_k(x)
                if k % 2 == 0:
                    total += here * weights[k // 2]
                before, here = here, x * here - k * before
            masses.append(density * total)
            density, ratio = density * ratio, ratio * decay
    return masses
