"""Cayley: the network keeps norms as published, and its certificate rests on the stored matrices."""

import copy

import pytest
import torch
from torch import Tensor

from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import Estimate
from lipnext.core.network import LipschitzNetwork
from lipnext.nn.cayley import CayleyConvolution
from lipnext.systems import cayley


@pytest.fixture
def network() -> LipschitzNetwork:
    """The tiny preset in float32, its weights away from the start."""
    net = cayley.build(input_shape=(1, 8, 8), classes=4, **cayley.PRESETS["tiny"])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return net.float().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(16, 1, 8, 8, dtype=torch.float32)


def test_every_convolution_keeps_norms(network: LipschitzNetwork, images: Tensor) -> None:
    x = images
    kept = 0
    for layer in network.body:
        y = layer(x)
        if isinstance(layer, CayleyConvolution):
            difference = layer(x) - layer(torch.zeros_like(x))
            torch.testing.assert_close(
                difference.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-4, atol=0
            )
            kept += 1
        x = y
    assert kept == 3


def test_published_and_proved_constant(network: LipschitzNetwork) -> None:
    stated = cayley.SYSTEM.published
    assert stated is not None
    assert stated(network) == Estimate(value=1.0, method="the constant 1 of exact arithmetic")
    bound = MarginCertifier(network).evidence.body.value
    assert 1.0 < bound < 1 + 1e-4
    # Planted: matrices rounded to bfloat16, as a fast path might leave them, are orthogonal no longer.
    spoilt = copy.deepcopy(network.materialise())
    with torch.no_grad():
        for layer in spoilt.body:
            if isinstance(layer, CayleyConvolution):
                layer.transfer.copy_(layer.transfer.bfloat16())
    assert stated(spoilt).value == 1.0
    assert MarginCertifier(spoilt).evidence.body.value > 1 + 1e-3


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_the_deployed_program_is_certified_too(
    network: LipschitzNetwork, images: Tensor, arithmetic: str
) -> None:
    real = MarginCertifier(network)(images)
    deployed = MarginCertifier(network, "deployed", arithmetic)(images)
    assert (deployed.radius <= real.radius).all()
    assert (deployed.radius > 0.9 * real.radius).double().mean() > 0.5
