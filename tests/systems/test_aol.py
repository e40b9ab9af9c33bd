"""AOL: the published loss, and a certificate that does not take the rescaling's word for it."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor

from lipnext import systems
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import Estimate
from lipnext.core.errors import ConfigError
from lipnext.core.network import LipschitzNetwork
from lipnext.systems import aol
from lipnext.training.objective import Objective


@pytest.fixture
def network() -> LipschitzNetwork:
    """The tiny preset in float32, its weights away from the orthogonal start."""
    net = aol.build(input_shape=(1, 8, 8), classes=4, **aol.PRESETS["tiny"])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return net.float().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(16, 1, 8, 8, dtype=torch.float32)


def test_the_loss_is_the_published_one(network: LipschitzNetwork, images: Tensor) -> None:
    """`T CE((z - xi onehot) / T)` with T = 1/4 and xi = 2 sqrt(2) 36/255."""
    labels = torch.arange(16) % 4
    objective = Objective(systems.experiment("aol/tiny").loss)
    loss = objective.of(network, images, labels, 0.7, contextlib.nullcontext())
    logits = network(images).double()
    logits[range(16), labels] -= 2 * 2**0.5 * 36 / 255
    wanted = -(torch.log_softmax(4 * logits, dim=1)[range(16), labels] / 4).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_published_and_proved_constant(network: LipschitzNetwork, images: Tensor) -> None:
    stated = aol.SYSTEM.published
    assert stated is not None
    assert stated(network) == Estimate(value=1.0, method="the constant 1 of exact arithmetic")
    certifier = MarginCertifier(network)
    assert certifier.evidence.body.value <= 1.0001
    # Planted: one stored kernel is a little larger than it was when it was rescaled.
    spoilt = copy.deepcopy(network.materialise())
    with torch.no_grad():
        spoilt.body[3].weight.mul_(1.25)
    assert stated(spoilt).value == 1.0
    assert MarginCertifier(spoilt).evidence.body.value > 1.2 * certifier.evidence.body.value


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_the_deployed_program_is_certified_too(
    network: LipschitzNetwork, images: Tensor, arithmetic: str
) -> None:
    real = MarginCertifier(network)(images)
    deployed = MarginCertifier(network, "deployed", arithmetic)(images)
    assert (deployed.radius <= real.radius).all()
    assert (deployed.radius > 0.9 * real.radius).double().mean() > 0.5


def test_a_width_that_is_too_small_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.width: must be a multiple of 4 that holds the 48 channels"
    ):
        aol.build(input_shape=(3, 32, 32), classes=10, width=32)
