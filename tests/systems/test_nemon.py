"""NEMON as a system: constants in the l-infinity norm, losses, estimated radii, a whole run, what cannot be exported."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Call
from torch import Tensor
from torch.nn import functional

from lipnext import runs
from lipnext.certificates.implicit import ImplicitCertifier
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import LossSpec
from lipnext.nn.convolution import Convolution
from lipnext.nn.implicit import ImplicitConvolution
from lipnext.systems.nemon import EXPERIMENTS, PRESETS, SYSTEM, NemonNetwork, build, nemon
from lipnext.training.objective import Objective

SHAPE = (1, 6, 5)


def _net(kind: str = "dense", **changes: Any) -> NemonNetwork:
    sizes: dict[str, Any] = {"width": 7} if kind == "dense" else {"width": 3, "kernel": 3, "stride": 2}
    return build(input_shape=SHAPE, classes=4, kind=kind, **(sizes | changes)).double()


def _batch(count: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(count, *SHAPE, generator=g, dtype=torch.float64), torch.arange(count) % 4


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_estimated_constants_are_at_least_the_proved_ones_which_are_refined_further(kind: str) -> None:
    net = _net(kind).eval()
    certifier = ImplicitCertifier(net)
    estimated, proved = net.estimate_distances().detach(), certifier.steepness
    # ten refinements instead of fifty, and nothing is rounded
    assert (estimated >= proved * (1 - 1e-9) - 1e-9).all()
    assert (estimated <= proved * 1.5 + 1e-9).all()
    assert net.estimate_lipschitz().item() == pytest.approx(net.lipschitz_bound().value, rel=0.5)
    assert net.lipschitz_bound() == certifier.body


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_estimated_radii_are_near_the_pairwise_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImplicitCertifier, "_grow", lambda self, z, v, centre, labels, radius: radius)
    net, (images, _) = _net(kind).eval(), _batch()
    certificate = ImplicitCertifier(net)(images)
    estimated = net.radius_estimator()(images, certificate.label)
    # The proved radius has lost the error of the solver, some 1e-5 here.
    assert (estimated <= certificate.radius + 1e-4).all()
    assert (estimated >= 0.6 * certificate.radius - 1e-4).all()
    assert (net.radius_estimator()(images, (certificate.label + 1) % 4) < 0).all()


def test_the_published_constant_is_that_of_the_formula() -> None:
    net = _net()
    affine, implicit = net.body[1], net.body[2]
    a, n = implicit.matrix().tolist(), 7
    rows = [a[i][i] + sum(abs(a[i][j]) for j in range(n) if j != i) for i in range(n)]
    into, out = (max(sum(map(abs, row)) for row in m.tolist()) for m in (affine.weight, net.head.weight))
    expected = out * into / (1 - max(max(rows), 0))
    assert net.published_constant().item() == pytest.approx(expected, rel=1e-12)
    # It bounds the difference of two logits by twice itself, which the sensitivities undercut.
    assert net.estimate_distances().max() <= 2 * net.published_constant()


def test_the_published_loss_is_cross_entropy_and_the_weighted_constant() -> None:
    net, (images, labels) = _net(), _batch()
    spec = LossSpec(name="nemon", penalty=0.25)
    loss = nemon(net, images, labels, spec=spec, radius=0.0, progress=0.0)
    plain = functional.cross_entropy(net(images), labels)
    assert loss.item() == pytest.approx((plain + 0.25 * net.published_constant()).item(), rel=1e-12)
    through = Objective(spec, SYSTEM.losses).of(net, images, labels, 0.0, contextlib.nullcontext())
    assert through.item() == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_the_regulariser_makes_the_constant_smaller() -> None:
    reached = {}
    for penalty in (0.0, 0.1):
        net, (images, labels) = _net().train(), _batch()
        for _ in range(20):
            spec = LossSpec(name="nemon", penalty=penalty)
            loss = nemon(net, images, labels, spec=spec, radius=0.0, progress=0.0)
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                    parameter -= 0.05 * gradient
        reached[penalty] = net.published_constant().item()
    assert reached[0.1] < 0.8 * reached[0.0]


def test_autocast_leaves_the_equation_in_the_dtype_of_its_weights() -> None:
    net, images = _net().float(), _batch()[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net.features(images).dtype == torch.float32
        assert net(images).dtype == torch.float32


def test_the_published_networks_have_their_sizes() -> None:
    net = build(input_shape=(3, 32, 32), classes=10, **PRESETS["cifar10"])
    first, implicit, _ = net.body
    assert isinstance(first, Convolution)
    assert isinstance(implicit, ImplicitConvolution)
    assert first.weight.shape == (81, 3, 5, 5)
    assert implicit.weight.shape == (81, 81, 5, 5)
    assert EXPERIMENTS["mnist"]().model == {"width": 100}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dens"}, r"model\.kind: must be dense or convolution, got 'dens'"),
        ({"width": 0}, r"width, kernel and stride must be at least 1, got 0"),
        ({"measure": 1.5}, r"model\.measure: must be below 1"),
        ({"kind": "convolution", "kernel": 4}, r"model\.kernel: must be odd"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _net(**change)


@pytest.mark.slow
def test_a_whole_run_proves_its_measure_and_is_audited_and_refuses_what_it_cannot(
    tmp_path: Path, call: Call
) -> None:
    run = tmp_path / "run"
    result = runs.train("nemon/tiny", run)
    assert result["clean"] > 0.7
    stated = json.loads((run / "certificate.json").read_text(encoding="utf-8"))
    assert stated["norm"] == "linf"
    assert stated["implicit"]["measure"] < 1
    assert math.isfinite(stated["lipschitz"]["bound"])
    code, out, _ = call("audit", run, "--samples", "8", "--json")
    assert code == 0
    assert json.loads(out)["violations"] == []
    code, _, error = call("export", run, "--to", "torch", "--out", tmp_path / "model.pt2")
    assert code == 3
    assert "cannot export a network that is certified in linf" in error
    code, out, _ = call("certify", run, "--eps", "0.01", "--semantics", "deployed", "--json")
    assert code == 0
    assert json.loads(out)["semantics"] == "deployed"
