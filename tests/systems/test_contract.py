"""What every system keeps, whatever it is made of; a new file in `lipnext/systems` is tested at once."""

import contextlib
import copy
import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext import systems
from lipnext.auditing.attack import AttackResult, minimal_norm, pgd, violations
from lipnext.auditing.lipschitz import estimate_lipschitz
from lipnext.auditing.orthogonality import residuals
from lipnext.core.certificate import Certificate
from lipnext.core.classifier import Classifier
from lipnext.core.errors import DataError, UnsoundError
from lipnext.core.experiment import Experiment, LossSpec
from lipnext.core.module import LipschitzModule
from lipnext.core.seed import generator, seeded
from lipnext.core.system import System
from lipnext.optim.average import RetractedAverage
from lipnext.optim.groups import split_parameters
from lipnext.optim.muon import ManifoldMuon
from lipnext.optim.orthogonal import OrthogonalOptimizer
from lipnext.optim.orthogonal_adam import OrthogonalAdam
from lipnext.training.objective import Objective

SHAPE, CLASSES, STEPS = (1, 8, 8), 4, 20
OPTIMIZERS: dict[str, Callable[[list[Tensor]], OrthogonalOptimizer]] = {
    "adam": lambda params: OrthogonalAdam(params, lr=1e-2),
    "muon": lambda params: ManifoldMuon(params, lr=5e-2),
}

every_system = pytest.mark.parametrize("name", systems.list_systems())
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_experiment = pytest.mark.parametrize(
    ("name", "title"),
    [(name, title) for name in systems.list_systems() for title in systems.get(name).experiments],
)


def build(system: System) -> nn.Module:
    """The tiny preset in float32, as users have it."""
    with seeded(0):
        return system.build(input_shape=SHAPE, classes=CLASSES, **system.presets["tiny"]).float()


@functools.cache
def pictures() -> tuple[Tensor, Tensor]:
    """64 float32 images (64, 1, 8, 8) and labels: one bright quadrant a class, and noise."""
    noise = generator("contract")
    labels = torch.arange(64) % CLASSES
    images = 0.3 * torch.rand(64, *SHAPE, generator=noise, dtype=torch.float32)
    for index, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[index, 0, row : row + 4, column : column + 4] += 0.6
    return images, labels


