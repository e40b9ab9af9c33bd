"""Binomial tails from above and what follows from them, against rationals, scipy and the published numbers."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lipnext.bounds.binomial import binomial_tail_up, majority_p_value, share_down, wrong_radii_up
from lipnext.bounds.normal import normal_quantile_down


def tail(k: int, n: int, p: float) -> Fraction:
    """The slow obvious way: P[Bin(n, p) >= k] in rationals."""
    p = Fraction(p)
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)), start=Fraction(0))


@settings(max_examples=40)
@given(st.data())
def test_the_tail_is_bounded_from_above_and_closely(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    k, p = data.draw(st.integers(0, n)), data.draw(st.floats(0, 1, exclude_max=True, allow_subnormal=False))
    bound, true = Fraction(binomial_tail_up(k, n, p)), tail(k, n, p)
    assert true <= bound <= true * (1 + Fraction(1, 10**25))


@settings(max_examples=40)
@given(st.data())
def test_the_lower_bound_holds_and_the_next_larger_float_does_not(data: st.DataObject) -> None:
    n, alpha = data.draw(st.integers(1, 30)), data.draw(st.sampled_from([0.5, 0.1, 0.001, 1e-9]))
    k = data.draw(st.integers(1, n))
    low = share_down(k, n, alpha)
    assert tail(k, n, low) <= Fraction(alpha)
    assert tail(k, n, math.nextafter(math.nextafter(low, 1), 1)) > Fraction(alpha) * (1 - Fraction(1, 10**20))
    assert low == pytest.approx(stats.beta.ppf(alpha, k, n - k + 1), rel=1e-9)


def test_no_success_proves_nothing() -> None:
    assert share_down(0, 50, 0.001) == 0.0


VECTORS = [
    (99, 100, 0.9113731113, 0.33731476),
    (100, 100, 0.9332543008, 0.37511876),
    (990, 1000, 0.9760361872, 0.49450240),
    (1000, 1000, 0.9931160484, 0.61581565),
    (10_000, 10_000, 0.9993094630, 0.79964438),
    (99_000, 100_000, 0.9889893404, 0.57249999),
    (99_900, 100_000, 0.9986509924, 0.75005025),
    (100_000, 100_000, 0.9999309248, 0.95286414),
]


@pytest.mark.parametrize(("k", "n", "share", "radius"), VECTORS)
def test_shares_and_radii_are_the_published_ones(k: int, n: int, share: float, radius: float) -> None:
    found = share_down(k, n, 0.001)
    assert found == pytest.approx(share, abs=1e-9)
    assert 0.25 * normal_quantile_down(found) == pytest.approx(radius, abs=1e-8)
    assert (k < n) or found == pytest.approx(0.001 ** (1 / n), rel=1e-12)


@pytest.mark.slow
def test_near_one_half_a_hundred_thousand_votes_decide_or_do_not() -> None:
    share = share_down(51_000, 100_000, 0.001)
    assert share == pytest.approx(0.5051093492, abs=1e-9)
    assert 0.25 * normal_quantile_down(share) == pytest.approx(0.00320190, abs=1e-8)
    assert share_down(50_300, 100_000, 0.001) == pytest.approx(0.4981089296, abs=1e-9)


@pytest.mark.parametrize(
    ("first", "n", "p"),
    [(60, 100, 0.05688793), (67, 100, 0.00087374), (10, 10, 0.00195313), (11, 11, 0.00097656)],
)
def test_majorities_have_the_published_p_values(first: int, n: int, p: float) -> None:
    found = float(majority_p_value(first, n - first))
    assert found == pytest.approx(p, abs=1e-6)
    assert found == pytest.approx(stats.binomtest(first, n, 0.5).pvalue, rel=1e-12)


def test_even_votes_decide_nothing() -> None:
    assert majority_p_value(5, 5) == 1
    assert majority_p_value(0, 0) == 1


@pytest.mark.parametrize(
    ("n", "alpha", "rho"), [(500, 0.001, 0.001), (10_000, 0.001, 0.01), (7, 0.3, 0.5), (1, 0.9, 0.05)]
)
def test_wrong_radii_are_the_quantile(n: int, alpha: float, rho: float) -> None:
    most = wrong_radii_up(n, alpha, rho)
    assert most == stats.binom.ppf(1 - rho, n, alpha)
    assert most == n or binomial_tail_up(most + 1, n, alpha) <= Decimal(rho)


def closed_form(n: int, alpha: float, rho: float) -> float:
    """The closed form that is usually given for the share of wrong radii."""
    log = math.log(1 / rho)
    return alpha + math.sqrt(alpha * (1 - alpha) * log / n) + log / (3 * n)


def test_the_usual_closed_form_is_loose_for_few_images_and_too_small_for_many() -> None:
    assert 0.6 - closed_form(500, 0.001, 0.001) == pytest.approx(0.59067978, abs=1e-6)
    assert wrong_radii_up(500, 0.001, 0.001) / 500 < closed_form(500, 0.001, 0.001)
    # It lacks a factor sqrt(2), which Bernstein's inequality has.
    n, most = 10**5, 10**5 * closed_form(10**5, 0.001, 0.001)
    assert wrong_radii_up(n, 0.001, 0.001) == stats.binom.ppf(0.999, n, 0.001) == 132
    assert most < 129
    assert stats.binom.sf(math.floor(most), n, 0.001) > 0.002
