"""The certificate of implicit networks: nothing in a ball leaves what was proved about it, and planted mistakes are seen."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.auditing.attack import pgd, violations
from lipnext.bounds import matrix_measure
from lipnext.bounds.matrix_measure import diagonal
from lipnext.certificates import implicit
from lipnext.certificates.implicit import LARGEST_RADIUS, ImplicitCertifier, sensitivity_up
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.errors import UnsoundError
from lipnext.nn.dense import Dense
from lipnext.nn.head import PlainHead
from lipnext.nn.implicit import ImplicitDense
from lipnext.nn.reshape import Flatten
from lipnext.systems.nemon import NemonNetwork, build

SHAPE = (1, 4, 5)

# The reference vector in the coordinates of E z, E = exp(d): an input of two numbers, three units, two classes.
T = torch.tensor([[0.5, -1, 0.25], [0.75, -0.5, 1], [-0.3, 0.6, 0.2]], dtype=torch.float64)
E = torch.tensor([0, 0.2, -0.3], dtype=torch.float64).exp()
U = torch.tensor([[1, 0.5], [-0.5, 1], [0.3, -0.8]], dtype=torch.float64)
B = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
C = torch.tensor([[1, -0.5, 0.2], [-0.3, 0.8, 0.6]], dtype=torch.float64)
X = torch.tensor([0.7, -0.4], dtype=torch.float64)


def _vector() -> NemonNetwork:
    """The network of the vector; its input -0.4 is 0.6 here, with the 1 between them taken off the bias."""
    body = [Flatten(), Dense(2, 3), ImplicitDense(3)]
    net = NemonNetwork(body, PlainHead(3, 2), (1, 1, 2)).double()
    with torch.no_grad():
        body[1].weight.copy_(E[:, None] * U)
        body[1].bias.copy_(E * (B - U[:, 1]))
        body[2].weight.copy_(T)
        net.head.weight.copy_(C / E)
    return net.eval()


def _net(kind: str = "dense", seed: int = 0, **changes: Any) -> NemonNetwork:
    """A small float32 network with a bias."""
    settings: dict[str, Any] = {"width": 8} if kind == "dense" else {"width": 3, "kernel": 3, "stride": 2}
    net = build(input_shape=SHAPE, classes=3, kind=kind, seed=seed, **(settings | changes)).float()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net.body:
            if getattr(layer, "bias", None) is not None:
                layer.bias.add_(0.3 * torch.randn(layer.bias.shape, generator=g))
    return net.eval()


def _images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _solve(net: NemonNetwork, x: Tensor) -> Tensor:
    """The solution by many steps as the paper writes them, float64, with the stored matrix; their rate is below 0.9 here."""
    implicit_layer = next(layer for layer in net.body if hasattr(layer, "matrix"))
    a, v = implicit_layer.matrix(), x
    for layer in net.body:
        if layer is implicit_layer:
            break
        v = layer(v)
    alpha = 1 / (1 - diagonal(a).clamp_max(0).min())
    z = torch.zeros_like(v)
    for _ in range(300):
        z = (1 - alpha) * z + alpha * torch.relu(implicit_layer.product(z, a) + v)
    return z


@torch.no_grad()
def check_enclosed(kind: str = "dense", seed: int = 0, eps: float = 0.2) -> None:
    """Solutions at corners and inner points of the ball lie in the box and within the sensitivities."""
    certifier = ImplicitCertifier(_net(kind, seed))
    net, images = certifier.network, _images(3, seed)
    z, v = _solve(net, images), certifier.stored.injection(images)
    computed = net.features(images).view_as(z)
    centre = certifier._centre_error(computed, v)
    distance = (computed - z).abs().flatten(1).amax(1)
    assert (distance <= centre + 1e-13).all()
    assert (distance <= certifier.stored.iteration.left * z.flatten(1).amax(1) + 1e-13).all()
    g = torch.Generator().manual_seed(seed)
    directions = 2 * torch.rand(8, *images.shape, generator=g, dtype=torch.float64) - 1
    directions = torch.cat([directions, directions.sign()])
    for size in (eps, eps / 16):
        lower, upper = certifier.box(computed, v, centre, torch.full((3,), size, dtype=torch.float64))
        points = images + size * (1 - 1e-12) * directions
        moved = _solve(net, points.flatten(0, 1)).unflatten(0, points.shape[:2])
        assert ((moved - z).abs() <= certifier.stored.sensitivity * size + 1e-12).all()
        assert (moved >= lower - 1e-12).all()
        assert (moved <= upper + 1e-12).all()


@pytest.mark.parametrize("kind", ["dense", "convolution"])
@given(seed=st.integers(0, 10**6), eps=st.floats(0.001, 1))
@settings(max_examples=3)
def test_nothing_in_the_ball_leaves_the_box(kind: str, seed: int, eps: float) -> None:
    check_enclosed(kind, seed, eps)


def check_steep_directions() -> None:
    """The sign of a unit's gradient is the direction in which it moves most: sensitivities hold there as well."""
    certifier = ImplicitCertifier(_net())
    net, x = certifier.network, _images(4).requires_grad_()
    features = net.features(x)
    for unit in range(features.shape[1]):
        (gradient,) = torch.autograd.grad(features[:, unit].sum(), x, retain_graph=True)
        slope = gradient.abs().flatten(1).sum(1)
        assert (slope <= certifier.stored.sensitivity[0, unit] * (1 + 1e-4)).all()


