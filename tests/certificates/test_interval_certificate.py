"""The certificate of l-infinity networks: never below half the margin, nothing inside the ball, mistakes are seen."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipnext.auditing.attack import pgd, violations
from lipnext.certificates import interval
from lipnext.certificates.interval import IntervalCertifier
from lipnext.core.certificate import Certificate
from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import tensor_down
from lipnext.nn.dense import Dense
from lipnext.nn.head import PlainHead
from lipnext.nn.sort_neuron import SortDense
from lipnext.systems.sortnet import SortNetwork, build

SHAPE, CLASSES = (1, 3, 4), 3
KINDS: dict[str, dict[str, Any]] = {"pure": {"keep": 0.6}, "distance": {"keep": 1.0}, "mlp": {"hidden": 5}}
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def images() -> Tensor:
    return torch.rand(24, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@functools.cache
def _trained(kind: str) -> SortNetwork:
    """Means that fit, and logits with margins of some size; float32."""
    net = build(input_shape=SHAPE, classes=CLASSES, width=10, depth=4, terms=4, **KINDS[kind]).float()
    net.finalise([images().float()])
    with torch.no_grad():
        features = net.eval().features(images().float())
        if kind == "mlp":
            net.head.inner *= 10  # so that tanh is flat in places
            net.head.bias -= net(images().float()).mean(0)
        else:
            net.head.weight.copy_(features[:CLASSES])
    return net


def network(kind: str) -> SortNetwork:
    return copy.deepcopy(_trained(kind))


def half_margin(net: SortNetwork, certificate: Certificate) -> Tensor:
    logits = net.double()(images())
    gap = logits.gather(1, certificate.label[:, None]) - logits
    gap = gap / net.head.distances()[certificate.label]
    return gap.scatter(1, certificate.label[:, None], math.inf).amin(1).detach()


@every_kind
def test_radii_are_at_least_those_of_the_margin_and_larger_behind_an_mlp(kind: str) -> None:
    net = network(kind)
    certificate = IntervalCertifier(net)(images())
    margin = half_margin(net, certificate)
    assert (certificate.radius >= margin - 1e-12).all()
    if kind == "mlp":  # distances all move by eps, so boxes add next to nothing without it
        assert (certificate.radius > 1.2 * margin).double().mean() > 0.9
    assert (certificate.radius > 0).all()
    assert ((certificate.slack > 0) & (certificate.slack < 1e-11)).all()
    assert certificate.norm == math.inf


@pytest.mark.parametrize("kind", ["pure", "distance"])
def test_boxes_prove_whatever_half_the_margin_proves(kind: str) -> None:
    net = network(kind)
    certifier = IntervalCertifier(net)
    label = certifier(images()).label
    margin = half_margin(net, certifier(images()))
    assert certifier.holds(images(), label, margin * (1 - 1e-9)).all()
    assert not certifier.holds(images(), label, margin * 50).any()
    low, high = certifier.box(images(), torch.full((24,), 0.05, dtype=torch.float64))
    features = net.double().features(images())
    assert (low >= features - 0.05 - 1e-12).all()
    assert (high <= features + 0.05 + 1e-12).all()


@every_kind
@pytest.mark.parametrize("semantics", ["real", "deployed"])
def test_no_point_of_the_ball_has_another_label(kind: str, semantics: Any) -> None:
    net = network(kind)
    arithmetic = "float64" if semantics == "real" else "float32"
    certificate = IntervalCertifier(net, semantics, arithmetic)(images())
    assert (certificate.radius > 0).double().mean() > 0.9
    function = net.double() if semantics == "real" else net
    x = images().to(next(function.parameters()).dtype)
    for radius in (certificate.radius, torch.full_like(certificate.radius, 2.0)):
        result = pgd(function, x, certificate.label, radius.to(x.dtype), steps=15, norm=math.inf)
        assert violations(certificate, result).tolist() == []
    assert result.success.double().mean() > 0.5  # an attack that finds nothing at any distance shows nothing
    noise = 2 * torch.rand(100, *x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype) - 1
    points = x + certificate.radius.to(x.dtype)[:, None, None, None] * noise.sign() * (1 - 1e-6)
    found = function(points.flatten(0, 1)).argmax(1).view(100, -1)
    assert (found == certificate.label).all()


@every_kind
def test_deployed_radii_are_a_little_smaller(kind: str) -> None:
    net = network(kind)
    real, double, single = (
        IntervalCertifier(net, s, a)(images()).radius
        for s, a in (("real", "float64"), ("deployed", "float64"), ("deployed", "float32"))
    )
    # Bisection stops within some hundredths; what rounding costs is less than that.
    assert (double <= real * (1 + 1e-9)).all()
    assert (single <= real * 1.05).all()
    assert (double >= 0.9 * real).all()
    assert (single >= 0.9 * real).double().mean() > 0.9


def _bigger_coefficients(net: SortNetwork) -> None:
    net.body[1].coefficients[0] += 0.5


def test_a_layer_that_is_not_one_lipschitz_lowers_the_radius() -> None:
    net = network("pure")
    _bigger_coefficients(net)
    certifier = IntervalCertifier(net)
    assert certifier.body.value == 1.5
    certificate = certifier(images())
    result = pgd(net.double(), images(), certificate.label, certificate.radius, steps=15, norm=math.inf)
    assert violations(certificate, result).tolist() == []


def _no_spread(lower: Tensor, upper: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (lower + upper) / 2, (lower + upper) / 2


@pytest.mark.parametrize("bug", ["half", "box"])
def test_planted_mistakes_are_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network("pure")
    if bug == "half":  # twice the margin instead of half of it, and no boxes
        monkeypatch.setattr(IntervalCertifier, "_grow", lambda self, x, labels, radius: 4 * radius)
    else:  # boxes that forget their width in one layer
        layer = net.body[1]
        kept = SortDense.box

        def forgetful(
            self: SortDense, lower: Tensor, upper: Tensor, unit: float | None
        ) -> tuple[Tensor, Tensor]:
            lower, upper = kept(self, lower, upper, unit)
            return _no_spread(lower, upper) if self.weight.shape == layer.weight.shape else (lower, upper)

        monkeypatch.setattr(SortDense, "box", forgetful)
        monkeypatch.setattr(interval, "GROWN", 6)
    certificate = IntervalCertifier(net)(images())
    result = pgd(net.double(), images(), certificate.label, certificate.radius, steps=30, norm=math.inf)
    assert len(violations(certificate, result)) > 0


def test_ties_have_no_radius() -> None:
    net = network("pure")
    with torch.no_grad():
        net.head.weight[1] = net.head.weight[0]
        net.head.bias[1] = net.head.bias[0]
        net.head.bias[2] = -100.0
    certificate = IntervalCertifier(net)(images())
    assert (certificate.label == 0).all()
    assert (certificate.radius == 0).all()


def test_classes_are_interchangeable() -> None:
    net, order = network("pure"), torch.tensor([2, 0, 1])
    first = IntervalCertifier(net)(images())
    with torch.no_grad():
        net.head.weight.copy_(net.head.weight[order].clone())
        net.head.bias.copy_(net.head.bias[order].clone())
    second = IntervalCertifier(net)(images())
    assert torch.equal(order[second.label], first.label)
    torch.testing.assert_close(second.radius, first.radius, rtol=0, atol=1e-15)


def test_where_a_number_overflows_nothing_is_proved() -> None:
    net = network("pure").double()
    with torch.no_grad():
        net.body[1].weight[0] = 1e308
        net.body[3].weight[0] = -1e308
    certificate = IntervalCertifier(net)(images())
    assert (certificate.radius == 0).all()
    assert torch.isfinite(certificate.margin).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["body.1.weight", "body.2.mean", "head.scale"])
def test_numbers_that_are_none_are_refused(value: float, where: str) -> None:
    net = network("pure")
    with torch.no_grad():
        net.get_parameter(where).fill_(value) if "mean" not in where else net.get_buffer(where).fill_(value)
    with pytest.raises(UnsoundError, match=f"cannot certify: {where} holds NaN or infinity"):
        IntervalCertifier(net)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda net: net.body.insert(1, Dense(12, 12)), "body.1 is a Dense, which does not answer for boxes"),
        (lambda net: net.body.insert(1, nn.Identity()), "body.1 is a Identity, which has no proved"),
        (lambda net: setattr(net, "head", PlainHead(10, 3)), "needs a IntervalHead, got a PlainHead"),
    ],
)
def test_unknown_layers_are_refused(spoil: Callable[[SortNetwork], Any], message: str) -> None:
    net = network("pure")
    spoil(net)
    with pytest.raises(UnsoundError, match=message):
        IntervalCertifier(net)


def test_the_evidence_names_every_layer() -> None:
    stated = IntervalCertifier(network("pure")).describe()
    assert [layer["name"] for layer in stated["layers"]] == [f"body.{k}" for k in range(1, 7)]
    assert all(layer["bound"] == 1.0 for layer in stated["layers"])
    assert stated["lipschitz"]["bound"] == 1.0
    scale = _trained("pure").head.scale.double().abs().item()
    constants = torch.tensor(stated["constants"], dtype=torch.float64)
    assert (constants >= 2 * scale).all()
    assert (tensor_down(tensor_down(constants)) <= 2 * scale).all()
