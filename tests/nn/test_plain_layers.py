"""Dense, Convolution, the reshapes and pools of the convolutional systems, against slow references."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lipnext.core.errors import UnsoundError
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.activation import MaxMin, ReLU
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.head import PlainHead
from lipnext.nn.pool import SumPool
from lipnext.nn.power_iteration import estimate_convolution_norm, estimate_dense_norm
from lipnext.nn.reshape import Flatten, PadChannels, Unshuffle
from tests.helpers import jacobian, spectral_norm

SINGLE = UNIT_ROUNDOFF[torch.float32]
# An SVD of some hundred rows is right to about 1e-13 relative.
SVD = 1 + 1e-12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operator_norm(layer: LipschitzModule, shape: tuple[int, ...]) -> float:
    """The norm of a linear or affine layer from its dense Jacobian."""
    return spectral_norm(jacobian(layer, torch.zeros(1, *shape, dtype=torch.float64)))


@given(
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_a_convolution_is_bounded_and_estimated_from_both_sides(
    size: tuple[int, int], kernel: int, stride: int, padding: int, seed: int
) -> None:
    layer = Convolution(
        2, 3, kernel, size, stride=stride, padding=padding, generator=generator(seed)
    ).double()
    images = torch.randn(2, 2, *size, dtype=torch.float64, generator=generator(seed))
    assert layer(images).shape == (2, 3, *layer.output_size)
    truth = operator_norm(layer, (2, *size))
    assert layer.lipschitz_bound().value * SVD >= truth
    estimate, _ = estimate_convolution_norm(layer.weight, layer.image, 300, stride=stride, padding=padding)
    assert 0.98 * truth < estimate.item() <= truth * SVD


def test_the_adjoint_of_a_strided_convolution_reaches_every_pixel() -> None:
    # An even image under a 3 x 3 kernel of stride 2: without output padding the iterate loses its last row and column.
    kernel = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    kernel[0, 0, 2, 2] = 1.0
    start = torch.rand(1, 1, 4, 4, dtype=torch.float64, generator=generator())
    estimate, image = estimate_convolution_norm(kernel, start, 5, stride=2, padding=1)
    assert image.shape == start.shape
    assert estimate.item() == pytest.approx(1.0, abs=1e-12)


def test_dense_layers_are_bounded_and_estimated_from_both_sides() -> None:
    layer = Dense(7, 5, generator=generator()).double()
    truth = spectral_norm(layer.weight)
    assert layer.lipschitz_bound().value * SVD >= truth
    estimate, _ = estimate_dense_norm(layer.weight, layer.vector, 300)
    assert estimate.item() == pytest.approx(truth, rel=1e-6)
    estimate.backward()  # the gradient of the largest singular value is u v^T
    u, _, v = torch.linalg.svd(layer.weight.detach())
    torch.testing.assert_close(layer.weight.grad, torch.outer(u[:, 0], v[0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1.0, 1e15])
def test_power_iteration_of_weights_of_any_size_is_no_larger_than_the_norm(scale: float) -> None:
    # A floor under the norm of the iterate, or a number added to it, would shrink small vectors from step to step; the
    # squares of large ones overflow.
    dense = (scale * torch.randn(5, 7, generator=generator())).float()
    norm = torch.linalg.matrix_norm(dense.double(), ord=2).item()
    start = functional.normalize(torch.ones(7).float(), dim=0)
    estimate, vector = estimate_dense_norm(dense, start, 50)
    assert torch.linalg.vector_norm(vector).item() == pytest.approx(1.0, rel=1e-6)
    assert norm * 0.2 <= estimate.item() <= norm * (1 + 1e-6)
    # a layer that comes back from zero is followed again
    again, _ = estimate_dense_norm(dense + torch.eye(5, 7).float(), vector, 300)
    assert again.item() == pytest.approx(spectral_norm(dense.double() + torch.eye(5, 7)), rel=1e-4)
    kernel = dense[:, :4].reshape(5, 1, 2, 2)
    image = torch.full((1, 1, 4, 4), 0.25).float()
    estimate, image = estimate_convolution_norm(kernel, image, 50, stride=2)
    norm = spectral_norm(dense[:, :4].double())  # disjoint patches
    assert torch.linalg.vector_norm(image).item() == pytest.approx(1.0, rel=1e-6)
    assert norm * 0.2 <= estimate.item() <= norm * (1 + 1e-6)


def test_a_dense_layer_takes_flat_features_alone() -> None:
    with pytest.raises(ValueError, match=r"must have the shape \(B, n\), got \(2, 3, 6\); flatten it first"):
        Dense(6, 4)(torch.zeros(2, 3, 6))


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [Dense(6, 4, generator=generator()), Convolution(1, 2, 3, (4, 4), padding=1, generator=generator())],
    ids=["dense", "convolution"],
)
def test_the_estimate_stays_warm_and_out_of_the_copy_for_inference(layer: LipschitzModule) -> None:
    # Power iteration only rises, and never above the norm: any start will do. bfloat16 would be off by some 1e-3.
    estimates = [float(layer.estimate_lipschitz()) for _ in range(30)]
    with torch.autocast("cpu", torch.bfloat16):
        estimates += [float(layer.estimate_lipschitz()) for _ in range(30)]
    assert all(later >= earlier * (1 - 1e-6) for earlier, later in pairwise(estimates))
    assert estimates[-1] <= layer.lipschitz_bound().value * (1 + 1e-6)
    assert set(layer.materialise().state_dict()) == {"weight", "bias"}


LAYERS: dict[str, tuple[LipschitzModule, tuple[int, ...]]] = {
    "dense": (Dense(6, 5, generator=generator()), (6,)),
    "dense without bias": (Dense(6, 5, bias=False, generator=generator()), (6,)),
    "convolution": (Convolution(2, 3, 3, (5, 4), padding=1, generator=generator()), (2, 5, 4)),
    "strided": (Convolution(2, 3, 2, (5, 4), stride=2, bias=False, generator=generator()), (2, 5, 4)),
    "maxmin": (MaxMin(), (4, 3, 3)),
    "relu": (ReLU(), (4, 3, 3)),
    "flatten": (Flatten(), (4, 3, 3)),
    "pad": (PadChannels(5), (2, 3, 3)),
    "unshuffle": (Unshuffle(2), (2, 5, 3)),
    "pool": (SumPool(2), (2, 5, 4)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_two_points_are_never_driven_apart_by_more_than_the_bound(name: str) -> None:
    layer, shape = LAYERS[name]
    x, y = torch.randn(2, 64, *shape, generator=generator(1), dtype=torch.float64)
    layer = layer.double()
    ratio = (layer(x) - layer(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert ratio.max().item() <= layer.lipschitz_bound().value * (1 + 1e-12)
    layer.float()


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_float32_stays_within_the_propagated_error(name: str) -> None:
    layer, shape = LAYERS[name]
    for parameter in layer.parameters():
        parameter.add_(0.1)
    x = torch.rand(64, *shape, generator=generator(2), dtype=torch.float32)
    state = layer.rounding(
        RoundingState(
            norm=x.double().flatten(1).norm(dim=1).max().item() * (1 + 1e-14), error=0.0, unit=SINGLE
        )
    )
    exact = layer.double()(x.double())
    computed = layer.float()(x)
    error = (computed.double() - exact).flatten(1).norm(dim=1)
    assert error.max().item() <= state.error
    assert exact.flatten(1).norm(dim=1).max().item() <= state.norm * (1 + 1e-12)


def test_float32_convolutions_without_onednn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS["convolution"][0]
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    layer.rounding(RoundingState(norm=1.0, error=0.0, unit=2.0**-53))
    with pytest.raises(UnsoundError, match="without oneDNN, torch may convolve by Winograd"):
        layer.rounding(RoundingState(norm=1.0, error=0.0, unit=SINGLE))


def test_the_reshapes_lose_nothing() -> None:
    x = torch.randn(2, 3, 5, 6, generator=generator())
    assert torch.equal(Flatten()(x), x.reshape(2, 90))
    assert torch.equal(PadChannels(4)(x)[:, :3], x)
    assert PadChannels(4)(x)[:, 3].abs().max() == 0
    with pytest.raises(ValueError, match="`channels` must be at least 3, got 2"):
        PadChannels(2)(x)
    folded = Unshuffle(2)(x)
    assert folded.shape == (2, 12, 3, 3)
    assert torch.equal(functional.pixel_shuffle(folded, 2)[:, :, :5], x)
    assert Unshuffle(2)(x[:0]).shape == (0, 12, 3, 3)
    pooled = SumPool(2)(x)
    for row, column in ((0, 0), (1, 2)):
        window = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(pooled[:, :, row, column], window.sum((2, 3)) / 2)


def test_maxmin_sorts_the_two_halves() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    assert MaxMin()(x).tolist() == [[1.0, 3.0, 0.5, -2.0]]


def test_a_plain_head_uses_its_rows_as_they_are() -> None:
    head = PlainHead(6, 3, generator=generator()).double()
    features = torch.randn(4, 6, dtype=torch.float64, generator=generator(1))
    assert torch.equal(head(features), nn.functional.linear(features, head.weight, head.bias))
    wanted = torch.cdist(head.weight, head.weight)
    torch.testing.assert_close(head.distances(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(head.materialise().weight, head.weight)


@pytest.mark.parametrize("sides", [(6, 4), (5, 5), (4, 5)])
def test_a_convolution_refuses_images_whose_norm_was_not_proved(sides: tuple[int, int]) -> None:
    layer = LAYERS["convolution"][0]
    with pytest.raises(ValueError, match=r"must have the sides \(5, 4\) for which the norm is proved, got"):
        layer(torch.zeros(1, 2, *sides))
