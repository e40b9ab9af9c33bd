import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.auditing.exact import exact_norm_up, exact_within, lsb_budget, lsb_norms_up, lsb_squares
from lipnext.core.errors import ConfigError, DataError, UnsoundError

# Every scale that a float64 has, subnormal numbers included.
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=64)
PAIRS = st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=5)


def images_of(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))  # type: ignore[return-value]


def square(pairs: list[tuple[float, float]]) -> Fraction:
    return sum(((Fraction(b) - Fraction(a)) ** 2 for a, b in pairs), Fraction(0))


@settings(deadline=None)
@given(pairs=PAIRS, radius=st.floats(0, 1e300))
def test_within_against_fractions(pairs: list[tuple[float, float]], radius: float) -> None:
    image, other = images_of(pairs)
    assert exact_within(image, other, radius) == (square(pairs) <= Fraction(radius) ** 2)
    largest = max(abs(Fraction(b) - Fraction(a)) for a, b in pairs)
    assert exact_within(image, other, radius, math.inf) == (largest <= Fraction(radius))


@settings(deadline=None)
@given(pairs=PAIRS)
def test_the_norm_is_rounded_up_and_tight(pairs: list[tuple[float, float]]) -> None:
    image, other = images_of(pairs)
    for norm in (2.0, math.inf):
        above = exact_norm_up(image, other, norm)
        if above == math.inf:
            continue
        assert exact_within(image, other, above, norm)
        below = math.nextafter(math.nextafter(above, -math.inf), -math.inf)
        assert (
            below < 0 or not exact_within(image, other, math.nextafter(below, -math.inf), norm) or above == 0
        )


def test_one_unit_in_the_last_place_decides() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    other = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert exact_within(zero, other, 5.0)
    assert not exact_within(zero, other, math.nextafter(5.0, 0.0))
    assert exact_norm_up(zero, other) == 5.0
    # In float64 the square of the second pixel is lost beside the first.
    tiny = torch.tensor([1.0, 2.0**-600], dtype=torch.float64)
    assert torch.linalg.vector_norm(tiny) == 1.0
    assert not exact_within(zero, tiny, 1.0)
    assert exact_norm_up(zero, tiny) == math.nextafter(1.0, 2.0)


def test_float32_pixels_are_taken_as_they_are() -> None:
    image, other = torch.tensor([0.1], dtype=torch.float32), torch.tensor([0.3], dtype=torch.float32)
    exact = Fraction(other.item()) - Fraction(image.item())
    assert exact_within(image, other, float(exact))
    assert not exact_within(image, other, math.nextafter(float(exact), 0.0))


def test_equal_images_have_norm_zero() -> None:
    image = torch.rand(3, 4, 4)
    assert exact_norm_up(image, image) == 0.0
    assert exact_norm_up(image, image, math.inf) == 0.0
    assert exact_within(image, image, 0.0)


@pytest.mark.parametrize(
    ("eps", "budget"), [("36/255", 1296), ("72/255", 5184), ("108/255", 11664), ("1", 65025), (0.5, 16256)]
)
def test_the_budget_in_levels(eps: str | float, budget: int) -> None:
    assert lsb_budget(eps) == budget


@given(n=st.integers(1, 255 * 2))
def test_the_budget_is_the_largest_that_fits(n: int) -> None:
    eps = Fraction(n, 255) + Fraction(1, 10**6)
    budget = lsb_budget(eps)
    assert Fraction(budget) <= (255 * eps) ** 2 < budget + 1


def test_8_bit_perturbations_are_integers() -> None:
    noise = torch.Generator().manual_seed(0)
    images, others = torch.randint(0, 256, (2, 20, 1, 4, 4), generator=noise).to(torch.uint8)
    squares = lsb_squares(images, others)
    norms = lsb_norms_up(images, others)
    for image, other, total, norm in zip(
        images.tolist(), others.tolist(), squares.tolist(), norms.tolist(), strict=True
    ):
        flat = [
            (b - a) ** 2 for x, y in zip(image[0], other[0], strict=True) for a, b in zip(x, y, strict=True)
        ]
        assert total == sum(flat)
        assert Fraction(norm) ** 2 * 255**2 >= total
        assert Fraction(math.nextafter(math.nextafter(norm, 0), 0)) ** 2 * 255**2 < total
    # 36 levels in one pixel are the whole budget of 36/255; the float norm of 36/255 as float32 pixels is not.
    image, other = torch.zeros(1, 4, dtype=torch.uint8), torch.tensor([[36, 0, 0, 0]], dtype=torch.uint8)
    assert int(lsb_squares(image, other)) == lsb_budget("36/255")


def test_bad_input_is_refused() -> None:
    image = torch.rand(2, 2)
    with pytest.raises(DataError, match="one shape and type are needed"):
        exact_within(image, image.float(), 1.0)
    with pytest.raises(DataError, match="an exact norm needs finite images"):
        exact_norm_up(image, image * math.nan)
    for radius in (-1.0, math.nan, math.inf):
        with pytest.raises(DataError, match="a radius must be finite and at least 0"):
            exact_within(image, image, radius)
    with pytest.raises(UnsoundError, match=r"the norm must be 2\.0 or inf"):
        exact_within(image, image, 1.0, 1.0)
    with pytest.raises(DataError, match="8-bit images of one shape are needed"):
        lsb_squares(image, image)
    with pytest.raises(ConfigError, match="looks like 8-bit units"):
        lsb_budget(36)