def loss_of(system: System, net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    make = system.experiments.get("tiny")
    spec = LossSpec(temperature=0.25) if make is None else make().loss
    return Objective(spec, system.losses).of(net, images, labels, 0.2, contextlib.nullcontext())


@dataclass(frozen=True)
class Trained:
    net: nn.Module
    average: RetractedAverage
    first_loss: float
    last_loss: float


@functools.cache
def trained(name: str, optimizer: str = "muon") -> Trained:
    """Twenty full-batch steps from the tiny preset; shared by the tests, which change copies only."""
    system = systems.get(name)
    net = build(system).train()
    images, labels = pictures()
    orthogonal, euclidean = split_parameters(net)
    rules: list[torch.optim.Optimizer] = []
    if orthogonal:
        rules.append(OPTIMIZERS[optimizer](list(orthogonal.values())))
    if euclidean:
        rules.append(torch.optim.Adam(list(euclidean.values()), lr=1e-2))
    average = RetractedAverage(dict(net.named_parameters()), decay=0.9)
    history = []
    for _ in range(STEPS):
        loss = loss_of(system, net, images, labels)
        net.zero_grad(set_to_none=True)
        loss.backward()
        for rule in rules:
            rule.step()
        average.update()
        history.append(loss.item())
    net.zero_grad(set_to_none=True)
    with torch.no_grad():
        last = loss_of(system, net, images, labels).item()
    net.finalise([images])
    return Trained(net.eval(), average, history[0], last)


def certified_function(net: nn.Module) -> nn.Module:
    """What a certificate speaks of: the stored weights in float64, products formed once."""
    stored = net.materialise() if isinstance(net, LipschitzModule) else copy.deepcopy(net)
    return stored.double().eval().requires_grad_(False)


def classifier(name: str, net: nn.Module) -> Classifier:
    return Classifier(net, systems.get(name).certify, SHAPE, CLASSES, name)


@functools.cache
def certificate_of(name: str) -> Certificate:
    return classifier(name, trained(name).net).certify(pictures()[0])


def assert_same_certificate(one: Certificate, other: Certificate) -> None:
    for field in ("label", "radius", "margin", "slack"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert (one.model_sha256, one.lipschitz) == (other.model_sha256, other.lipschitz)


# 1
@every_system
def test_tiny_is_tiny(name: str) -> None:
    assert 0 < sum(p.numel() for p in build(systems.get(name)).parameters()) < 200_000


# 2
@every_system
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_have_the_right_form_and_gradients_reach_every_parameter(
    name: str, dtype: torch.dtype
) -> None:
    net = build(systems.get(name)).to(dtype)
    images, labels = pictures()
    logits = net(images.to(dtype))
    assert logits.shape == (len(images), CLASSES)
    assert logits.dtype == dtype
    deployed = copy.deepcopy(net).eval()
    alone = torch.cat([deployed(image[None].to(dtype)) for image in images[:3]])
    # A sum of a few hundred terms may be ordered differently for another batch.
    torch.testing.assert_close(
        alone, deployed(images.to(dtype))[:3], rtol=0, atol=1e3 * torch.finfo(dtype).eps
    )
    functional.cross_entropy(logits, labels).backward()
    for path, parameter in net.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().max() > 0, path


# 3
@every_system
@pytest.mark.parametrize("state", ["fresh", "trained"])
def test_no_pair_of_points_is_driven_apart_by_more_than_the_bound(name: str, state: str) -> None:
    system = systems.get(name)
    net = trained(name).net if state == "trained" else build(system).eval()
    function = certified_function(net)
    if not hasattr(function, "features"):
        pytest.skip(f"{name} has no features: its radius does not rest on a bound of them")
    images = pictures()[0][:6].double()
    bound = classifier(name, net).certify(images).lipschitz
    assert bound is not None
    estimate = estimate_lipschitz(function.features, images, steps=40, norm=system.norm)
    # The ratio of two computed norms is off by some 1e-12 for the nearest pairs.
    assert 0 < estimate.value <= bound.value * (1 + 1e-9)


# 4
@every_system
def test_no_attack_changes_a_label_within_its_radius(name: str) -> None:
    system, certificate = systems.get(name), certificate_of(name)
    assert (certificate.radius > 0).double().mean() > 0.5
    if certificate.kind != "deterministic":
        pytest.skip(f"{name}: a smoothed classifier has no gradient to attack; its radius may fail at times")
    function = certified_function(trained(name).net)
    images = pictures()[0].double()

    def attack(result: AttackResult) -> AttackResult:
        assert violations(certificate, result).tolist() == []
        return result

    attack(pgd(function, images, certificate.label, certificate.radius, steps=20, norm=system.norm))
    far = attack(pgd(function, images, certificate.label, 4.0, steps=20, norm=system.norm))
    # An attack that finds nothing at any distance would prove nothing here.
    assert far.success.double().mean() > 0.5
    if system.norm == 2.0:
        assert attack(minimal_norm(function, images, certificate.label, steps=40)).success.all()


# 5
@every_system
def test_labels_are_the_largest_logits_and_radii_are_finite_and_not_negative(name: str) -> None:
    system, certificate = systems.get(name), certificate_of(name)
    logits = certified_function(trained(name).net)(pictures()[0].double())
    if certificate.kind == "deterministic":  # a vote under noise may differ from what the image itself gives
        assert torch.equal(certificate.label, logits.argmax(dim=1))
    assert certificate.radius.isfinite().all()
    assert (certificate.radius >= 0).all()
    assert certificate.norm == system.norm


@every_system
def test_an_empty_batch_has_an_empty_certificate(name: str) -> None:
    assert len(classifier(name, trained(name).net).certify(pictures()[0][:0])) == 0


# 6
@every_system
def test_saving_and_loading_gives_the_same_certificates_bit_for_bit(name: str) -> None:
    saved = safetensors.torch.save(trained(name).net.state_dict())
    fresh = build(systems.get(name)).eval()
    before = classifier(name, fresh).certify(pictures()[0])
    fresh.load_state_dict(safetensors.torch.load(saved))
    assert_same_certificate(classifier(name, fresh).certify(pictures()[0]), certificate_of(name))
    assert before.model_sha256 != certificate_of(name).model_sha256


# 7
@every_system
@pytest.mark.parametrize("frozen", [False, True])
def test_copies_and_averages_keep_the_constraints(name: str, frozen: bool) -> None:
    net = copy.deepcopy(trained(name).net).requires_grad_(not frozen)
    duplicate = copy.deepcopy(net)
    assert residuals(duplicate) == residuals(net)
    assert_same_certificate(classifier(name, duplicate).certify(pictures()[0]), certificate_of(name))
    averaged = trained(name).average.network(net).eval()
    assert residuals(averaged).keys() == residuals(net).keys()
    assert max(residuals(averaged).values(), default=0.0) <= 1e-5
    weights = dict(net.named_parameters())
    assert any(not torch.equal(p, weights[path]) for path, p in averaged.named_parameters())
    assert (classifier(name, averaged).certify(pictures()[0]).radius > 0).double().mean() > 0.5


# 8
@every_system
@every_optimizer
def test_twenty_steps_lower_the_loss_and_keep_the_constraints(name: str, optimizer: str) -> None:
    run = trained(name, optimizer)
    assert math.isfinite(run.last_loss)
    assert run.last_loss < 0.9 * run.first_loss
    assert max(residuals(run.net).values(), default=0.0) <= 1e-4


# 9
@every_experiment
def test_an_experiment_builds_and_survives_its_file(name: str, title: str, tmp_path: Path) -> None:
    system = systems.get(name)
    make = system.experiments[title]
    experiment = make()
    assert experiment.system == name
    assert experiment.preset == title
    assert inspect.getdoc(make)
    experiment.to_yaml(tmp_path / "experiment.yaml")
    read = Experiment.from_yaml(tmp_path / "experiment.yaml")
    assert read == experiment
    assert read.digest() == experiment.digest() == make().digest()
    bound = inspect.signature(system.build).bind(input_shape=SHAPE, classes=CLASSES, **experiment.model)
    if experiment.data.name == "digits":  # the others are sized for larger images, or take minutes to draw
        assert system.build(*bound.args, **bound.kwargs)(pictures()[0][:2].double()).shape == (2, CLASSES)


# 10
@every_system
def test_a_system_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    system = systems.get(name)
    assert system.reference.strip()
    assert system.summary.strip()
    assert inspect.getdoc(importlib.import_module(f"lipnext.systems.{name.replace('-', '_')}"))
    assert inspect.getdoc(system.build)


# What no system certifies.
@every_system
def test_networks_that_cannot_be_certified_are_refused(name: str) -> None:
    images = pictures()[0][:2]
    net = copy.deepcopy(trained(name).net)
    with pytest.raises(UnsoundError, match="cannot certify in train mode"):
        classifier(name, net.train()).certify(images)
    model = classifier(name, net).eval()
    with pytest.raises(UnsoundError, match="cannot certify under autocast"), torch.autocast("cpu"):
        model.certify(images)
    assert len(model.certify(images)) == 2
    with pytest.raises(UnsoundError, match=r"in torch\.bfloat16; store the weights in float32 or float64"):
        model.bfloat16().certify(images)


@every_system
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: (255 * x).to(torch.uint8), "got uint8; divide by 255"),
        (lambda x: 255 * x, r"images must lie in \[0, 1\], got values from"),
        (lambda x: x - 0.5, r"images must lie in \[0, 1\], got values from -0\."),
        (lambda x: x * math.nan, "images must be finite"),
        (lambda x: x[:, :, :7], r"must have the shape \(n, 1, 8, 8\), got \(2, 1, 7, 8\)"),
        (lambda x: x[0], "got one image"),
    ],
)
def test_images_of_another_form_are_refused(
    name: str, spoil: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        classifier(name, trained(name).net).certify(spoil(pictures()[0][:2]))
