"""The maximum over ball and box against the published loop, against feasible points, and in exact arithmetic."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.bounds.ball_box import ball_box_bound, ball_box_maximum


def clip_and_rescale(form: Tensor, radius: float, lower: Tensor, upper: Tensor) -> float:
    """The published loop: clip what leaves the box, rescale the rest to the ball, until nothing changes."""
    v = radius * form / form.norm()
    fixed = torch.zeros(len(form), dtype=torch.bool)
    for _ in range(len(form) + 1):
        fixed = fixed | (v < lower) | (v > upper)
        v = torch.where(fixed, v.clamp(lower, upper), v)
        left = max(radius**2 - v[fixed].square().sum().item(), 0.0)
        rest = v[~fixed].norm()
        if rest > 0:
            v = torch.where(fixed, v, v * left**0.5 / rest)
    return (form @ v.clamp(lower, upper)).item()


def _problem(seed: int, n: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    form, radius = torch.randn(n, generator=g), 2 * torch.rand((), generator=g)
    lower, upper = -torch.rand(n, generator=g), torch.rand(n, generator=g)
    lower[0] = upper[0] = 0.0
    return form, radius, lower, upper


@given(st.integers(0, 10**6))
@settings(max_examples=25)
def test_it_is_the_maximum_that_the_published_loop_approaches(seed: int) -> None:
    form, radius, lower, upper = _problem(seed)
    expected = clip_and_rescale(form, radius.item(), lower, upper)
    bound = ball_box_bound(form, radius, lower, upper).item()
    assert abs(bound - expected) <= 1e-6
    assert abs(ball_box_maximum(form, radius, lower, upper, steps=40).item() - expected) <= 1e-6
    assert bound <= (radius * form.norm()).item() * (1 + 1e-12)


@given(st.integers(0, 10**6), st.integers(0, 8))
@settings(max_examples=25)
def test_no_feasible_point_is_above_the_bound_however_badly_it_was_bisected(seed: int, steps: int) -> None:
    form, radius, lower, upper = _problem(seed)
    bound = ball_box_bound(form, radius, lower, upper, steps=steps)
    g = torch.Generator().manual_seed(seed + 1)
    points = lower + (upper - lower) * torch.rand(500, len(form), generator=g)
    points = points[points.norm(dim=1) <= radius]
    assert (points @ form <= bound + 1e-12).all()
    assert bound >= clip_and_rescale(form, radius.item(), lower, upper) - 1e-12


def test_the_bound_is_not_below_the_exact_maximum() -> None:
    # The maximum is R |d|, its square exact in rationals; the box does not bind.
    for k in range(1, 60):
        form = torch.tensor([3.0, 4.0]) * k / 7
        exact = sum(Fraction(v) ** 2 for v in form.tolist()) / 4
        bound = Fraction(ball_box_bound(form, torch.tensor(0.5), -torch.ones(2), torch.ones(2)).item())
        assert exact <= bound**2 <= exact * (1 + Fraction(1, 10**11))


def test_a_box_inside_of_the_ball_is_filled() -> None:
    form, lower, upper = torch.tensor([1.0, -2.0, 0.5]), -torch.ones(3), torch.ones(3)
    bound = ball_box_bound(form, torch.tensor(10.0), lower, upper).item()
    assert 3.5 <= bound <= 3.5 + 1e-10


def test_nothing_moves_in_an_empty_ball_and_nan_is_kept() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert abs(ball_box_bound(ones, torch.tensor(0.0), zeros, zeros).item()) < 1e-200
    assert ball_box_bound(ones, torch.tensor(torch.nan), -ones, ones).isnan()
    assert ball_box_bound(ones, torch.tensor(1.0), -ones, ones * torch.nan).isnan()


def test_gradients_are_those_of_the_maximum() -> None:
    arguments = list(_problem(3))
    inputs = [t.clone().requires_grad_() for t in arguments]
    gradients = torch.autograd.grad(ball_box_maximum(*inputs, steps=50), inputs)
    compared = 0
    for k, value in enumerate(arguments):
        for index in range(value.numel()):
            if k >= 2 and index == 0:
                continue  # that side of the box is a point, and moving one end would turn it around
            ends = []
            for step in (1e-5, -1e-5):
                moved = [t.clone() for t in arguments]
                moved[k].view(-1)[index] += step
                ends.append(ball_box_maximum(*moved, steps=50).item())
            assert abs((ends[0] - ends[1]) / 2e-5 - gradients[k].reshape(-1)[index].item()) < 1e-4
            compared += 1
    assert compared == 6 + 1 + 5 + 5
