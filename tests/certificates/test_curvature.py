"""The curvature certificate against exact arithmetic, the published formulas and the boundary itself."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import mpmath
import pytest
import torch
from helpers import Flatten
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.auditing.attack import minimal_norm, violations
from lipnext.certificates import curvature
from lipnext.certificates.curvature import CurvatureCertifier, _Pairs, curvature_bounds
from lipnext.core.errors import UnsoundError
from lipnext.core.network import LipschitzNetwork
from lipnext.nn.curvature_head import CurvatureHead
from lipnext.nn.head import UnitRowHead

SHAPE = (1, 3, 4)


def network(seed: int = 0, classes: int = 4, hidden: int = 24, scale: float = 4.0) -> LipschitzNetwork:
    """The head alone, on the pixels."""
    generator = torch.Generator().manual_seed(seed)
    head = CurvatureHead(12, classes, hidden, generator=generator)
    with torch.no_grad():
        head.inner.mul_(scale)
        head.weight.mul_(scale)
    return LipschitzNetwork([Flatten()], head, SHAPE).eval()


def images(count: int = 32, seed: int = 1) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def pairs(net: LipschitzNetwork, points: Tensor) -> _Pairs:
    """The margin of the largest logit over the second."""
    labels, rivals = net.head(points).topk(2).indices.T
    return CurvatureCertifier(net)._pairs(points, labels, rivals)


def boundary(of: _Pairs) -> Tensor:
    """Upper bounds of the distances to `f = 0`, from points on it: damped steps to the linearised boundary."""
    points = of.centres.clone()
    for _ in range(100):
        value, _, gradient, _ = of.evaluate(points)
        d = points - of.centres
        eta = (value - (gradient * d).sum(1)) / gradient.square().sum(1)
        points = points + 0.5 * (of.centres - eta[:, None] * gradient - points)
    value, _, _, _ = of.evaluate(points)
    found = (points - of.centres).norm(dim=1) * (1 + 1e-6)
    return torch.where(value.abs() < 1e-9, found, math.inf)


def test_curvatures_are_just_above_the_eigenvalues() -> None:
    head = network().head
    assert isinstance(head, CurvatureHead)
    table = curvature_bounds(head)
    for i in range(4):
        for j in range(4):
            falling = (head.weight[j] - head.weight[i]).clamp_min(0.0)
            matrix = head.inner.mT @ torch.diag(falling) @ head.inner
            truth = torch.linalg.eigvalsh(matrix.detach())[-1].item() / 4
            assert truth * (1 - 1e-12) <= table[i, j].item() <= truth * (1 + 1e-8)


def test_at_the_features_it_is_the_closed_form_of_the_paper() -> None:
    of = pairs(network(), images().flatten(1))
    value, _, gradient, _ = of.evaluate(of.centres)
    length = gradient.norm(dim=1)
    root = (torch.sqrt(length.square() + 2 * of.curvature * value) - length) / of.curvature
    got, _ = of.radius(of.centres)
    torch.testing.assert_close(got, root, rtol=1e-9, atol=0)
    assert (got < root).all()
    assert (replace(of, rows=-of.rows, shift=-of.shift).radius(of.centres)[0] <= 0).all()


@settings(max_examples=8)
@given(seed=st.integers(0, 999), scale=st.floats(0.5, 8.0), reach=st.floats(0.01, 3.0))
def test_every_point_proves_a_radius_that_the_boundary_keeps(seed: int, scale: float, reach: float) -> None:
    of = pairs(network(seed, scale=scale), images(seed=seed).flatten(1))
    truth = boundary(of)
    random = reach * torch.randn(*of.centres.shape, generator=torch.Generator().manual_seed(seed))
    for points in (of.centres, of.centres + random):
        assert (of.radius(points)[0] <= truth).all()
    assert (of.search() <= truth).all()


def test_the_search_reaches_the_boundary_where_the_margin_bends_little() -> None:
    of = pairs(network(scale=1.0), images().flatten(1))
    truth, first, best = boundary(of), of.radius(of.centres)[0], of.search()
    assert (best >= first).all()
    assert (first / truth).mean() < 0.99
    assert (best / truth).min() > 0.999


def test_a_curvature_that_is_too_small_is_found_out() -> None:
    """Planted: a curvature far below the proved one."""
    of = pairs(network(scale=8.0), images(256).flatten(1))
    truth = boundary(of)
    assert (of.search() <= truth).all()
    flat = replace(of, curvature=of.curvature / 100)
    assert not (flat.search() <= truth).all()


def exactly(net: LipschitzNetwork, point: Tensor) -> Iterator[tuple[mpmath.mpf, list[mpmath.mpf]]]:
    """Logits and their gradients in 60 digits."""
    with mpmath.workdps(60):
        head = net.head
        assert isinstance(head, CurvatureHead)
        u, a = head.inner.tolist(), head.inner_bias.tolist()
        h = [mpmath.mpf(v) for v in point.tolist()]
        t = [mpmath.fdot(row, h) + mpmath.mpf(b) for row, b in zip(u, a, strict=True)]
        for row, shift in zip(head.weight.tolist(), head.bias.tolist(), strict=True):
            logit = mpmath.fdot(row, [mpmath.log1p(mpmath.exp(x)) for x in t]) + mpmath.mpf(shift)
            slopes = [mpmath.mpf(v) / (1 + mpmath.exp(-x)) for v, x in zip(row, t, strict=True)]
            yield logit, [mpmath.fdot(slopes, [r[c] for r in u]) for c in range(len(h))]


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_margins_and_gradients_are_right_within_their_error_bounds(scale: float) -> None:
    net = network(scale=scale)
    points = torch.randn(6, 12) * 3
    count = torch.ones(6, dtype=torch.int64)
    of = CurvatureCertifier(net)._pairs(points, 0 * count, count)
    value, value_error, gradient, gradient_error = of.evaluate(points)
    for n, point in enumerate(points):
        (one, slope), (other, rise), *_ = exactly(net, point)
        with mpmath.workdps(60):
            off = abs(mpmath.mpf(value[n].item()) - (one - other))
            apart = mpmath.norm(
                [g - (a - b) for g, a, b in zip(gradient[n].tolist(), slope, rise, strict=True)]
            )
        assert off <= value_error[n].item() < 1e-10 * scale**2
        assert apart <= gradient_error[n].item() < 1e-10 * scale**2


@pytest.mark.parametrize("classes", [2, 4, 12])
def test_no_attack_changes_a_label_within_its_radius(classes: int) -> None:
    net = network(classes=classes)
    certificate = CurvatureCertifier(net)(images())
    assert (certificate.radius > 0).all()
    assert certificate.per_image
    result = minimal_norm(net, images(), certificate.label, steps=40)
    assert violations(certificate, result).tolist() == []
    assert (certificate.radius / result.distance)[
        result.success
    ].max() > 0.8  # neither is worth much otherwise


def test_all_rivals_count_also_those_that_are_not_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(classes=11)
    full = CurvatureCertifier(net)(images())
    monkeypatch.setattr(curvature, "RIVALS", 1)
    fewer = CurvatureCertifier(net)(images())
    assert (fewer.radius <= full.radius).all()
    certifier = CurvatureCertifier(net)
    for rival in range(11):
        of = certifier._pairs(images().flatten(1), full.label, torch.full((32,), rival))
        assert (full.radius <= boundary(of))[full.label != rival].all()


def test_a_body_and_its_rounding_error_divide_and_shorten_the_radius() -> None:
    net = network()
    plain = CurvatureCertifier(net)(images())
    certifier = CurvatureCertifier(net)
    certifier.features = replace(certifier.features, error=1e-3)
    shorter = certifier(images())
    torch.testing.assert_close(shorter.radius, plain.radius - 1e-3, rtol=1e-9, atol=1e-12)
    assert (shorter.slack > plain.slack).all()
    assert CurvatureCertifier(net)(images()[:0]).radius.shape == (0,)


def test_a_tie_has_radius_zero() -> None:
    net = network()
    with torch.no_grad():
        net.head.weight[1] = net.head.weight[0]
        net.head.bias[1] = net.head.bias[0]
        net.head.bias[:2] += 50.0
    certificate = CurvatureCertifier(net)(images())
    assert (certificate.radius == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_deployed_radii_are_smaller_by_what_the_program_may_err(arithmetic: str) -> None:
    net = network().float()
    real = CurvatureCertifier(net)(images())
    certifier = CurvatureCertifier(net, "deployed", arithmetic)
    deployed = certifier(images())
    assert (deployed.radius <= real.radius).all()
    assert (deployed.radius[deployed.radius > 0] > 0.9 * real.radius[deployed.radius > 0]).all()
    assert (deployed.arithmetic, deployed.semantics) == (arithmetic, "deployed")
    dtype = getattr(torch, arithmetic)
    points = 1.5 * torch.rand(500, *SHAPE)
    points = points.to(dtype).double()
    exact, computed = net.double()(points), net.to(dtype)(points.to(dtype)).double()
    off = ((computed[:, :, None] - computed[:, None]) - (exact[:, :, None] - exact[:, None])).abs().amax(0)
    assert (off <= certifier.ball_error).all()


def test_what_was_proved_is_told() -> None:
    stated = CurvatureCertifier(network().float()).describe()
    assert json.loads(json.dumps(stated, allow_nan=False)) == stated
    assert stated["ball_error"].keys() == {"float64", "float32"}
    assert len(stated["curvatures"]) == 4
    assert "4 units in the last place" in stated["assumption"]


def test_other_heads_and_arithmetics_are_refused() -> None:
    linear = LipschitzNetwork([Flatten()], UnitRowHead(12, 2), SHAPE)
    with pytest.raises(UnsoundError, match="needs a SoftplusHead, got a UnitRowHead"):
        CurvatureCertifier(linear)
    with pytest.raises(UnsoundError, match="needs weights stored in float32"):
        CurvatureCertifier(network(), "deployed", "float32")
    with pytest.raises(UnsoundError, match="only a deployed program"):
        CurvatureCertifier(network(), "real", "float32")
    spoiled = network()
    with torch.no_grad():
        spoiled.head.weight[0, 0] = math.nan
    with pytest.raises(UnsoundError, match="NaN or infinity"):
        CurvatureCertifier(spoiled)
