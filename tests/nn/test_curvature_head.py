"""The head with one hidden layer: curvature, slopes and rounding against autograd and eigenvalues."""

import math

import pytest
import torch
from helpers import spectral_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn import curvature_head
from lipnext.nn.curvature_head import CurvatureHead


def head(seed: int = 0, channels: int = 5, classes: int = 3, hidden: int = 7) -> CurvatureHead:
    generator = torch.Generator().manual_seed(seed)
    made = CurvatureHead(channels, classes, hidden, generator=generator).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)
    return made


def largest_curvature(of: CurvatureHead, i: int, j: int) -> float:
    """`lambda_max(U^T diag(max(-w, 0)) U) / 4` from eigenvalues."""
    w = of.weight[i] - of.weight[j]
    matrix = of.inner.mT @ torch.diag((-w).clamp_min(0.0)) @ of.inner
    return torch.linalg.eigvalsh(matrix.detach())[-1].item() / 4


def test_logits_are_those_of_a_loop_over_the_units() -> None:
    of, y = head(), torch.randn(5) * 20
    for k in range(3):
        total = of.bias[k].item()
        for unit in range(7):
            t = (of.inner[unit] @ y + of.inner_bias[unit]).item()
            total += of.weight[k, unit].item() * (math.log1p(math.exp(-abs(t))) + max(t, 0.0))
        assert of(y[None])[0, k].item() == pytest.approx(total, abs=1e-12)


def test_softplus_does_not_turn_linear_at_20() -> None:
    of = CurvatureHead(1, 2, 1)
    with torch.no_grad():
        of.inner.fill_(1.0), of.inner_bias.zero_(), of.weight.fill_(1.0), of.bias.zero_()
    assert of(torch.tensor([[25.0]]))[0, 0].item() - 25 == pytest.approx(math.exp(-25), rel=1e-3)


@settings(max_examples=25)
@given(seed=st.integers(0, 999))
def test_no_hessian_of_a_margin_is_below_the_curvature(seed: int) -> None:
    of = head(seed)
    y = 2 * torch.randn(5, generator=torch.Generator().manual_seed(seed))
    hessian = torch.autograd.functional.hessian(lambda v: of(v[None])[0, 0] - of(v[None])[0, 1], y)
    lowest, highest = torch.linalg.eigvalsh(hessian)[[0, -1]].tolist()
    assert -lowest <= largest_curvature(of, 0, 1) + 1e-12
    assert highest <= largest_curvature(of, 1, 0) + 1e-12


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("steps", "share"), [(2, 0.2), (300, 0.99)])
def test_estimated_curvatures_approach_the_eigenvalues_from_below(
    stored: bool, steps: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature_head, "STEPS", steps)
    of = head()
    table = (of.materialise() if stored else of).curvatures()
    for i in range(3):
        for j in range(3):
            truth = largest_curvature(of, i, j)
            assert share * truth <= table[i, j].item() <= truth + 1e-12
    assert torch.diagonal(table).abs().max() == 0
    of.curvatures().sum().backward()
    assert of.inner.grad is not None
    assert of.inner.grad.abs().max() > 0


def test_no_slope_of_a_margin_exceeds_the_distances() -> None:
    of = head()
    for _ in range(20):
        of.distances()  # power iteration goes on from call to call while training
    table = of.distances()
    wanted = spectral_norm(of.inner) * torch.cdist(of.weight, of.weight)
    torch.testing.assert_close(table, wanted, rtol=1e-6, atol=1e-5)
    y = 5 * torch.randn(50, 5)
    slopes = torch.autograd.functional.jacobian(lambda v: (of(v)[:, 0] - of(v)[:, 1]).sum(), y)
    assert slopes.norm(dim=1).max().item() <= table[0, 1].item() + 1e-9
    assert of.lipschitz_bound().value >= spectral_norm(of.weight) * spectral_norm(of.inner)


def test_estimated_radii_are_roots_of_the_quadratic() -> None:
    """`(m/2) r^2 + |G| r - D = 0` (A.10), the nearest rival, negative for wrong samples."""
    of = head().eval()
    y = torch.randn(40, 5)
    y.requires_grad_()
    logits, labels = of(y), torch.arange(40) % 3
    got, table = of.radius_estimator()(y, labels), of.curvatures()
    wanted: list[float] = []
    for n, label in enumerate(labels.tolist()):
        radii = []
        for rival in set(range(3)) - {label}:
            margin = logits[n, label] - logits[n, rival]
            slope = torch.autograd.grad(margin, y, retain_graph=True)[0][n].norm().item()
            m = (table[label, rival] if margin > 0 else table[rival, label]).item()
            root = (math.sqrt(slope**2 + 2 * m * abs(margin.item())) - slope) / m
            radii.append(math.copysign(root, margin.item()))
        wanted.append(min(radii))
    assert got.tolist() == pytest.approx(wanted, rel=1e-9)
    assert torch.equal(got > 0, logits.argmax(dim=1) == labels)


def test_a_materialised_head_has_the_weights_alone() -> None:
    of = head()
    stored = of.materialise()
    assert stored.state_dict().keys() == {"inner", "inner_bias", "weight", "bias"}
    y = torch.randn(3, 5)
    assert torch.equal(stored(y), of(y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(of(y), stored(y))


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_float32_stays_within_the_propagated_error(scale: float) -> None:
    of = head(hidden=200).float()
    y = scale * torch.randn(256, 5, dtype=torch.float32)
    state = RoundingState(
        norm=y.double().norm(dim=1).max().item() * (1 + 1e-14), error=0.0, unit=UNIT_ROUNDOFF[torch.float32]
    )

    def hidden(of: CurvatureHead, y: Tensor) -> Tensor:
        return functional.softplus(functional.linear(y, of.inner, of.inner_bias), threshold=40.0)

    soft, logits = hidden(of, y).double(), of(y).double()
    behind, end = of.hidden_rounding(state), of.rounding(state)
    exact = of.double()
    assert (soft - hidden(exact, y.double())).norm(dim=1).max().item() <= behind.error
    assert soft.norm(dim=1).max().item() <= behind.norm
    assert (logits - exact(y.double())).norm(dim=1).max().item() <= end.error
