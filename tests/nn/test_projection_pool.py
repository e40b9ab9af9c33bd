"""Pools of pairs of channels against distances measured point by point."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.projection_pool import PairMax, ProjectionPool


def pool(t: float) -> ProjectionPool:
    layer = ProjectionPool(2)
    with torch.no_grad():
        layer.angle.fill_(t)
    return layer.requires_grad_(False)


def distance(x: float, y: float, t: float) -> float:
    """Distance to the nearer edge of the cone, negative inside."""
    edges = [(math.cos(t / 2), s * math.sin(t / 2)) for s in (1, -1)]
    apart = min(math.hypot(x - max(x * a + y * b, 0) * a, y - max(x * a + y * b, 0) * b) for a, b in edges)
    return -apart if abs(math.atan2(y, x)) < t / 2 else apart


@given(t=st.floats(0, math.pi), x=st.floats(-3, 3), y=st.floats(-3, 3))
def test_it_is_the_signed_distance_to_a_cone(t: float, x: float, y: float) -> None:
    got = pool(t)(torch.tensor([x, y]).view(1, 2, 1, 1)).item()
    assert got == pytest.approx(distance(x, y, t), abs=1e-13)


@given(t=st.floats(-1, 4))
def test_two_points_are_never_driven_apart_across_a_ray_either(t: float) -> None:
    layer, f = pool(t), torch.linspace(0, 2 * math.pi, 400)
    ring = torch.stack([f.cos(), f.sin()], dim=1).view(-1, 2, 1, 1)
    step = (layer(ring[1:]) - layer(ring[:-1])).flatten().abs() / (ring[1:] - ring[:-1]).flatten(1).norm(
        dim=1
    )
    assert step.max() <= layer.lipschitz_bound().value + 1e-10


def test_the_maximum_of_pairs_is_that_of_the_two_halves() -> None:
    images = torch.randn(3, 4, 2, 2)
    assert torch.equal(PairMax()(images), torch.maximum(images[:, :2], images[:, 2:]))
    assert PairMax().lipschitz_bound().value == 1.0
    state = RoundingState(norm=1.0, error=0.1, unit=2.0**-53)
    assert PairMax().rounding(state) == state


def test_gradients_reach_every_angle_and_exist_at_zero() -> None:
    layer = ProjectionPool(8)
    images = torch.randn(64, 8, 3, 3)
    images[0] = 0.0
    images.requires_grad_()
    layer(images).sum().backward()
    assert layer.angle.grad is not None
    assert (layer.angle.grad != 0).all()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@torch.no_grad()
def test_float32_next_to_the_rays_stays_within_the_propagated_error() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = ProjectionPool(2000, generator=generator).float()
    t = layer.angle.double()
    rays = torch.stack([(math.pi + t) / 2, (3 * math.pi - t) / 2, torch.zeros_like(t)])
    near = rays[torch.arange(1000) % 3, torch.arange(1000)] + 1e-7 * torch.randn(
        64, 1000, generator=generator
    )
    images = torch.cat([near.cos(), near.sin()], dim=1)[:, :, None, None].float()
    exact, unit = layer.double()(images.double()), UNIT_ROUNDOFF[torch.float32]
    error = (layer.float()(images).double() - exact).abs().max().item() / unit
    assert 0.5 < error <= 512
    state = layer.rounding(RoundingState(norm=2.0, error=0.5, unit=unit))
    assert state.error == pytest.approx(0.5 + 512 * unit * 2.5, rel=1e-6)