def test_no_gradient_exceeds_the_sensitivity_of_its_unit() -> None:
    check_steep_directions()


PLANTED: dict[str, tuple[Any, str, Callable[..., Any], Callable[[], None]]] = {
    "sensitivities from one step less the feedback": (
        implicit,
        "comparison_up",
        lambda product, matrix, forcing: 0.2 * forcing,
        check_steep_directions,
    ),
    "boxes of the image alone": (
        ImplicitCertifier,
        "box",
        lambda self, z, v, centre, eps: (z - 1e-3 * eps.max(), z + 1e-3 * eps.max()),
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


@torch.no_grad()
def check_few_steps() -> None:
    """Two steps or so leave a third of the way to the solution, in the image and everywhere around it."""
    check_enclosed()
    certifier = ImplicitCertifier(_net())
    assert certifier.stored.iteration.left > 0.1
    points = 2 * _images(50) - 0.5
    executed, solved = (
        certifier.network.head(z)
        for z in (certifier.network.features(points), _solve(certifier.network, points))
    )
    apart = (executed[:, :, None] - executed[:, None]) - (solved[:, :, None] - solved[:, None])
    assert apart.abs().max() > 0.01
    assert (apart.abs() <= certifier.ball_error).all()


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("_centre_error", lambda self, z, v: torch.zeros(len(z), dtype=torch.float64)),
        ("_ball_error", lambda self, arithmetic: torch.zeros(3, 3, dtype=torch.float64)),
    ],
)
def test_a_solver_that_stops_early_has_its_error_counted(
    name: str, mistake: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_measure, "TOLERANCE", 0.3)
    check_few_steps()
    monkeypatch.setattr(ImplicitCertifier, name, mistake)
    with pytest.raises(AssertionError):
        check_few_steps()


def test_the_reference_vector_is_matched_and_its_radius_exceeded() -> None:
    net = _vector()
    x = torch.tensor([[[[0.7, 0.6]]]], dtype=torch.float64)
    certifier = ImplicitCertifier(net)
    stored = certifier.stored
    assert stored.iteration.measure == pytest.approx(0, abs=2e-15)
    # published: ||E U|| / (1 - mu), ||C E^-1||, and the constant of the margin from both
    into = (stored.forcing.max() / stored.iteration.gap).item()
    assert into == pytest.approx(1.8321041372, abs=1e-9)
    assert (C / E).abs().sum(1).max().item() == pytest.approx(1.7648998870, abs=1e-9)
    published = certifier.reach[0, 1].item() * into
    assert published == pytest.approx(5.3209681408, abs=1e-8)
    z = _solve(net, x)
    y = net.head(z)[0]
    torch.testing.assert_close(y, torch.tensor([0.3355916609, 0.0604573922]).double(), rtol=0, atol=1e-9)
    assert ((y[0] - y[1]) / published).item() == pytest.approx(0.0517075580, abs=1e-9)
    # Unit by unit the constant is smaller, by a linear system for the smallest one, and the boxes gain again.
    best = torch.linalg.solve(
        torch.eye(3) - (certifier.stored.sizes + torch.diag(diagonal(stored.matrix))), stored.forcing[0]
    )
    steepness = ((C[0] - C[1]).abs() / E) @ best
    assert certifier.steepness[0, 1].item() == pytest.approx(steepness.item(), rel=1e-6)
    assert steepness < 0.6 * published
    pairwise = (y[0] - y[1]).item() / steepness.item()
    certificate = certifier(x)
    assert certificate.label.tolist() == [0]
    assert pairwise * (1 - 1e-4) < certificate.radius.item()
    # published: what was found from below
    assert steepness >= 0.6636


