"""The normal distribution function is enclosed, its quantile is low, and the cells of the grid have their masses."""

import math
from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from lipnext.bounds.normal import cell_masses, normal_cdf, normal_quantile_down


def exact(x: float) -> Decimal:
    """Phi(x) by arb, to some 80 digits."""
    flint = pytest.importorskip("flint", reason="python-flint is not installed (extra: verify)")
    with flint.ctx.workprec(400):
        half = (flint.arb(x) / flint.arb(2).sqrt()).erf() / 2
        return Decimal((half + flint.arb(1) / 2).mid().str(80, radius=False))


@given(st.floats(-12, 12))
def test_the_enclosure_holds_the_distribution_function(x: float) -> None:
    with localcontext() as context:
        context.prec = 90
        low, high = normal_cdf(x)
        assert low <= exact(x) <= high
        assert high - low <= Decimal("1e-39")
    assert float(low) == pytest.approx(special.ndtr(x), rel=1e-13, abs=1e-39)


@pytest.mark.parametrize("x", [math.nan, math.inf, -41.0])
def test_what_is_outside_of_the_series_is_refused(x: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[-40, 40\]"):
        normal_cdf(x)


@given(st.floats(0.5, 1, exclude_min=True, exclude_max=True))
def test_the_quantile_is_low_and_near(p: float) -> None:
    found = normal_quantile_down(p)
    assert normal_cdf(found)[1] <= Decimal(p)
    assert found <= stats.norm.ppf(p) + 1e-12
    assert found == pytest.approx(stats.norm.ppf(p), abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("p", [0.5, 1.0, 0.2, math.nan])
def test_only_majorities_have_a_radius(p: float) -> None:
    with pytest.raises(ValueError, match="between 1/2 and 1"):
        normal_quantile_down(p)


def test_cells_have_the_mass_between_their_borders() -> None:
    masses = cell_masses(1024, 8191)
    with localcontext() as context:
        context.prec = 50
        for n in (0, 1, 2, 77, 1023, 1024, 4000, 8191):
            # Both ends are multiples of 2^-11: exact as floats.
            upper, lower = normal_cdf((n + 0.5) / 1024), normal_cdf((n - 0.5) / 1024)
            assert (
                upper[0] - lower[1] - Decimal("1e-35") <= masses[n] <= upper[1] - lower[0] + Decimal("1e-35")
            )
        assert abs(masses[0] + 2 * sum(masses[1:]) + 2 * normal_cdf(-8191.5 / 1024)[0] - 1) < Decimal("1e-35")


@pytest.mark.parametrize(("levels", "largest"), [(512, 10), (1024, 50_000)])
def test_cells_too_wide_or_too_far_are_refused(levels: int, largest: int) -> None:
    with pytest.raises(ValueError, match="at least 1024"):
        cell_masses(levels, largest)
