"""What the layers of CPL and SLL share: the residual map, its bound, its rounding error and what is stored of it."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from helpers import jacobian, spectral_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState, gamma
from lipnext.nn.convex_potential import ConvexPotential
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.gradient_step import GradientStep
from lipnext.nn.sdp_residual import SdpResidual

U = UNIT_ROUNDOFF[torch.float32]
Make = Callable[[int], GradientStep]


def dense(layer: type[GradientStep], seed: int) -> GradientStep:
    generator = torch.Generator().manual_seed(seed)
    return layer(Dense(6, 9, generator=generator), generator)


def convolution(layer: type[GradientStep], seed: int) -> GradientStep:
    generator = torch.Generator().manual_seed(seed)
    return layer(Convolution(3, 2, 3, (4, 5), padding=1, generator=generator), generator)


MAKE: dict[str, tuple[Make, tuple[int, ...]]] = {
    "cpl-dense": (lambda seed: dense(ConvexPotential, seed), (6,)),
    "cpl-convolution": (lambda seed: convolution(ConvexPotential, seed), (3, 4, 5)),
    "sll-dense": (lambda seed: dense(SdpResidual, seed), (6,)),
    "sll-convolution": (lambda seed: convolution(SdpResidual, seed), (3, 4, 5)),
}
every_layer = pytest.mark.parametrize("name", MAKE)
few = settings(max_examples=12)


def operator(layer: GradientStep, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """W, b and S as a dense matrix and vectors, built from the inner map and the stored scale."""
    inner = copy.deepcopy(layer.inner)
    offset = inner(torch.zeros(1, *shape)).flatten()
    columns = [(inner(e.reshape(1, *shape)).flatten() - offset) for e in torch.eye(math.prod(shape)).unbind()]
    scale = layer.applied_scale().detach()
    return torch.stack(columns, dim=1), offset, scale.repeat_interleave(len(offset) // len(scale))


@every_layer
@few
@given(seed=st.integers(0, 10**4))
def test_the_layer_is_the_formula_with_a_dense_matrix(name: str, seed: int) -> None:
    make, shape = MAKE[name]
    layer = make(seed).eval()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))
    for form in (layer, layer.materialise()):
        w, b, s = operator(form, shape)
        flat = x.flatten(1)
        slow = flat - (torch.relu(flat @ w.mT + b) * s) @ w
        torch.testing.assert_close(form(x).flatten(1), slow, rtol=1e-12, atol=1e-12)


@every_layer
@few
@given(seed=st.integers(0, 10**4))
def test_the_bound_is_exactly_one_for_inference_and_no_slope_exceeds_it(name: str, seed: int) -> None:
    make, shape = MAKE[name]
    stored = (
        make(seed).float().double().materialise().float()
    )  # as a bundle is saved after training in float32
    bound = stored.lipschitz_bound()
    assert (bound.value, bound.norm, bound.proof) == (1.0, 2.0, "gradient-step")
    layer = stored.double()
    assert layer.lipschitz_bound().value == 1.0
    w, _, s = operator(layer, shape)
    curvature = spectral_norm(s.sqrt()[:, None] * w) ** 2
    assert curvature <= layer.curvature_bound() * (1 + 1e-12) <= 2 * (1 + 1e-12)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    assert spectral_norm(jacobian(layer, x)) <= 1 + 1e-12


@every_layer
@pytest.mark.parametrize("stretch", [0.5, 1.2, 3.0])
def test_the_bound_follows_the_stored_scale(name: str, stretch: float) -> None:
    """`t - 1` where the step is too long, and the slope that attains it where every unit is active."""
    make, shape = MAKE[name]
    layer = make(0).materialise()
    assert layer.scale is not None
    assert layer.inner.bias is not None
    layer.scale = layer.scale * stretch
    with torch.no_grad():
        layer.inner.bias.fill_(100.0)
    w, _, s = operator(layer, shape)
    curvature = spectral_norm(s.sqrt()[:, None] * w) ** 2
    slope = spectral_norm(jacobian(layer, torch.randn(1, *shape)))
    assert curvature == pytest.approx(2 * stretch, rel=0.5)
    if stretch > 1:
        assert slope == pytest.approx(max(1.0, curvature - 1), rel=1e-9)
    assert slope <= layer.lipschitz_bound().value * (1 + 1e-12)
    assert layer.lipschitz_bound().value == pytest.approx(max(1.0, layer.curvature_bound() - 1), rel=1e-15)


@every_layer
def test_the_bound_before_materialisation_speaks_of_the_layer_as_it_is(name: str) -> None:
    make, shape = MAKE[name]
    layer = make(3).eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    w, _, s = operator(layer, shape)
    curvature = spectral_norm(s.sqrt()[:, None] * w) ** 2
    assert max(1.0, curvature - 1) <= layer.lipschitz_bound().value * (1 + 1e-12)
    layer.train().lipschitz_bound()  # and asking moves nothing, in training either
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@every_layer
def test_materialising_is_final_and_hardly_moves_the_function(name: str) -> None:
    make, shape = MAKE[name]
    layer = make(1).eval()
    stored = layer.materialise()
    again = stored.materialise()
    assert stored.state_dict().keys() == make(2).materialise().state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in stored.state_dict().items())
    assert not any("vector" in key or "image" in key for key in stored.state_dict())
    x = torch.randn(4, *shape)
    # 20 steps of power iteration against a proved norm, which for images as small as these is that of a larger torus
    assert (stored(x) - layer(x)).norm() < (0.1 if "convolution" in name else 0.03) * x.norm()
    rounded = layer.float().materialise().scale
    assert rounded is not None
    assert rounded.dtype == torch.float32


@every_layer
@pytest.mark.parametrize("spoilt", [-0.1, math.nan, math.inf])
def test_a_scale_that_is_no_step_down_is_refused(name: str, spoilt: float) -> None:
    layer = MAKE[name][0](0).materialise()
    assert layer.scale is not None
    layer.scale[1] = spoilt
    with pytest.raises(UnsoundError, match="scale of a residual layer must be finite and not negative"):
        layer.lipschitz_bound()
    with pytest.raises(UnsoundError, match="scale of a residual layer"):
        layer.rounding(RoundingState(norm=1.0, error=0.0, unit=U))


# ---- Rounding


def reference(layer: GradientStep) -> GradientStep:
    return copy.deepcopy(layer).double()


@every_layer
@pytest.mark.parametrize("incoming", [0.0, 1e-5])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_the_measured_float32_error_is_below_the_rounding_bound(
    name: str, incoming: float, shift: float
) -> None:
    make, shape = MAKE[name]
    layer = make(4).materialise().float()
    assert layer.inner.bias is not None
    with torch.no_grad():
        layer.inner.bias.add_(shift)
    exact = torch.rand(32, *shape)
    direction = torch.randn(exact.shape).flatten(1)
    moved = exact + incoming * (direction / direction.norm(dim=1, keepdim=True)).view(exact.shape)
    computed = moved.float()
    error = (computed.double() - exact).flatten(1).norm(dim=1).max().item()
    norm = exact.flatten(1).norm(dim=1).max().item()
    state = layer.rounding(RoundingState(norm=norm, error=error, unit=U))
    with torch.no_grad():
        truth = reference(layer)(exact)
        measured = (layer(computed).double() - truth).flatten(1).norm(dim=1).max().item()
    assert measured <= state.error
    assert truth.flatten(1).norm(dim=1).max() <= state.norm
    assert state.error < error + 2e-5 * (norm + shift * math.sqrt(math.prod(shape)))


@every_layer
def test_an_incoming_error_is_not_amplified(name: str) -> None:
    """Branch by branch it would triple in each layer; the map as a whole is 1-Lipschitz."""
    layer = MAKE[name][0](0).materialise()
    unit = UNIT_ROUNDOFF[torch.float64]
    fresh = layer.rounding(RoundingState(norm=1.0, error=0.0, unit=unit)).error
    assert fresh >= unit
    assert layer.rounding(RoundingState(norm=1.0, error=1e-6, unit=unit)).error < 1e-6 + 2 * fresh


@pytest.mark.parametrize(("name", "slack"), [("cpl-dense", 1.02), ("sll-dense", 1.5)])
def test_the_rounding_bound_is_attained_where_all_numbers_are_positive(name: str, slack: float) -> None:
    """Then no product cancels, and sums that are rounded up throughout err by all that the bound allows, and no more."""
    layer = MAKE[name][0](6)
    with torch.no_grad():
        layer.inner.weight.abs_()
    layer = layer.materialise()
    w, scale = layer.inner.weight.detach(), layer.scale
    assert scale is not None
    assert layer.inner.bias is not None
    x = 3 * torch.linalg.svd(scale.sqrt()[:, None] * w).Vh[0].abs()
    with torch.no_grad():
        layer.inner.bias.copy_(0.5 * w @ x)
    m, n = w.shape
    product = (1 + gamma(n + 1, U)) * (1 + gamma(m + 1, U)) * (scale * (w @ x + layer.inner.bias)) @ w
    exact = layer(x[None])[0]
    subtracted = (x - product) * (1 + U)
    error = (subtracted - exact).norm().item()
    state = layer.rounding(RoundingState(norm=3.0, error=0.0, unit=U))
    assert error <= state.error <= slack * error


@every_layer
def test_activations_that_may_overflow_are_refused(name: str) -> None:
    """With S tiny, `W x + b` is large although the layer's output is not."""
    layer = MAKE[name][0](0).materialise()
    assert layer.scale is not None
    with torch.no_grad():
        layer.inner.weight.mul_(2.0**30)
    layer.scale = layer.scale * 2.0**-60
    layer.rounding(RoundingState(norm=1.0, error=0.0, unit=U))
    with pytest.raises(UnsoundError, match="may overflow"):
        layer.rounding(RoundingState(norm=2.0**17, error=0.0, unit=U))


@pytest.mark.parametrize("layer", [ConvexPotential, SdpResidual])
def test_convolutions_that_may_not_be_sums_of_products_are_refused(
    layer: type[GradientStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    single = RoundingState(norm=1.0, error=0.0, unit=UNIT_ROUNDOFF[torch.float32])
    dense(layer, 0).materialise().rounding(single)
    with pytest.raises(UnsoundError, match="without oneDNN, torch may convolve by Winograd"):
        convolution(layer, 0).materialise().rounding(single)