def test_an_attack_finds_what_bounds_the_radius_of_the_reference_vector() -> None:
    net, x = _vector(), torch.tensor([[[[0.7, 0.6]]]], dtype=torch.float64)
    certificate = ImplicitCertifier(net)(x)
    radius = certificate.radius.item()
    steps = torch.linspace(-1, 1, 41, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).view(-1, 1, 1, 2)
    with torch.no_grad():
        assert (net(x + radius * grid).argmax(1) == 0).all()
        assert not (net(x + 3 * radius * grid).argmax(1) == 0).all() or radius > 0.3


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_boxes_prove_at_least_the_pairwise_radii_and_mostly_more(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images = _net(kind), _images(16)
    both = ImplicitCertifier(net)(images)
    monkeypatch.setattr(ImplicitCertifier, "_grow", lambda self, z, v, centre, labels, radius: radius)
    pairwise = ImplicitCertifier(net)(images)
    assert (both.radius >= pairwise.radius).all()
    assert (both.radius > 1.05 * pairwise.radius).double().mean() > 0.3
    assert both.per_image
    assert both.norm == math.inf
    assert both.lipschitz == pairwise.lipschitz
    assert both.lipschitz.value == sensitivity_up(net.materialise()).max().item()
    certifier, own = ImplicitCertifier(net), pairwise.label[:, None]
    y = certifier.network.head(_solve(certifier.network, images).flatten(1))
    ratio = (y.gather(1, own) - y) / certifier.steepness[pairwise.label]
    least = ratio.scatter(1, own, math.inf).min(1).values
    assert (pairwise.radius <= least).all()
    assert (pairwise.radius >= least - 1e-3).all()


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_no_attack_changes_a_label_within_its_radius(kind: str) -> None:
    net, images = _net(kind), _images(16)
    certifier = ImplicitCertifier(net)
    certificate = certifier(images)
    assert (certificate.radius > 0).double().mean() > 0.8
    found = pgd(certifier.network, images, certificate.label, certificate.radius, steps=10, norm=math.inf)
    assert not violations(certificate, found).any()


@torch.no_grad()
def check_deployed(arithmetic: str = "float32", kind: str = "dense") -> None:
    """Executed margins at points of the type in the ball stay within the stated error of those of the solution."""
    net = _net(kind).materialise()
    certifier = ImplicitCertifier(net, "deployed", arithmetic)
    images = _images(8)
    program = net.float() if arithmetic == "float32" else certifier.network
    points = (
        images + 0.3 * (2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1)
    ).to(next(program.parameters()).dtype)
    executed = program(points).double()
    solved = certifier.network.head(_solve(certifier.network, points.double()).flatten(1))
    apart = (executed[:, :, None] - executed[:, None]) - (solved[:, :, None] - solved[:, None])
    assert (apart.abs() <= certifier.ball_error + 1e-13).all()


@pytest.mark.parametrize("kind", ["dense", "convolution"])
@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_executed_programs_stay_within_the_stated_error(arithmetic: str, kind: str) -> None:
    check_deployed(arithmetic, kind)


def test_a_forgotten_error_of_the_program_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ImplicitCertifier,
        "_ball_error",
        lambda self, arithmetic: torch.full((3, 3), 1e-9, dtype=torch.float64),
    )
    with pytest.raises(AssertionError):
        check_deployed()


