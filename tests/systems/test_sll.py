"""SLL as a whole: its bound is a theorem up to rounding, which is counted; sizes and loss as published."""

import math
from pathlib import Path

import pytest
import torch

from lipnext import systems
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.network import LipschitzNetwork
from lipnext.deployment.bundle import load_bundle, polish, save_bundle
from lipnext.nn.sdp_residual import SdpResidual

SYSTEM = systems.get("sll")
SHAPE = (1, 8, 8)


def network() -> LipschitzNetwork:
    net = SYSTEM.build(input_shape=SHAPE, classes=4, **SYSTEM.presets["tiny"])
    assert isinstance(net, LipschitzNetwork)
    return net.float()


def pictures() -> torch.Tensor:
    return torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_the_proved_constant_of_what_is_stored_is_the_published_one() -> None:
    stored = polish(network())
    assert SYSTEM.published is not None
    assert stored.lipschitz_bound().value == SYSTEM.published(stored).value == 1.0
    assert "float32" in SYSTEM.published(stored).method


def test_scales_that_are_too_large_raise_the_constant_and_lower_the_radii() -> None:
    stored = polish(network())
    for layer in stored.body:
        if isinstance(layer, SdpResidual) and layer.inner.weight.dim() == 2:
            assert layer.scale is not None
            layer.scale = 2 * layer.scale
    bound = stored.lipschitz_bound().value
    assert 2.99 < bound <= 3.0
    radius = MarginCertifier(stored)(pictures()).radius
    logits = stored.double()(pictures())
    rows = stored.head.weight
    for z, r in zip(logits, radius.tolist(), strict=True):
        label = int(z.argmax())
        rivals = [k for k in range(4) if k != label]
        wanted = min(((z[label] - z[k]) / (bound * (rows[label] - rows[k]).norm())).item() for k in rivals)
        assert r == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_the_executed_program_is_certified_too(arithmetic: str) -> None:
    stored = polish(network())
    real = MarginCertifier(stored)(pictures())
    deployed = MarginCertifier(stored, "deployed", arithmetic)(pictures())
    assert (deployed.radius <= real.radius).all()
    assert (real.radius - deployed.radius).max() < {"float64": 1e-9, "float32": 0.05}[arithmetic]


def test_a_bundle_gives_the_same_certificates_again(tmp_path: Path) -> None:
    net = network()
    said = save_bundle(net, systems.experiment("sll/tiny"), ("a", "b", "c", "d"), tmp_path)
    assert said["lipschitz"]["bound"] == 1.0
    again = load_bundle(tmp_path).certify(pictures())
    wanted = MarginCertifier(polish(net))(pictures())
    assert torch.equal(again.radius, wanted.radius)
    assert again.model_sha256 == wanted.model_sha256


def test_the_sizes_are_those_of_cpl() -> None:
    published = systems.get("cpl").presets
    assert all(SYSTEM.presets[name] == published[name] for name in ("small", "medium", "large", "xlarge"))


def test_the_published_loss_is_offset_cross_entropy() -> None:
    loss = systems.experiment("sll/cifar10-xlarge").loss
    assert (loss.name, loss.temperature) == ("cross-entropy", 0.25)
    assert loss.offset == pytest.approx(3 * math.sqrt(2) / 2)
