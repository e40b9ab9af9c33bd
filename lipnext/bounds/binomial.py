"""Tails of the binomial distribution from above, and the confidence bounds that follow from them.

Decimal arithmetic of 50 digits, every operation rounded towards the larger tail.
"""

import math
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from functools import lru_cache

from lipnext.core.rounding import down

_UP = Context(prec=50, rounding=ROUND_CEILING, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
_DOWN = Context(prec=50, rounding=ROUND_FLOOR, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
_NEGLIGIBLE = Decimal("1e-30")


@lru_cache(64)
def _choose(n: int, k: int) -> Decimal:
    return _UP.create_decimal(math.comb(n, k))


def binomial_tail_up(k: int, n: int, p: float) -> Decimal:
    """Return a number of at least `P[Bin(n, p) >= k]`, relative excess below 1e-25.

    Args:
        k: 0 to n.
        n: number of trials, at least 1.
        p: probability of success, 0 <= p < 1, taken as exact.
    """
    if k == 0:
        return Decimal(1)
    if p == 0:
        return Decimal(0)
    exact = Decimal(p)
    failure, odds = _UP.subtract(Decimal(1), exact), _UP.divide(exact, _DOWN.subtract(Decimal(1), exact))
    term = _UP.multiply(_choose(n, k), _UP.multiply(_power_up(exact, k), _power_up(failure, n - k)))
    total = term
    for i in range(k, n):
        ratio = _UP.divide(_UP.multiply(odds, Decimal(n - i)), Decimal(i + 1))
        # Ratios fall from here on: all that is left is at most a geometric series.
        if ratio < 1:
            rest = _UP.divide(_UP.multiply(term, ratio), _DOWN.subtract(Decimal(1), ratio))
            if rest <= total * _NEGLIGIBLE:
                return min(_UP.add(total, rest), Decimal(1))
        term = _UP.multiply(term, ratio)
        total = _UP.add(total, term)
    return min(total, Decimal(1))


def _power_up(x: Decimal, n: int) -> Decimal:
    """`x^n` for x >= 0 by repeated squaring, rounded up."""
    result = Decimal(1)
    while n:
        if n % 2:
            result = _UP.multiply(result, x)
        x, n = _UP.multiply(x, x), n // 2
    return result


@lru_cache(4096)
def share_down(successes: int, trials: int, alpha: float) -> float:
    """Return the one-sided lower confidence bound of Clopper and Pearson for a probability, rounded down.

    The largest p at which as many successes or more have a probability of at most alpha: whatever the true probability is, the
    bound exceeds it with probability at most alpha. It is `BetaInv(alpha; k, n - k + 1)`, and `alpha^(1/n)` where k = n.

    Args:
        successes: k, 0 to n.
        trials: n, at least 1.
        alpha: in (0, 1).
    """
    low, high, limit = 0.0, successes / trials, Decimal(alpha)
    if successes == trials:
        high = down(1.0)
    while low < (middle := (low + high) / 2) < high:
        if binomial_tail_up(successes, trials, middle) <= limit:
            low = middle
        else:
            high = middle
    return low


def majority_p_value(first: int, second: int) -> Decimal:
    """Return the p-value of the two-sided test that two classes with these counts are equally likely, rounded up.

    Args:
        first: votes of the leading class.
        second: votes of the runner-up, at most as many.
    """
    return min(_UP.multiply(Decimal(2), binomial_tail_up(first, first + second, 0.5)), Decimal(1))


def wrong_radii_up(n: int, alpha: float, rho: float) -> int:
    """Return how many of n independent radii are wrong at most, but for a probability of rho, where each is with at most alpha.

    The quantile itself; closed forms by Bernstein's inequality lie above it, unless a factor in them is lost.

    Args:
        n: number of radii.
        alpha: in (0, 1), probability with which each may be wrong.
        rho: in (0, 1).
    """
    wrong = 0
    while wrong < n and binomial_tail_up(wrong + 1, n, alpha) > Decimal(rho):
        wrong += 1
    return wrong
