"""CPL's layer: its step, its power iteration, and what a norm that is too small does."""

import pytest
import torch
from helpers import jacobian, rotations, spectral_norm
from torch.nn import functional

from lipnext.nn.convex_potential import EPSILON, ConvexPotential
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.power_iteration import estimate_dense_norm


def layer_of(weight: torch.Tensor, bias: float = 0.0) -> ConvexPotential:
    layer = ConvexPotential(Dense(weight.shape[1], len(weight)))
    assert layer.inner.bias is not None
    with torch.no_grad():
        layer.inner.weight.copy_(weight)
        layer.inner.bias.fill_(bias)
    return layer


@pytest.mark.parametrize(
    ("share", "norm"), [(0.9, 1.469), (0.97, 1.126), (0.99, 1.041), (0.999, 1.004), (1.0, 1.0)]
)
def test_a_norm_estimated_from_below_makes_the_layer_expand_and_the_bound_says_so(
    share: float, norm: float
) -> None:
    """The published flaw: the step from `share` of the norm, for a weight of norm 1 and all units active."""
    layer = layer_of(rotations(n=5, seed=0), bias=10.0).materialise()
    layer.scale = torch.full((5,), 2 / share**2)
    slope = spectral_norm(jacobian(layer, torch.zeros(1, 5)))
    assert slope == pytest.approx(norm, abs=5e-4)
    assert slope == pytest.approx(2 / share**2 - 1, rel=1e-12)
    # the weight is a multiple of an isometry, for which a Gram iteration is at its loosest
    assert slope <= layer.lipschitz_bound().value <= 1.03 * slope


def test_the_step_is_two_over_the_squared_norm() -> None:
    weight = torch.randn(7, 4)
    layer = layer_of(weight).train()
    for _ in range(200):
        layer(torch.zeros(1, 4))
    wanted = 2 / (spectral_norm(weight) ** 2 + EPSILON)
    torch.testing.assert_close(layer.eval().applied_scale(), torch.full((7,), wanted), rtol=1e-9, atol=0)
    stored = layer.materialise().scale
    assert stored is not None
    assert (stored < wanted).all()
    torch.testing.assert_close(stored, torch.full((7,), wanted), rtol=0.03, atol=0)


def test_the_iteration_goes_on_in_training_alone() -> None:
    layer = ConvexPotential(Dense(6, 6))
    start = layer.inner.vector.clone()
    layer.eval()(torch.randn(2, 6))
    assert torch.equal(layer.inner.vector, start)
    layer.train()(torch.randn(2, 6))
    _, wanted = estimate_dense_norm(layer.inner.weight, start, 5)
    torch.testing.assert_close(layer.inner.vector, wanted, rtol=0, atol=1e-14)


def test_the_gradient_flows_through_the_norm() -> None:
    """Against finite differences, with the vector of the power iteration held."""
    layer = layer_of(torch.randn(5, 4)).eval()
    x, direction = torch.randn(3, 4), torch.randn(5, 4)
    layer(x).square().sum().backward()
    assert layer.inner.weight.grad is not None
    slope = (layer.inner.weight.grad * direction).sum().item()
    values, step = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            layer.inner.weight.add_(sign * step * direction)
            values.append(layer(x).square().sum().item())
            layer.inner.weight.sub_(sign * step * direction)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_the_formula_holds_in_the_dense_vector_case() -> None:
    """By hand: W = [[3, 0], [0, 1]], norm 3, x = (1, 1): h = 2 / 9.0001, relu(W x) = (3, 1)."""
    layer = layer_of(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).train()
    for _ in range(50):
        layer(torch.ones(1, 2))
    h = 2 / 9.0001
    torch.testing.assert_close(layer.eval()(torch.ones(1, 2)), torch.tensor([[1 - 9 * h, 1 - h]]))


def test_the_warm_up_keeps_a_fresh_layer_near_one() -> None:
    """A random vector would give a norm of about the root mean square of the singular values, and a slope of 3 and more."""
    generator = torch.Generator().manual_seed(0)
    layer = ConvexPotential(Dense(64, 64, generator=generator), generator).eval()
    assert layer.lipschitz_bound().value < 1.2


def test_a_zero_weight_is_the_identity() -> None:
    layer = layer_of(torch.zeros(3, 4), bias=1.0)
    x = torch.randn(2, 4)
    assert torch.equal(layer.materialise()(x), x)
    assert layer.materialise().lipschitz_bound().value == 1.0


def test_the_bias_starts_within_the_published_range() -> None:
    layer = ConvexPotential(Convolution(4, 300, 3, (5, 5), padding=1))
    assert layer.inner.bias is not None
    reach = (4 * 9) ** -0.5
    assert 0.9 * reach < layer.inner.bias.abs().max() <= reach
    assert layer.inner.bias.min() < 0 < layer.inner.bias.max()


def test_the_convolution_is_torch_s_with_its_own_transpose() -> None:
    layer = ConvexPotential(Convolution(3, 5, 3, (6, 4), padding=1)).materialise()
    assert layer.scale is not None
    x = torch.randn(2, 3, 6, 4)
    hidden = torch.relu(functional.conv2d(x, layer.inner.weight, layer.inner.bias, padding=1))
    branch = functional.conv_transpose2d(layer.scale.view(-1, 1, 1) * hidden, layer.inner.weight, padding=1)
    torch.testing.assert_close(layer(x), x - branch)
