"""CPL as a whole: sizes as published, both certificates, and what the estimated norm of the published code hides."""

import math
from pathlib import Path

import pytest
import torch

from lipnext import systems
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.network import LipschitzNetwork
from lipnext.deployment.bundle import load_bundle, polish, save_bundle
from lipnext.nn.convex_potential import ConvexPotential

SYSTEM = systems.get("cpl")
SHAPE = (1, 8, 8)


def network(**changes: int | bool) -> LipschitzNetwork:
    net = SYSTEM.build(input_shape=SHAPE, classes=4, **{**SYSTEM.presets["tiny"], **changes})
    assert isinstance(net, LipschitzNetwork)
    return net.float()


def pictures() -> torch.Tensor:
    return torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(1))


def parameters(width: int, depth: int, dense_depth: int, inner: int, dense_inner: int, side: int) -> int:
    features = width * (side // 4) ** 2
    return depth * inner * (9 * width + 1) + dense_depth * dense_inner * (features + 1)


@pytest.mark.parametrize(
    ("size", "millions"), [("small", 41), ("medium", 78), ("large", 118), ("xlarge", 236)]
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(size: str, millions: int) -> None:
    preset = {key: int(value) for key, value in SYSTEM.presets[size].items()}
    assert parameters(**preset, inner=5, dense_inner=2048, side=32) / 1e6 == pytest.approx(millions, rel=0.02)
    tiny = {key: int(value) for key, value in SYSTEM.presets["tiny"].items()}
    head = 4 * (8 * 4 + 1)
    assert sum(p.numel() for p in network().parameters()) == parameters(**tiny, inner=5, side=8) + head


def test_with_the_published_head_the_radius_is_the_margin_over_root_two() -> None:
    stored = polish(network(unit_rows=False))
    radius = MarginCertifier(stored)(pictures()).radius
    top = stored.double()(pictures()).topk(2, dim=1).values
    wanted = (top[:, 0] - top[:, 1]) / math.sqrt(2)
    torch.testing.assert_close(radius, wanted, rtol=1e-9, atol=1e-9)
    assert (radius <= wanted).all()


def test_the_proved_constant_of_what_is_stored_is_one() -> None:
    stored = polish(network())
    certificate = MarginCertifier(stored)(pictures())
    assert certificate.lipschitz is not None
    assert certificate.lipschitz.value == stored.lipschitz_bound().value == 1.0


def test_the_constant_that_the_published_code_states_is_below_that_of_its_own_steps() -> None:
    """Steps from random vectors, as before a first power iteration: the body is no longer 1-Lipschitz."""
    net = network().eval()
    assert SYSTEM.published is not None
    stated = SYSTEM.published(net)
    assert stated.value == 1.0
    for layer in net.body:
        if isinstance(layer, ConvexPotential):
            name = "image" if hasattr(layer.inner, "image") else "vector"
            start = torch.randn_like(getattr(layer.inner, name))
            setattr(layer.inner, name, start / start.norm())
    assert net.lipschitz_bound().value > 1.5 * stated.value
    assert net.double().materialise().lipschitz_bound().value == 1.0


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_the_executed_program_is_certified_too(arithmetic: str) -> None:
    stored = polish(network())
    real = MarginCertifier(stored)(pictures())
    deployed = MarginCertifier(stored, "deployed", arithmetic)(pictures())
    assert (deployed.radius <= real.radius).all()
    assert (real.radius - deployed.radius).max() < {"float64": 1e-9, "float32": 0.05}[arithmetic]


def test_a_bundle_gives_the_same_certificates_again(tmp_path: Path) -> None:
    net = network()
    said = save_bundle(net, systems.experiment("cpl/tiny"), ("a", "b", "c", "d"), tmp_path)
    assert said["lipschitz"]["bound"] == 1.0
    again = load_bundle(tmp_path).certify(pictures())
    wanted = MarginCertifier(polish(net))(pictures())
    assert torch.equal(again.radius, wanted.radius)
    assert again.model_sha256 == wanted.model_sha256


def test_the_published_loss_is_the_hinge() -> None:
    loss = systems.experiment("cpl/cifar10-xlarge").loss
    assert (loss.name, loss.offset) == ("hinge", 0.7)
