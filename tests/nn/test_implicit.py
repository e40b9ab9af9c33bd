"""Implicit layers: well-posed for every parameter, solved by averaging where plain iteration fails, and their gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.bounds.matrix_measure import averaging, diagonal, measure_up, off_diagonal
from lipnext.core.errors import ConfigError, UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.implicit import ImplicitConvolution, ImplicitDense, ImplicitLayer

# The reference vector, with the weights E = exp(d) of the norm, which scale what comes in and goes out.
T = torch.tensor([[0.5, -1, 0.25], [0.75, -0.5, 1], [-0.3, 0.6, 0.2]], dtype=torch.float64)
E = torch.tensor([0, 0.2, -0.3], dtype=torch.float64).exp()
V = torch.tensor([[0.6, -0.95, 0.58]], dtype=torch.float64)  # U x + b


def _layer(weight: Tensor, measure: float = 0.0) -> ImplicitLayer:
    layer = (
        ImplicitDense(len(weight), measure=measure)
        if weight.dim() == 2
        else ImplicitConvolution(len(weight), weight.shape[-1], measure=measure)
    )
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer.eval()


def _random(kind: str, seed: int, size: float = 1.0) -> tuple[ImplicitLayer, Tensor]:
    """A layer and what goes into it."""
    g = torch.Generator().manual_seed(seed)
    shape, inputs = ((5, 5), (4, 5)) if kind == "dense" else ((2, 2, 3, 3), (4, 2, 4, 3))
    weight = size * torch.randn(shape, generator=g, dtype=torch.float64)
    return _layer(weight, 0.2), torch.randn(inputs, generator=g, dtype=torch.float64)


def _unrolled(layer: ImplicitLayer, v: Tensor, matrix: Tensor, steps: int) -> Tensor:
    """The averaged iteration as it is written in the paper, at the step of the vector's formula."""
    alpha = 1 / (1 - diagonal(matrix).clamp_max(0).min().detach())
    z = torch.zeros_like(v)
    for _ in range(steps):
        z = (1 - alpha) * z + alpha * torch.relu(layer.product(z, matrix) + v)
    return z


