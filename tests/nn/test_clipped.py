"""Clipped activations against loops over single numbers, and what the local bound assumes of them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.clipped import Clipped, ClippedMaxMin, ClippedReLU
from lipnext.nn.reshape import Flatten

SHAPE = (4, 2, 3)
BOTH = {"relu": ClippedReLU, "maxmin": ClippedMaxMin}
both = pytest.mark.parametrize("name", BOTH)


def _layer(name: str, seed: int) -> Clipped:
    """Limits of either sign, also in the wrong order."""
    layer, g = BOTH[name](SHAPE), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return layer


def _slow(layer: Clipped, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for b, c, i, j in itertools.product(*map(range, x.shape)):
        if isinstance(layer, ClippedReLU):
            y[b, c, i, j] = min(max(x[b, c, i, j].item(), 0.0), layer.threshold[c, i, j].item())
        elif c < 2:
            first, second = x[b, c, i, j].item(), x[b, c + 2, i, j].item()
            y[b, c, i, j] = min(max(first, second), layer.ceiling[c, i, j].item())
            y[b, c + 2, i, j] = max(min(first, second), layer.floor[c, i, j].item())
    return y


@both
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_both_against_loops_over_numbers(name: str, seed: int) -> None:
    layer = _layer(name, seed)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed + 1))
    assert torch.equal(layer(x), _slow(layer, x))


def test_the_reference_vector_of_clipped_max_min() -> None:
    layer = ClippedMaxMin((4,), 0.5, -0.5)
    y = layer(torch.tensor([[0.7, -0.2, 0.3, -0.9]]))
    torch.testing.assert_close(y, torch.tensor([[0.5, -0.2, 0.3, -0.5]]))


@both
@given(seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_a_box_is_mapped_to_a_box_and_equal_corners_mean_a_constant(name: str, seed: int) -> None:
    layer, g = _layer(name, seed), torch.Generator().manual_seed(seed)
    lower = torch.randn(1, *SHAPE, generator=g)
    upper = lower + torch.rand(1, *SHAPE, generator=g)
    inside = lower + (upper - lower) * torch.rand(50, *SHAPE, generator=g)
    values, low, high = layer(inside), layer(lower), layer(upper)
    assert (low <= values).all()
    assert (values <= high).all()
    # What feeds constant outputs alone does not matter, and nothing moves further than it was moved.
    matters = layer.feeds(low < high)
    assert matters.shape == lower.shape
    moved, outputs = inside[:25] - inside[25:], values[:25] - values[25:]
    lengths = (matters * moved).flatten(1).norm(dim=1)
    assert (outputs.flatten(1).norm(dim=1) <= lengths * (1 + 1e-12)).all()


@both
def test_an_input_matters_where_one_of_its_outputs_varies(name: str) -> None:
    layer = BOTH[name](SHAPE)
    varying = torch.zeros(1, *SHAPE, dtype=torch.bool)
    varying[0, 1, 0, 0] = True
    expected = {"relu": [[1, 0, 0]], "maxmin": [[1, 0, 0], [3, 0, 0]]}[name]
    assert layer.feeds(varying)[0].nonzero().tolist() == expected
    assert torch.equal(Flatten().feeds(varying.flatten(1)).view_as(varying), varying)


@both
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_the_norm_of_the_result_is_covered_for_limits_of_either_sign(name: str, seed: int) -> None:
    layer = _layer(name, seed)
    x = 1e-3 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed))
    unit = UNIT_ROUNDOFF[torch.float64]
    state = layer.rounding(RoundingState(norm=x.norm().item() * (1 + 1e-12), error=0.5, unit=unit))
    assert layer(x).norm().item() <= state.norm
    assert state.error == 0.5
    assert layer.lipschitz_bound().value == 1.0


def test_a_threshold_below_zero_makes_a_constant_that_can_come_back() -> None:
    layer = ClippedReLU((2,), -0.25)
    x = torch.tensor([[3.0, -3.0]])
    assert layer(x).tolist() == [[-0.25, -0.25]]
    layer(x).sum().backward()
    assert layer.threshold.grad is not None
    assert layer.threshold.grad.tolist() == [1.0, 1.0]


def test_openness_counts_how_far_boxes_reach_into_where_units_vary() -> None:
    lower, upper = torch.tensor([[-1.0, 0.5]]), torch.tensor([[-0.5, 2.0]])
    relu = ClippedReLU((2,), 1.0)
    assert relu.openness(lower, upper).item() == pytest.approx((0 + 2.0) / 2 + 0.1 * (2.0 + 0.5) / 2)
    # the maximum is at least 0.5, half a unit below the ceiling; the minimum at most -0.5, half a unit above the floor
    pair = ClippedMaxMin((2,), 1.0, -1.0)
    assert pair.openness(lower, upper).item() == pytest.approx(0.5 + 0.5)