def test_deployed_radii_are_smaller_and_say_so() -> None:
    net, images = _net(), _images(8)
    real, double, single = (
        ImplicitCertifier(net, semantics, arithmetic)(images)
        for semantics, arithmetic in (("real", "float64"), ("deployed", "float64"), ("deployed", "float32"))
    )
    assert torch.equal(real.label, single.label)
    assert (real.slack < single.slack).all()
    assert (real.slack <= double.slack).all()
    assert (single.radius <= double.radius).all()
    assert (single.semantics, single.arithmetic) == ("deployed", "float32")
    with pytest.raises(UnsoundError, match="a program in float32 needs weights stored in float32"):
        ImplicitCertifier(net.double(), "deployed", "float32")


def test_a_program_whose_steps_add_up_rounding_errors_is_refused() -> None:
    net = _net(measure=0.9999)
    with torch.no_grad():
        net.body[2].weight.mul_(100)
    assert ImplicitCertifier(net, "deployed", "float64").ball_error.isfinite().all()
    with pytest.raises(UnsoundError, match="rounding errors of the implicit layer's steps may grow"):
        ImplicitCertifier(net, "deployed", "float32")


def test_ties_and_far_images_get_what_they_may() -> None:
    net = _net()
    with torch.no_grad():
        net.head.weight[1] = net.head.weight[0]
        net.head.weight[2] = 0
        net.head.bias.zero_()
        net.head.bias[2] = -1.0
    tied = ImplicitCertifier(net)(_images(4))
    assert (tied.radius == 0).all()
    with torch.no_grad():
        net.head.bias[0] = 1e6
    far = ImplicitCertifier(net)(_images(4))
    assert (far.radius == LARGEST_RADIUS).all()


def test_networks_of_another_form_are_refused() -> None:
    head = PlainHead(8, 3)
    with pytest.raises(
        UnsoundError, match=r"a body of one affine and one implicit layer, .* got Flatten, Dense"
    ):
        ImplicitCertifier(NemonNetwork([Flatten(), Dense(20, 8)], head, SHAPE))
    body = [Flatten(), Dense(20, 8), ImplicitDense(8), ImplicitDense(8)]
    with pytest.raises(UnsoundError, match="got Flatten, Dense, ImplicitDense, ImplicitDense"):
        ImplicitCertifier(NemonNetwork(body, head, SHAPE))
    with pytest.raises(UnsoundError, match="cannot reshape between the affine and the implicit layer"):
        ImplicitCertifier(NemonNetwork([Flatten(), Dense(20, 8), Flatten(), ImplicitDense(8)], head, SHAPE))
    stored = _net().materialise()
    with torch.no_grad():
        stored.body[2].weight[0, 0] += 3
    with pytest.raises(UnsoundError, match="which must be below 1: its equation may have no solution"):
        ImplicitCertifier(stored)


def test_the_l2_certificate_does_not_speak_of_implicit_networks() -> None:
    with pytest.raises(UnsoundError, match="in l2 with one in linf"):
        MarginCertifier(_net())


def test_the_evidence_says_what_was_proved() -> None:
    certifier = ImplicitCertifier(_net(), "deployed", "float32")
    proved = certifier.describe()
    assert proved["implicit"]["measure"] < 1
    assert proved["implicit"]["left"] < 1e-6
    assert proved["implicit"]["steps"] > 10
    assert proved["lipschitz"]["bound"] == proved["implicit"]["sensitivity"][1]
    assert proved["ball_error"].keys() == {"real", "float64", "float32"}
    assert proved["ball_error"]["float32"] == certifier.ball_error.tolist()
    assert proved["ball_error"]["real"][0][1] < proved["ball_error"]["float32"][0][1]
    amplified = _net(measure=0.9999)
    with torch.no_grad():
        amplified.body[2].weight.mul_(100)
    assert ImplicitCertifier(amplified).describe()["ball_error"].keys() == {"real", "float64"}