def test_the_reference_vector_is_matched() -> None:
    layer = _layer(T)
    a = layer.matrix().detach()
    plain = a / E[:, None] * E  # in the coordinates of the vector
    expected = [
        [-1.25, -1.2214027582, 0.1852045552],
        [0.6140480648, -2.75, 0.6065306597],
        [-0.4049576423, 0.9892327624, -0.9],
    ]
    torch.testing.assert_close(plain, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    assert measure_up(plain) == pytest.approx(0.4941904047, abs=1e-9)
    assert measure_up(a) == pytest.approx(0, abs=2e-15)
    assert plain.abs().sum(1).max().item() == pytest.approx(3.9706, abs=5e-5)
    found = averaging(a)
    # the step is rounded down to a multiple of 2^-16
    assert 0.2666666667 - 2**-16 <= found.step <= 0.2666666667
    assert 1 - found.step * found.gap == pytest.approx(0.7333333333, abs=2**-16)
    solution = layer(V * E) / E
    expected = torch.tensor([[0.2867629062, 0, 0.2441437735]], dtype=torch.float64)
    # What the solver leaves is at most 2^-20 of the distance; 100 more steps leave nothing.
    torch.testing.assert_close(solution, expected, rtol=0, atol=2.0**-20)
    torch.testing.assert_close(_unrolled(layer, V * E, a, 200) / E, expected, rtol=0, atol=1e-9)


def test_the_first_steps_of_the_reference_vector() -> None:
    layer = _layer(T)
    z = [_unrolled(layer, V * E, layer.matrix().detach(), steps) for steps in range(5)]
    torch.testing.assert_close(z[1] / E, torch.tensor([[0.16, 0, 0.1546666667]]).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        z[2] / E, torch.tensor([[0.231638659, 0, 0.2136906962]]).double(), rtol=0, atol=1e-9
    )
    sizes = [(b - a).abs().max().item() for a, b in itertools.pairwise(z)]
    assert sizes == pytest.approx([0.16, 0.0716386590, 0.0315705354, 0.0136842434], abs=1e-9)


def test_plain_iteration_cycles_where_the_averaged_one_converges() -> None:
    layer = _layer(T)
    a = (layer.matrix() / E[:, None] * E).detach()
    z, seen = torch.zeros_like(V), []
    for _ in range(100):
        z = torch.relu(layer.product(z, a) + V)
        seen.append(z)
    torch.testing.assert_close(seen[-2], torch.tensor([[0.6, 0, 0.58]]).double(), rtol=0, atol=1e-12)
    assert (seen[-1] == 0).all()
    z = layer(V * E)
    left = z - torch.relu(layer.product(z, layer.matrix()) + V * E)
    assert left.abs().max() < 1e-5


@given(st.integers(0, 10**6), st.floats(-3, 0.99), st.sampled_from(["dense", "convolution"]))
@settings(max_examples=30)
def test_every_parameter_gives_a_measure_of_at_most_m(seed: int, measure: float, kind: str) -> None:
    layer, _ = _random(kind, seed, size=3.0)
    layer.measure = measure
    found = measure_up(layer.matrix())
    assert found <= measure + 1e-12
    if (diagonal(layer.weight) >= 0).any():
        assert found >= measure - 1e-12


def test_every_matrix_of_a_smaller_measure_has_a_parameter() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4, 4, generator=g, dtype=torch.float64)
    rest = off_diagonal(a)
    a = rest + torch.diag(0.1 - rest.abs().sum(1) - torch.rand(4, generator=g, dtype=torch.float64))
    # Where a_ii + sum |a_ij| = m - s, s > 0, T_ii = -s / 2 takes s / 2 twice.
    spare = 0.1 - (diagonal(a) + rest.abs().sum(1))
    torch.testing.assert_close(_layer(rest - torch.diag(spare / 2), 0.1).matrix(), a, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_solutions_solve_the_equation(kind: str) -> None:
    layer, v = _random(kind, 1)
    z = layer(v)
    assert (z >= 0).all()
    left = (z - torch.relu(layer.product(z, layer.matrix()) + v)).abs().max()
    assert left <= 1e-4 * z.abs().max()
    torch.testing.assert_close(
        z, _unrolled(layer, v, layer.matrix(), 500), rtol=0, atol=2.0**-20 * z.max().item()
    )


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_gradients_are_those_of_an_unrolled_iteration(kind: str) -> None:
    layer, v = _random(kind, 2, size=0.5)
    v.requires_grad_()
    weights = torch.randn(v.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unrolled = (weights * _unrolled(layer, v, layer.matrix(), 500)).sum()
    slow = torch.autograd.grad(unrolled, (v, layer.weight))
    fast = torch.autograd.grad((weights * layer(v)).sum(), (v, layer.weight))
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    layer.train()
    rough = torch.autograd.grad((weights * layer(v)).sum(), (v, layer.weight))
    for one, other in zip(rough, slow, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_the_adjoint_is_the_adjoint(kind: str) -> None:
    layer, z = _random(kind, 3)
    p, a = torch.randn_like(z), layer.matrix()
    assert (p * layer.product(z, a)).sum().item() == pytest.approx(
        (layer.adjoint(p, a) * z).sum().item(), rel=1e-12
    )


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_pairs_are_not_driven_apart_by_more_than_the_bound(kind: str) -> None:
    layer, v = _random(kind, 4)
    bound = layer.lipschitz_bound()
    assert (bound.norm, bound.proof) == (math.inf, "matrix-measure")
    assert bound.value == pytest.approx(1 / (1 - max(measure_up(layer.matrix()), 0)), rel=1e-12)
    g = torch.Generator().manual_seed(0)
    other = v + torch.randint(0, 2, v.shape, generator=g) * 0.2 - 0.1
    ratio = (layer(v) - layer(other)).abs().amax() / (v - other).abs().amax()
    assert 0.01 <= ratio <= bound.value * (1 + 1e-12)


def test_the_bound_is_attained() -> None:
    """A unit that feeds itself by m: `z = m z + v` has the slope `1 / (1 - m)`."""
    layer = _layer(torch.zeros(1, 1, dtype=torch.float64), 0.75)
    steep = layer(torch.tensor([[3.0]])) - layer(torch.tensor([[2.0]]))
    assert layer.lipschitz_bound().value * (1 - 1e-5) <= steep.item() <= layer.lipschitz_bound().value


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_what_is_stored_is_the_matrix(kind: str) -> None:
    layer, v = _random(kind, 5)
    frozen = layer.materialise()
    assert frozen.state_dict().keys() == layer.state_dict().keys()
    torch.testing.assert_close(frozen.weight, layer.matrix(), rtol=0, atol=0)
    assert torch.equal(frozen(v), layer(v))
    assert torch.equal(frozen.materialise().weight, frozen.weight)


def test_a_stored_matrix_that_is_not_contracting_is_refused() -> None:
    frozen = _random("dense", 6)[0].materialise()
    with torch.no_grad():
        frozen.weight[0, 0] += 2
    with pytest.raises(UnsoundError, match="which must be below 1"):
        frozen(torch.zeros(1, 5, dtype=torch.float64))
    with pytest.raises(UnsoundError, match="a measure of 1 or more"):
        frozen.lipschitz_bound()


def test_l2_errors_and_unusable_settings_are_refused() -> None:
    with pytest.raises(UnsoundError, match="no rounding bound in l2; certify with"):
        ImplicitDense(3).rounding(RoundingState(norm=1.0, error=0.0, unit=UNIT_ROUNDOFF[torch.float64]))
    with pytest.raises(ConfigError, match=r"model\.measure: must be below 1.* got 1"):
        ImplicitDense(3, measure=1.0)
    with pytest.raises(ConfigError, match=r"model\.kernel: must be odd"):
        ImplicitConvolution(3, 4)
