import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipnext.optim.schedule import (
    geometric,
    growing_exponent,
    linear_ramp,
    share_of,
    smooth_ramp,
    warmup_cosine,
)


def test_warmup_cosine_by_hand():
    values = [warmup_cosine(step, 12, 1 / 6, 0.1) for step in range(12)]
    assert values[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert values[7] == pytest.approx(0.1 + 0.9 / 2)  # half way down
    assert values[11] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.9)) / 2)
    assert warmup_cosine(12, 12, 1 / 6, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(500, 12, 1 / 6, 0.1) == pytest.approx(0.1)


@given(total=st.integers(1, 200), warmup=st.floats(0, 0.99), final=st.floats(0, 1))
def test_warmup_cosine_rises_then_falls_between_zero_and_one(total, warmup, final):
    values = [warmup_cosine(step, total, warmup, final) for step in range(total)]
    assert all(0 < v <= 1 or (v == 0 == final) for v in values)
    peak = next((k for k in range(total) if k >= warmup * total), total)
    assert values[:peak] == sorted(values[:peak])
    # cosines of neighbouring steps may coincide to rounding
    assert all(a >= b - 1e-15 for a, b in zip(values[peak:], values[peak + 1 :], strict=False))
    assert all(v >= final - 1e-15 for v in values[peak:])


@pytest.mark.parametrize(
    ("progress", "value"), [(0.0, 0.1), (0.25, 1.55), (0.5, 3.0), (0.75, 3.0), (1.0, 3.0)]
)
def test_the_radius_ramp_of_the_recipe(progress, value):
    assert linear_ramp(progress, 0.1, 3.0, 0.5) == pytest.approx(value)


def test_a_ramp_without_length_is_at_its_end():
    assert linear_ramp(0.0, 0.1, 3.0, 0.0) == 3.0
    assert linear_ramp(0.5, 2.0, 1.0, 1.0) == 1.5


@pytest.mark.parametrize(
    ("epoch", "exponent", "weight"),
    [
        (200, 8, 1),
        (290, 9.3695, 0.86009),
        (900, 27.3432, 0.30968),
        (1575, 89.4427, None),
        (2000, 188.6309, 0.04908),
        (2940, 982.5957, 0.01017),
        (2950, math.inf, 0.01),
    ],
)
def test_exponents_and_weights_of_the_reference_vector(epoch, exponent, weight):
    share = share_of(epoch, 200, 2950)
    assert growing_exponent(share, 8.0, 1000.0) == pytest.approx(exponent, rel=1e-5)
    if weight is not None:
        assert geometric(share, 1.0, 0.01) == pytest.approx(weight, abs=5e-6)


def test_a_share_stays_within_zero_and_one():
    assert [share_of(t, 0.2, 0.6) for t in (0, 0.2, 0.4, 0.6, 1)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_the_smooth_ramp_of_the_reference_vector():
    expected = {0.1: 0.000558, 0.2: 0.008929, 0.4: 0.142857, 0.5: 0.285714, 0.75: 0.642857, 1: 1}
    for progress, value in expected.items():
        assert smooth_ramp(progress) == pytest.approx(value, abs=5e-7)
