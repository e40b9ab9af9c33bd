"""The local certificate: nothing in a ball leaves what was proved about it, and planted mistakes are seen."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers import spectral_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from local_lip_vector import EPS, SHIFT, image, network
from torch import Tensor

from lipnext.auditing.audit import audit
from lipnext.certificates import local
from lipnext.certificates.local import LocalCertifier
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import LipschitzBound
from lipnext.core.classifier import Classifier
from lipnext.core.errors import UnsoundError
from lipnext.core.network import LipschitzNetwork
from lipnext.nn.clipped import ClippedReLU
from lipnext.nn.head import PlainHead
from lipnext.nn.pool import L2Pool
from lipnext.systems.local_lip import build

SHAPE = (1, 6, 6)


def _net(activation: str = "relu-theta", seed: int = 0) -> LipschitzNetwork:
    """A small float32 network with biases and limits away from their start."""
    net = build(
        input_shape=SHAPE,
        classes=4,
        convolutions="4x3/2,6x3",
        hidden="10",
        activation=activation,
        ceilings="0.3",
        floors="-0.3",
        seed=seed,
    ).float()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "head" not in name and parameter.dim() != 4:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return net


def _images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def _on_sphere(x: Tensor, eps: Tensor, net: LipschitzNetwork, count: int, seed: int) -> Tensor:
    """Points of the ball around each image: random ones, and along the gradients of the features."""
    g = torch.Generator().manual_seed(seed)
    x = x.detach().requires_grad_()
    features = net.features(x)
    directions = [torch.randn(x.shape, generator=g) for _ in range(count)]
    for k in range(min(count, features.shape[1])):
        (gradient,) = torch.autograd.grad(features[:, k].sum(), x, retain_graph=True)
        directions += [gradient, -gradient]
    points = torch.stack(directions, dim=1)
    lengths = points.flatten(2).norm(dim=2).clamp_min(1e-9)[..., None, None, None]
    # a little shorter than eps, so that the rounding of the points does not matter
    return (x[:, None] + points / lengths * (eps * (1 - 1e-9))[:, None, None, None, None]).detach()


def check_enclosed(activation: str = "relu-theta", seed: int = 0, eps: float = 0.4) -> None:
    """Features of points of the ball lie in ball and box, up to 1e-12 for the rounding of their evaluation."""
    certifier = LocalCertifier(_net(activation, seed))
    net, images = certifier.network, _images(3, seed).double()
    for size in (eps, eps / 8, eps / 64):
        radius = torch.full((len(images),), size)
        with torch.no_grad():
            *hidden, _ = certifier._outputs(images)
            reach, lower, upper = certifier._propagate(images, hidden, radius)
        points = _on_sphere(images, radius, net, 10, seed)
        with torch.no_grad():
            moved = (
                net.features(points.flatten(0, 1)).unflatten(0, points.shape[:2])
                - net.features(images)[:, None]
            )
        assert (moved.norm(dim=2) <= reach[:, None] * (1 + 1e-12) + 1e-12).all()
        assert (moved >= lower[:, None] - 1e-12).all()
        assert (moved <= upper[:, None] + 1e-12).all()


@pytest.mark.parametrize("activation", ["relu-theta", "maxmin"])
@given(seed=st.integers(0, 10**6), eps=st.floats(0.01, 2))
@settings(max_examples=4)
def test_nothing_in_the_ball_leaves_ball_and_box(activation: str, seed: int, eps: float) -> None:
    check_enclosed(activation, seed, eps)


def _short_power_iteration(self: local._Proved, rows: Tensor, columns: Tensor) -> Tensor:
    """The published mistake: two steps from a fixed start, from below."""
    layer = self.stage.affine
    u = columns.double()
    for _ in range(2):
        u = layer.adjoint(layer.product(u, layer.weight) * rows, layer.weight) * columns
    return (layer.product(u, layer.weight) * rows).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)


@torch.no_grad()
def check_norms() -> None:
    """Bounds of masked layers are not below the norm that an SVD finds."""
    certifier, images = LocalCertifier(_net()), _images(5).double()
    *hidden, _ = certifier._outputs(images)
    g, inputs = torch.Generator().manual_seed(0), images
    for proved, outputs in zip(certifier.proved, hidden, strict=True):
        rows, columns = (torch.rand(x.shape, generator=g) < 0.4 for x in (outputs, inputs))
        bounds = proved.norm(rows, columns)
        for k in range(len(images)):
            norm = spectral_norm(proved.matrix * rows[k].flatten()[:, None] * columns[k].flatten())
            assert norm * (1 - 1e-13) <= bounds[k].item() <= 1.02 * norm
        inputs = proved.stage.activate(outputs)


def test_norms_of_masked_layers_are_proved_and_close() -> None:
    check_norms()


PLANTED: dict[str, tuple[type, str, Callable, Callable]] = {
    "norms from below": (local._Proved, "norm", _short_power_iteration, check_norms),
    "no row matters": (ClippedReLU, "feeds", lambda self, varying: varying & False, check_enclosed),
    "a box without its width": (
        local._Proved,
        "box",
        lambda self, lower, upper: (self.stage.affine((lower + upper) / 2),) * 2,
        check_enclosed,
    ),
    "rows without their norm": (
        local._Proved,
        "row_norms",
        lambda self, varying: torch.full((1,), 0.1),
        check_enclosed,
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_mistakes_are_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, mistake, check = PLANTED[bug]
    check()
    monkeypatch.setattr(owner, name, mistake)
    with pytest.raises(AssertionError):
        check()


def test_the_reference_vector_is_proved_where_the_global_bound_fails() -> None:
    net, x = network(SHIFT), image(SHIFT)
    certifier, eps = LocalCertifier(net), torch.tensor([EPS])
    *hidden, logits = certifier._outputs(x)
    torch.testing.assert_close(logits, torch.tensor([[-0.084, 0.2468]]), rtol=0, atol=1e-6)
    reach, lower, upper = certifier._propagate(x, hidden, eps)
    # one unit is left in either layer, so that masked norms and box are the published ones to the last bits
    assert 0.15 * 0.45**0.5 * 0.2 <= reach.item() <= 0.02012461 + 1e-8
    assert (lower[0, 1:] == 0).all()
    assert (upper[0, 1:] == 0).all()
    label = torch.tensor([1])
    assert certifier._holds(x, label, [*hidden, logits], eps).all()
    assert MarginCertifier(net)(x).radius.item() < EPS < certifier(x).radius.item()
    assert certifier(x).label.tolist() == [1]
    # no margin is certified that is not there
    assert not certifier._holds(x, 1 - label, [*hidden, logits], eps).any()


@pytest.mark.parametrize("activation", ["relu-theta", "maxmin"])
def test_radii_are_never_below_the_global_ones_and_mostly_above(activation: str) -> None:
    net, images = _net(activation), _images(24)
    ours, globally = LocalCertifier(net)(images), MarginCertifier(net)(images)
    assert (ours.radius >= globally.radius).all()
    assert (ours.radius > 1.2 * globally.radius).double().mean() > 0.5
    assert torch.equal(ours.label, globally.label)
    assert torch.equal(ours.slack, globally.slack)
    assert ours.per_image
    assert not globally.per_image
    assert (ours.model_sha256, ours.lipschitz) == (globally.model_sha256, globally.lipschitz)


def test_the_constant_grows_with_the_ball_and_never_exceeds_the_global_one() -> None:
    certifier, images = LocalCertifier(_net()), _images(8).double()
    *hidden, _ = certifier._outputs(images)
    constants = []
    for eps in (1e-6, 1e-3, 0.01, 0.1, 0.5, 3.0):
        reach, _, _ = certifier._propagate(images, hidden, torch.full((8,), eps))
        constants.append(reach / eps)
    table = torch.stack(constants)
    # Gram iteration is too large by up to 1.5 % and not by the same for every mask.
    assert (table[1:] >= table[:-1] * 0.98).all()
    assert (table <= certifier.margin.evidence.body.value * (1 + 1e-12)).all()
    assert (table[0] < 0.7 * table[-1]).any()


def test_a_ball_that_shrinks_leaves_the_norms_of_the_active_submatrices() -> None:
    certifier, images = LocalCertifier(_net()), _images(4).double()
    *hidden, _ = certifier._outputs(images)
    reach, _, _ = certifier._propagate(images, hidden, torch.full((4,), 1e-9))
    for k in range(4):
        exact, before = 1.0, torch.ones(math.prod(SHAPE), dtype=torch.bool)
        for proved, centre in zip(certifier.proved, hidden, strict=True):
            assert proved.matrix is not None
            theta = proved.stage.monotone[0].threshold.flatten()
            active = (centre[k].flatten() > 0) & (centre[k].flatten() < theta)
            exact *= spectral_norm(proved.matrix * active[:, None] * before)
            before = active
        assert exact * (1 - 1e-9) <= reach[k].item() / 1e-9 <= exact * 1.05


def test_the_matrix_of_a_layer_is_the_layer() -> None:
    certifier = LocalCertifier(_net())
    x = _images(1).double()
    for proved in certifier.proved:
        layer = proved.stage.affine
        flat = (proved.matrix @ x.flatten()).view_as(layer(x))
        torch.testing.assert_close(flat, layer.product(x, layer.weight))
        x = proved.stage.activate(layer(x))


def test_layers_whose_matrix_is_too_large_fall_back_to_other_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MATRIX", 1)
    certifier = LocalCertifier(_net())
    assert all(proved.matrix is None for proved in certifier.proved)
    assert certifier.describe()["local"]["stages"][0]["bounds"] == ["layer", "collatz-wielandt"]
    check_enclosed("relu-theta")
    assert (certifier(_images(8)).radius >= certifier.margin(_images(8)).radius).all()


def test_deployed_programs_lose_what_their_rounding_costs() -> None:
    net, images = _net(), _images(8)
    real = LocalCertifier(net)(images)
    exact = LocalCertifier(net, "deployed", "float64")(images)
    single = LocalCertifier(net, "deployed", "float32")(images)
    assert (exact.radius <= real.radius).all()
    assert (single.radius < exact.radius)[exact.radius > 0].all()
    assert (single.radius > 0).any()
    assert (single.semantics, single.arithmetic) == ("deployed", "float32")
    assert (single.radius <= math.sqrt(math.prod(SHAPE))).all()


def test_ties_have_no_radius() -> None:
    net = _net()
    with torch.no_grad():
        net.head.weight[1] = net.head.weight[0]
        net.head.bias[:2] = 5.0
    certificate = LocalCertifier(net)(_images(4))
    assert certificate.radius.tolist() == [0.0] * 4


def test_a_number_that_is_none_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = _net(), _images(4)
    monkeypatch.setattr(local._Proved, "norm", lambda self, rows, columns: torch.full((len(rows),), math.nan))
    certifier = LocalCertifier(net)
    assert torch.equal(certifier(images).radius, certifier.margin(images).radius)
    with torch.no_grad():
        net.body[0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(UnsoundError):
        LocalCertifier(net)


def test_layers_of_another_kind_are_refused() -> None:
    net = LipschitzNetwork([L2Pool(4)], PlainHead(2, 2), (2, 2, 2))
    with pytest.raises(UnsoundError, match="for which there is no bound around an image"):
        LocalCertifier(net)


def test_an_audit_finds_nothing_to_refute() -> None:
    net, images = _net().eval(), _images(4).float()
    model = Classifier(net, LocalCertifier, SHAPE, 4, "local-lip").eval()
    certificate = model.certify(images)
    globally = MarginCertifier(net)(images)
    assert (certificate.radius > globally.radius).any()  # which the margin formula would call too large
    found = audit(model, images, certificate.label, {}, steps=10)
    assert found.violations == ()
    assert found.closest() is None or found.closest() > 1


def test_the_evidence_names_its_proofs() -> None:
    stated = LocalCertifier(_net()).describe()
    assert stated["kind"] == "deterministic"
    assert "per image" in stated["certificate"]
    assert [stage["name"] for stage in stated["local"]["stages"]] == ["body.0", "body.2", "body.5"]
    product = LipschitzBound(value=stated["lipschitz"]["bound"], norm=2.0, proof="product")
    assert product.value >= math.prod(layer["bound"] for layer in stated["layers"]) * (1 - 1e-12)
