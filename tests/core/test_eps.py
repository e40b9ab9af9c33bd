"""Perturbation sizes are exact, and printed bounds stay on their side."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipnext.core.eps import eps_label, parse_eps, parse_eps_list, round_down, round_up
from lipnext.core.errors import ConfigError, UnsoundError


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        ("36/255", Fraction(36, 255)),
        (" 0.1 ", Fraction(1, 10)),
        ("1e-3", Fraction(1, 1000)),
        (0.1, Fraction(0.1)),
        (1, Fraction(1)),
        (Fraction(1, 3), Fraction(1, 3)),
        ("10", Fraction(10)),
    ],
)
def test_parse_is_exact(value: str | int | float | Fraction, exact: Fraction) -> None:
    assert parse_eps(value) == exact


@given(st.integers(1, 2550))
def test_label_and_parse_round_trip(pixels: int) -> None:
    eps = Fraction(pixels, 255)
    assert parse_eps(eps_label(eps)) == eps


@pytest.mark.parametrize(
    "value", ["abc", "", "nan", "inf", math.nan, -math.inf, True, None, "1/0", "1/2/3", "1e999999999"]
)
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"eps must be a number such as 36/255 or 0\.5, got '"):
        parse_eps(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["0", 0, -1, "-36/255", 0.0, "0/7", "1e-999999999"])
def test_zero_and_below_are_refused(value: str | float) -> None:
    with pytest.raises(ConfigError, match="eps must be above 0, got '"):
        parse_eps(value)


@pytest.mark.parametrize(
    ("value", "advice"), [("36", "36/255"), (36.0, "36/255"), ("25.5", "1/10"), (Fraction(21, 2), "7/170")]
)
def test_eight_bit_units_are_recognised(value: str | float | Fraction, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"looks like 8-bit units, write {advice}$"):
        parse_eps(value)


def test_lists_keep_text_and_order() -> None:
    parsed = parse_eps_list("72/255, 36/255,0.5")
    assert list(parsed.items()) == [
        ("72/255", Fraction(72, 255)),
        ("36/255", Fraction(36, 255)),
        ("0.5", Fraction(1, 2)),
    ]
    assert parse_eps_list(("72/255", "36/255", "0.5")) == parsed


def test_lists_refuse_duplicates_and_nothing() -> None:
    with pytest.raises(ConfigError, match=r"eps 0\.5 is given twice \(1/2\); leave one out"):
        parse_eps_list("1/2,0.5")
    with pytest.raises(ConfigError, match="eps needs at least one value"):
        parse_eps_list([])
    with pytest.raises(ConfigError, match="got ''"):
        parse_eps_list("36/255,")


def test_labels() -> None:
    assert eps_label(Fraction(36, 255)) == "36/255"
    assert eps_label(Fraction(1, 3)) == "85/255"
    assert eps_label(Fraction(1, 7)) == "1/7"
    assert eps_label(Fraction(1)) == "1"
    assert eps_label(0.5) == "0.5"


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 12))
def test_printed_bounds_stay_on_their_side(x: float, digits: int) -> None:
    exact, low, high = Fraction(x), Fraction(round_down(x, digits)), Fraction(round_up(x, digits))
    assert exact - Fraction(1, 10**digits) < low <= exact <= high < exact + Fraction(1, 10**digits)


def test_printed_bounds_have_the_digits_asked_for() -> None:
    assert round_down(Fraction(8841, 10000), 4) == round_up(Fraction(8841, 10000), 4) == "0.8841"
    assert round_down(0.29999, 3) == "0.299"
    assert round_up(0.29901, 3) == "0.300"
    assert round_down(-0.0, 2) == "0.00"
    assert round_up(-0.001, 2) == "0.00"
    assert Fraction(round_down(1e308, 6)) <= Fraction(1e308)
    with pytest.raises(UnsoundError, match="nan is not finite"):
        round_down(math.nan, 3)
