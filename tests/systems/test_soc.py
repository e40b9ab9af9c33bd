"""SOC as a system: its shapes, its two heads, its losses and what the published code would state."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lipnext.auditing.attack import minimal_norm, pgd, violations
from lipnext.auditing.lipschitz import estimate_lipschitz
from lipnext.certificates.curvature import CurvatureCertifier
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import LossSpec
from lipnext.core.network import LipschitzNetwork
from lipnext.deployment.bundle import load_bundle, save_bundle
from lipnext.nn.curvature_head import CurvatureHead
from lipnext.nn.householder import Householder, Householder2
from lipnext.nn.projection_pool import PairMax, ProjectionPool
from lipnext.nn.skew_convolution import SkewConvolution
from lipnext.systems import experiment
from lipnext.systems.soc import SYSTEM, build, certificate_loss, curvature_loss, published

SHAPE = (1, 8, 8)


def tiny(**changes: object) -> LipschitzNetwork:
    model = {"width": 16, "patch": 4, "hidden": 16, **changes}
    return build(input_shape=SHAPE, classes=3, **model)


def pictures(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.3 * torch.rand(count, *SHAPE, generator=generator)
    images[torch.arange(count), 0, 2 * labels] += 0.6
    return images, labels


def convolutions(net: LipschitzNetwork) -> list[tuple[int, int, int, tuple[int, int]]]:
    return [
        (layer.channels_in, layer.channels_out, layer.weight.shape[-1], layer.input_size)
        for layer in net.body
        if isinstance(layer, SkewConvolution)
    ]


def test_lipconvnet_5_has_the_published_layers() -> None:
    net = build(input_shape=(3, 32, 32), classes=10, width=8)
    assert convolutions(net) == [
        (3, 8, 3, (32, 32)),
        (32, 32, 3, (16, 16)),
        (64, 64, 3, (8, 8)),
        (128, 128, 3, (4, 4)),
        (256, 256, 3, (2, 2)),
        (512, 512, 1, (1, 1)),
    ]
    assert net.head.weight.shape == (10, 256)
    assert sum(isinstance(layer, PairMax) for layer in net.body) == 5
    deeper = convolutions(build(input_shape=(3, 32, 32), classes=10, width=4, depth=2))
    assert deeper[:3] == [(3, 4, 3, (32, 32)), (4, 4, 3, (32, 32)), (16, 16, 3, (16, 16))]
    assert deeper[-2:] == [(256, 256, 1, (1, 1)), (256, 256, 1, (1, 1))]
    with_crc = build(input_shape=(3, 32, 32), classes=10, width=8, head="crc", hidden=20)
    assert sum(isinstance(layer, PairMax) for layer in with_crc.body) == 4
    assert with_crc.head.inner.shape == (20, 512)


def test_activations_and_pools_are_chosen_by_name() -> None:
    kinds = {type(layer) for layer in tiny(activation="hh1", pooling="projection").body}
    assert {Householder, ProjectionPool} <= kinds
    assert Householder2 in {type(layer) for layer in tiny(activation="hh2").body}
    for change, message in (
        ({"activation": "relu"}, "model.activation: must be one of maxmin, hh1, hh2, got 'relu'"),
        ({"pooling": "mean"}, "model.pooling: must be one of max, projection"),
        ({"head": "linear"}, "model.head: must be one of unit-rows, crc"),
        ({"width": 7}, "width even and at least 2"),
        ({"depth": 0}, "depth, patch and hidden must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(**change)


@pytest.mark.parametrize(
    "changes",
    [{"activation": "hh1"}, {"activation": "hh2", "pooling": "projection"}, {"head": "crc"}, {"depth": 2}],
)
def test_each_variant_is_bounded_and_no_attack_changes_a_certified_label(changes: dict[str, object]) -> None:
    net, (images, _) = tiny(**changes).eval(), pictures(9)
    certifier = SYSTEM.certify(net)
    assert isinstance(certifier, CurvatureCertifier if changes.get("head") == "crc" else MarginCertifier)
    certificate = certifier(images)
    bound = certificate.lipschitz
    assert bound is not None
    assert bound.value < 1 + 1e-6
    frozen = net.materialise().double()
    estimate = estimate_lipschitz(frozen.features, images[:3], steps=10)
    assert 0 < estimate.value <= bound.value * (1 + 1e-9)
    assert (certificate.radius > 0).all()
    for result in (
        minimal_norm(frozen, images, certificate.label, steps=15),
        pgd(frozen, images, certificate.label, certificate.radius, steps=5),
    ):
        assert violations(certificate, result).tolist() == []


@pytest.mark.parametrize("semantics", ["real", "deployed"])
def test_float32_and_float64_programs_are_certified_alike(semantics: str) -> None:
    net, (images, _) = tiny(head="crc", activation="hh2").float().eval(), pictures(6)
    certificate = SYSTEM.certify(net, semantics, "float64")(images)  # type: ignore[arg-type]
    assert certificate.semantics == semantics
    assert (certificate.radius > 0).all()


def test_the_published_constant_is_close_to_the_proved_one() -> None:
    net = tiny()
    stated, proved = published(net), net.materialise().lipschitz_bound()
    assert 1.0 < stated.value <= proved.value < stated.value + 1e-6
    assert "50 steps" in stated.method


def test_certificate_regularisation_rewards_the_radii_of_right_samples() -> None:
    net, (images, labels) = tiny(), pictures()
    spec = LossSpec(name="certificate", temperature=0.5, penalty=0.7)
    net.eval()
    loss = certificate_loss(net, images, labels, spec=spec, radius=0.0, progress=0.0)
    logits, rows = net(images), functional.normalize(net.head.weight)
    total = 0.0
    for z, y in zip(logits, labels.tolist(), strict=True):
        radii = [((z[y] - z[j]) / (rows[y] - rows[j]).norm()).item() for j in range(3) if j != y]
        total += max(min(radii), 0.0)
    entropy = 0.5 * functional.cross_entropy(logits / 0.5, labels)
    assert loss.item() == pytest.approx(entropy.item() - 0.7 * total / len(labels), rel=1e-9)


def test_the_curvature_loss_adds_the_mean_over_the_rivals() -> None:
    net, (images, labels) = tiny(head="crc").eval(), pictures()
    spec = LossSpec(name="curvature", temperature=0.5, penalty=0.7)
    loss = curvature_loss(net, images, labels, spec=spec, radius=0.0, progress=0.0)
    assert isinstance(net.head, CurvatureHead)
    table = net.head.curvatures()
    mean = [
        sum(max(table[y, j].item(), table[j, y].item()) for j in range(3) if j != y) / 2
        for y in labels.tolist()
    ]
    entropy = 0.5 * functional.cross_entropy(net(images) / 0.5, labels)
    assert loss.item() == pytest.approx(entropy.item() + 0.7 * math.fsum(mean) / len(mean), rel=1e-9)
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    with pytest.raises(ConfigError, match=r"curvature needs a head that has one; set model\.head=crc"):
        curvature_loss(tiny(), images, labels, spec=spec, radius=0.0, progress=0.0)


def test_validation_estimates_are_close_to_the_certificates() -> None:
    net, (images, _) = tiny(head="crc").eval(), pictures()
    certificate = SYSTEM.certify(net)(images)
    estimated = net.radius_estimator()(images, certificate.label)
    assert (estimated > 0).all()
    # the closed form, against the larger one of it and the dual; curvatures of two power iterations
    assert (estimated <= 1.3 * certificate.radius).all()
    assert (estimated >= 0.5 * certificate.radius).all()


def test_a_bundle_with_a_curvature_certificate_is_read_as_it_was_written(tmp_path: Path) -> None:
    chosen = experiment("soc/digits-crc").override(["model.width=4", "model.patch=4", "model.hidden=16"])
    net, (images, _) = build(input_shape=SHAPE, classes=3, **chosen.model).float(), pictures(6)
    stated = save_bundle(net, chosen, ("a", "b", "c"), tmp_path)
    assert json.loads((tmp_path / "certificate.json").read_text()) == stated
    assert len(stated["curvatures"]) == 3
    one, other = load_bundle(tmp_path).certify(images), load_bundle(tmp_path).certify(images[:1])
    assert one.model_sha256 == stated["model_sha256"]
    assert torch.allclose(one.radius[:1], other.radius, rtol=1e-12)
    assert (one.radius > 0).all()
