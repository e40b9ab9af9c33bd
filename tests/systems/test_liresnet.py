"""LiResNet as a whole: its size, its published constant beside the proved one, its bundle, what it refuses."""

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers import jacobian, spectral_norm
from torch import Tensor, nn
from torch.nn import functional

from lipnext.certificates.margin import MarginCertifier
from lipnext.core.errors import ConfigError
from lipnext.core.network import LipschitzNetwork
from lipnext.deployment.bundle import load_bundle, polish, save_bundle
from lipnext.nn.cholesky import OrthogonalTrunk
from lipnext.nn.convolution import Convolution
from lipnext.nn.linear_residual import LinearResidual
from lipnext.systems.liresnet import PRESETS, SYSTEM, build, published, tiny


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small() -> LipschitzNetwork:
    """The tiny preset in evaluation, with other weights than at the start."""
    net = build(input_shape=(1, 8, 8), classes=4, **PRESETS["tiny"])
    for layer in net.body:
        if isinstance(layer, LinearResidual):
            assert layer.theta is not None
            assert layer.mean is not None
            nn.init.normal_(layer.theta, std=0.03, generator=rng(1))
            nn.init.normal_(layer.mean, std=0.1, generator=rng(2))
    return net.eval()


def count(width: int, depth: int, features: int, dense: int, patch: int = 0) -> int:
    """Parameters on 32x32 colour images with ten classes, written down from the paper's architecture."""
    kernel, grid = (patch, 32 // patch) if patch else (5, 16)
    stem = 3 * width * kernel**2 + width
    trunk = depth * (9 * width**2 + width + width)  # theta, gamma, bias
    neck = 16 * width**2 + features * width * math.ceil(grid / 4) ** 2 + features
    dense_trunk = dense * (features**2 + 2 * features)
    return stem + trunk + neck + dense_trunk + 10 * features + 10


@pytest.mark.parametrize("patch", [0, 4])
def test_the_parameters_are_those_of_the_architecture(patch: int) -> None:
    sizes = {"width": 6, "depth": 3, "features": 10, "dense": 2}
    net = build(input_shape=(3, 32, 32), classes=10, patch=patch, **sizes)
    numbers = sum(p.numel() for p in net.parameters())
    if patch:
        sizes["patch"] = patch
    assert numbers == count(**sizes)
    assert round(count(**PRESETS["cifar10"]) / 1e6) == 83  # as reported


def test_the_network_is_the_published_chain() -> None:
    net = small()
    images = torch.rand(3, 1, 8, 8, generator=rng(3))
    stem = net.body[1]
    assert isinstance(stem, Convolution)
    x = sort(functional.conv2d(images - 0.5, stem.weight, stem.bias, stride=2, padding=2))
    for layer in net.body:
        if isinstance(layer, LinearResidual):
            assert layer.mean is not None
            bias = layer.bias - layer.mean
            x = sort(functional.conv2d(x, layer.kernel(), bias, padding=1))
    _, _, _, _, _, _, _, patches, _, dense, _, trunk = net.body
    kernel = patches.matrix().reshape(8, 8, 4, 4)
    x = functional.conv2d(x, kernel, stride=4).flatten(1)
    x = sort(functional.linear(x, dense.matrix(), dense.bias))
    for weight, bias in zip(trunk.matrix(), trunk.bias, strict=True):
        x = sort(functional.linear(x, weight, bias))
    rows = net.head.weight / net.head.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(net(images), x @ rows.mT + net.head.bias, rtol=0, atol=1e-12)


def sort(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


def test_the_stem_starts_orthogonal_and_the_seed_decides() -> None:
    nets = [build(input_shape=(1, 8, 8), classes=4, seed=s, **PRESETS["tiny"]) for s in (0, 0, 1)]
    stem = nets[0].body[1]
    assert isinstance(stem, Convolution)
    rows = stem.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(8), rtol=0, atol=1e-12)
    first, second, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_published_constant_is_a_power_iteration_and_lies_below_the_proved_one() -> None:
    net = polish(small())
    claimed, proved = published(net), net.double().lipschitz_bound()
    truth = 1.0
    for layer in net.body:
        if isinstance(layer, OrthogonalTrunk):
            for weight in layer.matrix():
                truth *= spectral_norm(weight)
            continue
        shape = {"Convolution": (1, 8, 8), "LinearResidual": (8, 4, 4), "OrthogonalPatches": (8, 4, 4)}
        name = type(layer).__name__
        if name in shape or name == "OrthogonalDense":
            truth *= spectral_norm(jacobian(layer, torch.zeros(1, *shape.get(name, (8,)))))
    assert "power iteration, 500 steps" in claimed.method
    # power iteration from below, up to what float32 adds; every bound here is that of a small matrix
    assert 0.999 * truth < claimed.value < truth * (1 + 1e-5)
    assert truth * (1 - 1e-12) <= proved.value < truth * (1 + 1e-9)


def test_a_start_of_ones_can_miss_the_largest_direction() -> None:
    """Why the published constant is an estimate: a kernel that reacts most to an image orthogonal to ones."""
    net = polish(small())
    layers = [layer for layer in net.body if isinstance(layer, LinearResidual)]
    for layer in layers:
        assert layer.weight is not None
        with torch.no_grad():
            layer.weight.zero_()
            layer.weight[:, :, 1, 1] = torch.eye(8) / 2
            # channel 0 sees twice the difference of channels 6 and 7, of which an image of ones has none
            layer.weight[0, :, 1, 1] = torch.tensor([0.0] * 6 + [2.0, -2.0])
    ratio = net.double().lipschitz_bound().value / published(net).value
    assert ratio > 10


def test_the_bundle_holds_what_is_applied_and_certifies_the_same(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    experiment = tiny()
    net = small()
    save_bundle(net, experiment, ("a", "b", "c", "d"), tmp_path)
    model = load_bundle(tmp_path)
    assert {name.rpartition(".")[2] for name in model.net.state_dict()} == {"weight", "bias"}
    images = torch.rand(8, 1, 8, 8, generator=rng(4))
    certificate, wanted = model.certify(images), MarginCertifier(polish(net))(images)
    assert torch.equal(certificate.radius, wanted.radius)
    assert (certificate.radius > 0).all()
    deployed = MarginCertifier(polish(net), "deployed", "float32")(images)
    assert (deployed.radius <= wanted.radius).all()
    # rounding in float32 costs a radius of some 1e-5
    assert (deployed.radius > wanted.radius - 1e-3).all()


def test_the_certificate_rests_on_the_stored_matrix_and_not_on_the_constant_one() -> None:
    net = polish(small())
    spoiled = copy.deepcopy(net)
    dense = spoiled.body[9]
    with torch.no_grad():
        dense.weight.mul_(1.25)
    before, after = (MarginCertifier(n).evidence.body.value for n in (net, spoiled))
    assert after == pytest.approx(1.25 * before, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 7}, "width and features must be even, depth and dense at least 1, got width 7"),
        ({"features": 0}, "features 0"),
        ({"depth": 0}, "depth 0"),
        ({"features": 10}, "10 rows cannot be orthogonal with 8 numbers after the neck"),
        ({"patch": 9}, r"model.patch: must lie between 0 and the image's 8 pixels, got 9"),
        ({"patch": -1}, "got -1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(input_shape=(1, 8, 8), classes=4, **{**PRESETS["tiny"], **change})


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 9), (1, 28, 28)])
def test_sides_of_any_length_are_taken(shape: tuple[int, int, int]) -> None:
    net = build(input_shape=shape, classes=3, **PRESETS["tiny"]).eval()
    images = torch.rand(2, *shape, generator=rng(5))
    assert net(images).shape == (2, 3)
    assert net(images[:0]).shape == (0, 3)
    assert len(MarginCertifier(net)(images)) == 2
    assert SYSTEM.published is published
