"""BRONet: skeleton, loss and constant of the published code, and the proved constant beside it."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor

from lipnext import systems
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.errors import ConfigError
from lipnext.core.network import LipschitzNetwork
from lipnext.nn.block_reflector import BlockReflectorConvolution, BlockReflectorMixing
from lipnext.systems import bronet
from lipnext.training.objective import Objective


@pytest.fixture
def network() -> LipschitzNetwork:
    """The tiny preset in float32, its weights away from the start."""
    net = bronet.build(input_shape=(1, 8, 8), classes=4, **bronet.PRESETS["tiny"])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return net.float().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(16, 1, 8, 8, dtype=torch.float32)


def test_the_skeleton_is_that_of_liresnet() -> None:
    """Stem 5x5 of stride 2, convolutions at 16x16, neck 4x4 to width channels, then dense: here at width 16."""
    sizes = bronet.PRESETS["cifar10"] | {"width": 16, "features": 64, "depth": 3, "dense": 2}
    net = bronet.build(input_shape=(3, 32, 32), classes=10, **sizes)
    stem = net.body[1]
    assert (tuple(stem.weight.shape), stem.stride, stem.padding) == ((16, 3, 5, 5), 2, 2)
    assert stem.output_size == (16, 16)
    convolutions = [layer for layer in net.body if isinstance(layer, BlockReflectorConvolution)]
    assert [tuple(layer.weight.shape) for layer in convolutions] == [(16, 8, 3, 3)] * 3
    mixings = [layer for layer in net.body if isinstance(layer, BlockReflectorMixing)]
    assert [(layer.channels_in, layer.channels_out) for layer in mixings] == [
        (256, 16),
        (256, 64),
        (64, 64),
        (64, 64),
    ]
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_the_loss_is_the_published_one(network: LipschitzNetwork, images: Tensor) -> None:
    """`-T (1 - p)^5 log p` at T = 3/4 of EMMA's shifted logits, the label's lowered by 2."""
    labels = torch.arange(16) % 4
    objective = Objective(systems.experiment("bronet/tiny").loss)
    with torch.no_grad():
        for _ in range(50):  # the power iteration of the stem is kept warm
            constant = float(network.estimate_lipschitz())
    loss = objective.of(network, images, labels, 0.25, contextlib.nullcontext())
    radius = 36 / 255 * (0.1 + 0.5 * 2.9)
    rows = torch.nn.functional.normalize(network.head.weight.detach().double(), dim=1)
    total = 0.0
    for z, y in zip(network(images).detach().double(), labels.tolist(), strict=True):
        u = z - z[y]
        reach = radius * constant * (rows - rows[y]).norm(dim=1)
        share = (-u / reach.clamp_min(1e-8)).clamp(0.01, 1.0)
        u = u + share * reach
        u[y] = -2.0
        p = torch.softmax(u / 0.75, dim=0)[y]
        total += float(-0.75 * (1 - p) ** 5 * torch.log(p)) / len(labels)
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_published_and_proved_constant(network: LipschitzNetwork) -> None:
    stated = bronet.SYSTEM.published
    assert stated is not None
    estimate = stated(network)
    assert "500 steps" in estimate.method
    stem = network.body[1]
    bound = MarginCertifier(network).evidence.body.value
    assert 0.99 * estimate.value <= stem.lipschitz_bound().value
    assert estimate.value <= bound <= 1.1 * stem.lipschitz_bound().value
    # Planted: a reflector that was stored a little too large. The published constant does not move.
    spoilt = copy.deepcopy(network.materialise())
    with torch.no_grad():
        spoilt.body[3].transfer.mul_(1.02)
    assert stated(spoilt).value == estimate.value
    assert MarginCertifier(spoilt).evidence.body.value > 1.01 * bound


def test_training_scales_margins_by_the_stem_alone(network: LipschitzNetwork) -> None:
    with torch.no_grad():
        for _ in range(100):
            constant = float(network.estimate_lipschitz())
    assert constant == pytest.approx(bronet.published(network).value, rel=1e-3)
    network.estimate_lipschitz().backward()
    moved = [name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert moved == ["body.1.weight"]


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_the_deployed_program_is_certified_too(
    network: LipschitzNetwork, images: Tensor, arithmetic: str
) -> None:
    real = MarginCertifier(network)(images)
    deployed = MarginCertifier(network, "deployed", arithmetic)(images)
    assert (deployed.radius <= real.radius).all()
    assert (deployed.radius > 0.9 * real.radius).double().mean() > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 1.0}, r"rank must lie in \(0, 1\)"),
        ({"kernel": 1}, "kernel be at least stride, got 0.5, 1 and 2"),
        ({"width": 15}, "width and features even, got 15"),
        ({"depth": 0}, "must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bronet.build(input_shape=(1, 8, 8), classes=4, **(bronet.PRESETS["tiny"] | change))
