import math

import pytest
import torch
from torch import Tensor

from lipnext.auditing.lipschitz import estimate_lipschitz
from lipnext.core.bound import Estimate, LipschitzBound
from lipnext.core.errors import ConfigError, DataError, UnsoundError


@pytest.mark.parametrize(("rows", "columns"), [(16, 36), (36, 36), (64, 9)])
def test_a_linear_map_is_found_within_one_percent_and_never_above(rows: int, columns: int) -> None:
    side = math.isqrt(columns)
    weight = torch.randn(rows, columns)
    images = torch.rand(5, 1, side, side)
    estimate = estimate_lipschitz(lambda x: x.flatten(1) @ weight.T, images)
    norm = torch.linalg.matrix_norm(weight, ord=2).item()
    assert 0.99 * norm <= estimate.value <= norm * (1 + 1e-9)


def test_the_linf_norm_of_a_linear_map_is_its_largest_row_sum() -> None:
    weight = torch.randn(12, 16)
    estimate = estimate_lipschitz(lambda x: x.flatten(1) @ weight.T, torch.rand(8, 1, 4, 4), norm=math.inf)
    norm = weight.abs().sum(1).max().item()
    assert 0.99 * norm <= estimate.value <= norm * (1 + 1e-9)


def test_an_isometry_with_folds_stays_below_one() -> None:
    orthogonal = torch.linalg.qr(torch.randn(25, 25)).Q
    estimate = estimate_lipschitz(lambda x: (x.flatten(1) @ orthogonal.T).abs(), torch.rand(6, 1, 5, 5))
    assert 0.99 <= estimate.value <= 1 + 1e-9


def test_a_steep_place_away_from_the_images_is_found() -> None:
    """Slope 1 around the images, slope 3 from 0.8 on: the pair has to travel."""

    def ramp(x: Tensor) -> Tensor:
        return x + 2 * (x - 0.8).clamp_min(0)

    images = 0.5 * torch.rand(4, 1, 1, 2)
    estimate = estimate_lipschitz(ramp, images, steps=80)
    assert 2.5 <= estimate.value <= 3 * (1 + 1e-9)


def test_an_over_claimed_bound_is_exposed() -> None:
    weight = torch.linalg.qr(torch.randn(16, 16)).Q * 1.01
    claimed = LipschitzBound(value=1.0, norm=2.0, proof="isometry")
    assert estimate_lipschitz(lambda x: x.flatten(1) @ weight.T, torch.rand(3, 1, 4, 4)).value > claimed.value


def test_the_result_is_a_reproducible_estimate_that_says_how_it_was_obtained() -> None:
    images, calls = torch.rand(2, 1, 2, 2), list[int]()
    estimate = estimate_lipschitz(torch.sin, images, steps=5, progress=calls.append)
    assert isinstance(estimate, Estimate)
    assert estimate.method == "pair ascent, 8 pairs, 5 steps"
    assert sum(calls) == 5
    assert estimate_lipschitz(torch.sin, images, steps=5) == estimate
    assert estimate_lipschitz(torch.sin, images, steps=5, seed=1) != estimate


def test_a_constant_map_and_equal_images_give_zero() -> None:
    images = torch.full((3, 1, 2, 2), 0.5)
    assert estimate_lipschitz(lambda x: x * 0, images, steps=3).value == 0.0


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (torch.rand(2, 4, dtype=torch.float32), {}, DataError, "an estimate needs float64 images"),
        (torch.rand(0, 4, dtype=torch.float64), {}, DataError, r"n >= 1, got torch.float64 of \(0, 4\)"),
        (torch.rand(2, 4, dtype=torch.float64), {"steps": 0}, ConfigError, "steps must be at least 1, got 0"),
        (torch.rand(2, 4, dtype=torch.float64), {"norm": 1.0}, UnsoundError, "the norm must be 2.0 or inf"),
    ],
)
def test_bad_input_is_refused(
    images: Tensor, options: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        estimate_lipschitz(lambda x: x, images, **options)


def test_a_map_without_a_gradient_is_refused() -> None:
    with pytest.raises(ConfigError, match="the map has no gradient in the image"):
        estimate_lipschitz(lambda x: x.detach(), torch.rand(2, 4))
