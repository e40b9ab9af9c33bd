"""Householder activations against polar coordinates, pair by pair."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.activation import MaxMin
from lipnext.nn.householder import Householder, Householder2

angle = st.floats(0.0, 2 * math.pi)
LAYERS = {1: Householder(2), 2: Householder2(2)}


def first(t: float) -> Householder:
    layer = Householder(2)
    with torch.no_grad():
        layer.angle.fill_(t)
    return layer.requires_grad_(False)


def second(t0: float, t1: float, t2: float) -> Householder2:
    layer = Householder2(2)
    with torch.no_grad():
        layer.angles.copy_(torch.tensor([[t0], [t1], [t2]]))
    return layer.requires_grad_(False)


def image(x: float, y: float) -> Tensor:
    return torch.tensor([x, y]).view(1, 2, 1, 1)


def polar_reference(x: float, y: float, t0: float, t1: float, t2: float) -> tuple[float, float]:
    """Order 2 as maps of the polar angle alone."""
    length, polar = math.hypot(x, y), math.atan2(y, x)
    f = (polar - t0 / 2) % (2 * math.pi)
    if f < t1 / 2:
        new = polar
    elif f < (t1 + t2) / 2:
        new = t0 + t1 - polar
    elif f < math.pi + t2 / 2:
        new = polar - t2
    else:
        new = t0 - polar
    return length * math.cos(new), length * math.sin(new)


@given(t=st.floats(-10, 10), x=st.floats(-3, 3), y=st.floats(-3, 3))
def test_order_one_reflects_one_side_of_a_line(t: float, x: float, y: float) -> None:
    a, b = first(t)(image(x, y)).flatten().tolist()
    n = (math.sin(t / 2), -math.cos(t / 2))
    depth = max(n[0] * x + n[1] * y, 0.0)
    assert (a, b) == pytest.approx((x - 2 * depth * n[0], y - 2 * depth * n[1]), abs=1e-14)


def test_order_one_starts_by_sorting_each_pair() -> None:
    images = torch.randn(4, 6, 3, 3)
    largest, smallest = MaxMin()(images).chunk(2, dim=1)
    got = Householder(6)(images)
    torch.testing.assert_close(got, torch.cat([smallest, largest], dim=1), rtol=0, atol=1e-14)


@given(t0=angle, t1=angle, t2=angle, x=st.floats(-3, 3), y=st.floats(-3, 3))
def test_order_two_is_an_isometry_in_each_of_four_sectors(
    t0: float, t1: float, t2: float, x: float, y: float
) -> None:
    got = second(t0, t1, t2)(image(x, y)).flatten().tolist()
    assert got == pytest.approx(polar_reference(x, y, t0, t1, t2), abs=1e-13)


@pytest.mark.parametrize("order", [1, 2])
@given(data=st.data())
def test_two_points_are_never_driven_apart_across_a_ray_either(order: int, data: st.DataObject) -> None:
    angles = [data.draw(angle) for _ in range(2 * order - 1)]
    layer: LipschitzModule = first(*angles) if order == 1 else second(*angles)
    f = torch.linspace(0, 2 * math.pi, 400)
    ring = torch.stack([f.cos(), f.sin()], dim=1).view(-1, 2, 1, 1)
    moved = layer(ring).flatten(1)
    ring = ring.flatten(1)
    assert (torch.cdist(moved, moved) <= torch.cdist(ring, ring) + 1e-7).all()  # cdist cancels near 0
    step = (moved[1:] - moved[:-1]).norm(dim=1) / (ring[1:] - ring[:-1]).norm(dim=1)
    assert step.max() <= layer.lipschitz_bound().value + 1e-10


def test_a_sector_that_is_off_is_noticed() -> None:
    wrong = [polar_reference(math.cos(f), math.sin(f), 0.4, 1.1, 2.0 + 0.3 * (f > 2)) for f in (1.999, 2.001)]
    assert math.dist(*wrong) > 0.1


def test_angles_are_clamped_and_nothing_falls_between_the_sectors() -> None:
    images = torch.randn(5, 2, 2, 2)
    assert torch.equal(second(-1.0, 9.0, 7.0)(images), second(0.0, 2 * math.pi, 2 * math.pi)(images))
    # just below the axis the polar angle is rounded to 2 pi
    for x, y in ((1.0, -1e-30), (1.0, -0.0), (0.0, 0.0)):
        got = second(0.0, 1.0, 1.0)(image(x, y)).flatten().tolist()
        assert got == pytest.approx((x, 0.0), abs=1e-15)


@pytest.mark.parametrize("layer", [Householder(8), Householder2(8)])
def test_gradients_reach_every_angle(layer: LipschitzModule) -> None:
    weights = torch.randn(64, 8, 4, 4)
    (layer(torch.randn(64, 8, 4, 4)) * weights).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


@torch.no_grad()
@pytest.mark.parametrize("order", [1, 2])
def test_float32_next_to_the_rays_stays_within_the_propagated_error(order: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = (Householder(2000) if order == 1 else Householder2(2000, generator=generator)).float()
    rays = 4 * math.pi * torch.rand(1000, generator=generator)
    if order == 1:
        layer.angle.copy_(rays)
        rays = layer.angle.double() / 2
    else:
        t0, t1, t2 = layer.angles.double()
        ends = torch.stack([t1 / 2, (t1 + t2) / 2, math.pi + t2 / 2, torch.zeros_like(t1)])
        rays = t0 / 2 + ends[torch.arange(1000) % 4, torch.arange(1000)]
    near = rays + 1e-7 * torch.randn(64, 1000, generator=generator)
    images = torch.cat([near.cos(), near.sin()], dim=1)[:, :, None, None].float()
    unit = UNIT_ROUNDOFF[torch.float32]
    exact = layer.double()(images.double())
    computed = layer.float()(images).double()
    norms = images.double().view(64, 2, 1000).norm(dim=1)
    error = (computed - exact).view(64, 2, 1000).norm(dim=1)
    units = (error / norms / unit).max().item()
    assert 0.5 < units <= (64 if order == 1 else 512)
    state = layer.rounding(RoundingState(norm=2.0, error=0.5, unit=unit))
    assert state.error == pytest.approx(0.5 + (64 if order == 1 else 512) * unit * 2.5, rel=1e-6)
    assert state.norm == 2.0
