"""Directed rounding against exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import (
    UNIT_ROUNDOFF,
    RoundingState,
    add_up,
    div_down,
    down,
    fraction_down,
    fraction_up,
    gamma,
    mul_up,
    sqrt_up,
    sum_up,
    up,
)

floats = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e150, max_value=1e150)
positive = st.floats(min_value=0, max_value=1e150)


def assert_smallest_above(rounded: float, exact: Fraction) -> None:
    assert Fraction(rounded) >= exact
    assert Fraction(down(rounded)) < exact


@given(floats, floats)
def test_sums_and_products_are_the_smallest_floats_above(a: float, b: float) -> None:
    assert_smallest_above(add_up(a, b), Fraction(a) + Fraction(b))
    assert_smallest_above(mul_up(a, b), Fraction(a) * Fraction(b))


@given(floats, floats.filter(bool))
def test_quotient_is_the_largest_float_below(a: float, b: float) -> None:
    exact = Fraction(a) / Fraction(b)
    rounded = div_down(a, b)
    assert rounded == -math.inf or Fraction(rounded) <= exact
    assert up(rounded) == math.inf or Fraction(up(rounded)) > exact


@given(positive)
def test_square_root_is_above_and_within_one_step(x: float) -> None:
    root = sqrt_up(x)
    assert Fraction(root) ** 2 >= Fraction(x)
    assert root == 0 or Fraction(down(root)) ** 2 < Fraction(x)


@given(st.lists(floats))
def test_sum_is_above_the_exact_sum(values: list[float]) -> None:
    assert Fraction(sum_up(values)) >= sum(map(Fraction, values), Fraction(0))


@given(st.fractions(min_value=-100, max_value=100))
def test_fractions_are_enclosed_by_neighbours(x: Fraction) -> None:
    low, high = fraction_down(x), fraction_up(x)
    assert Fraction(low) <= x <= Fraction(high)
    assert high in (low, up(low))


def test_factors_of_one_cost_nothing_and_underflow_is_kept() -> None:
    assert mul_up(1.0, 1.0) == 1.0
    assert mul_up(1e-300, 1e-300) == 5e-324


def test_overflow_goes_to_the_safe_side() -> None:
    largest = math.nextafter(math.inf, 0)
    assert mul_up(largest, 2.0) == math.inf
    assert mul_up(largest, -2.0) == -largest
    assert div_down(largest, 0.5) == largest
    assert add_up(math.inf, 1.0) == math.inf
    assert math.isnan(mul_up(math.nan, 1.0))


def test_unit_roundoff_is_half_the_machine_epsilon() -> None:
    for dtype, unit in UNIT_ROUNDOFF.items():
        assert unit == torch.finfo(dtype).eps / 2


@given(st.integers(0, 2**20), st.sampled_from(list(UNIT_ROUNDOFF.values())))
def test_gamma_is_rounded_up(n: int, u: float) -> None:
    exact = n * Fraction(u) / (1 - n * Fraction(u))
    assert exact <= Fraction(gamma(n, u)) <= exact * (1 + Fraction(1, 2**52))


def test_gamma_refuses_what_has_no_bound() -> None:
    with pytest.raises(
        UnsoundError, match="n u = 1 is not below 1, no error bound for 16777216 terms; use float64"
    ):
        gamma(2**24, 2.0**-24)
    with pytest.raises(UnsoundError, match="n must not be negative, got -1"):
        gamma(-1, 2.0**-53)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["norm", "error", "unit"])
def test_rounding_state_refuses_unusable_numbers(name: str, bad: float) -> None:
    with pytest.raises(UnsoundError, match=f"{name} must be finite and not negative, got"):
        RoundingState(**({"norm": 1.0, "error": 0.0, "unit": 2.0**-53} | {name: bad}))


def test_rounding_state_refuses_what_may_overflow_and_other_arithmetics() -> None:
    assert RoundingState(norm=1e13, error=0.0, unit=2.0**-24).underflow == 2.0**-46
    with pytest.raises(
        UnsoundError, match=r"norm 1e\+14 with error 0 may overflow; check the weights, or use"
    ):
        RoundingState(norm=1e14, error=0.0, unit=2.0**-24)
    assert RoundingState(norm=1e14, error=0.0, unit=2.0**-53).norm == 1e14
    with pytest.raises(UnsoundError, match=r"unit must be that of float64 or float32, got 0\.001"):
        RoundingState(norm=1.0, error=0.0, unit=0.001)


def test_underflow_is_covered_for_every_size_of_layer() -> None:
    for dtype, unit in UNIT_ROUNDOFF.items():
        state = RoundingState(norm=1.0, error=0.0, unit=unit)
        lost = Fraction(torch.finfo(dtype).smallest_normal) * Fraction(unit)  # half the smallest subnormal
        assert Fraction(state.underflow) ** 2 >= lost * 2**56
