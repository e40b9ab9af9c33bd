"""SPLITZ as a system: its halves, the loss, estimated radii, a whole run, and what cannot be done with votes."""

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
from lipnext.certificates.smoothing import SmoothingCertifier
from lipnext.core.errors import ConfigError, UnsoundError
from lipnext.core.experiment import LossSpec
from lipnext.core.smoothed import SmoothedNetwork
from lipnext.data.dataset import load
from lipnext.nn.convolution import Convolution
from lipnext.nn.head import UnitRowHead
from lipnext.nn.right_half import RightHalf
from lipnext.systems.splitz import EXPERIMENTS, PRESETS, SYSTEM, build, splitz
from lipnext.training.objective import Objective

SHAPE = (1, 6, 6)


def _net(**changes: Any) -> SmoothedNetwork:
    settings: dict[str, Any] = {"width": 4, "depth": 1, "patch": 2, "hidden": "8", "samples": 200}
    return build(input_shape=SHAPE, classes=3, **(settings | changes)).double()


def _batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 3


@pytest.mark.parametrize(
    ("left", "latent", "constant"),
    [("none", (1, 6, 6), 1.0), ("lipnext", (4, 3, 3), 1.0), ("relu-theta", (4, 6, 6), None)],
)
def test_left_halves_have_their_latents_and_bounds(
    left: str, latent: tuple[int, ...], constant: float | None
) -> None:
    net = _net(left=left).eval()
    images, _ = _batch()
    assert net.features(images).shape == (6, *latent)
    bound = net.lipschitz_bound().value
    if constant is None:
        (convolution,) = [layer for layer in net.body if isinstance(layer, Convolution)]
        constant = convolution.lipschitz_bound().value
    assert bound == pytest.approx(constant, abs=1e-9)
    certifier = SmoothingCertifier(net)
    assert tuple(certifier.latent_shape) == latent
    assert (certifier.local is not None) == (left == "relu-theta")


def test_without_a_left_half_the_noise_is_on_the_image_itself() -> None:
    net = _net(left="none")
    images, _ = _batch()
    torch.testing.assert_close(net.features(images), images - 0.5)
    assert SmoothingCertifier(net.eval()).body.value == 1.0


def test_a_description_becomes_a_right_half() -> None:
    net = _net(left="none", convolutions="5x3/2, 6x3/2p0", hidden="7, 9")
    assert isinstance(net.head, RightHalf)
    shapes = [tuple(p.shape) for p in net.head.parameters() if p.dim() > 1]
    assert shapes == [(3, 9), (5, 1, 3, 3), (6, 5, 3, 3), (7, 6), (9, 7)]
    linear = _net(hidden="")
    assert isinstance(linear.head, UnitRowHead)
    assert linear(_batch()[0]).shape == (6, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": "right"}, "model.left: must be one of none, lipnext, relu-theta, got 'right'"),
        ({"width": 3}, "3 channels cannot hold patches of 1 x 2 x 2 = 4 pixels"),
        ({"kernel": 2}, "kernel odd"),
        ({"depth": 0}, "must be at least 1"),
        ({"shift": 0.3}, r"shift must lie in \[0, 1/4\]"),
        ({"beta": 1.5}, r"beta in \[0, 1\], got 0.0625 and 1.5"),
        ({"convolutions": "5x3;2"}, "'5x3;2' cannot be read"),
        ({"convolutions": "5x9p0"}, "a kernel of 9 does not fit into 3 x 3 positions"),
        ({"hidden": "12,-1"}, "model.hidden: must be widths"),
        ({"samples": 10}, r"10 votes decide nothing with alpha 0\.001.*take at least 11 samples"),
        ({"sigma": -1.0}, "model.sigma: must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        _net(**changes)
    assert "\n" not in str(refusal.value)


# ---- the loss


def _loss(net: SmoothedNetwork, spec: LossSpec, progress: float) -> Tensor:
    images, labels = _batch()
    return splitz(net, images, labels, spec=spec, radius=0.0, progress=progress)


def test_the_loss_is_the_cross_entropy_behind_noise_of_sigma() -> None:
    net = _net(sigma=0.7)
    seen: list[Tensor] = []
    head = net.head.forward
    net.head.forward = lambda latent: (seen.append(latent), head(latent))[1]  # type: ignore[method-assign]
    loss = _loss(net, LossSpec(name="splitz"), 0.3)
    images, labels = _batch()
    noise = seen[0] - net.features(images)
    assert noise.std().item() == pytest.approx(0.7, rel=0.15)
    torch.testing.assert_close(loss, functional.cross_entropy(head(seen[0]), labels))


def test_the_noise_follows_from_seed_and_progress() -> None:
    spec = LossSpec(name="splitz")
    assert _loss(_net(), spec, 0.3) == _loss(_net(), spec, 0.3)
    assert _loss(_net(), spec, 0.3) != _loss(_net(), spec, 0.4)
    other = _net()
    other.seed = 1
    assert _loss(other, spec, 0.3) != _loss(_net(), spec, 0.3)


def test_the_penalty_weighs_the_constant_of_the_left_half_up_to_a_threshold() -> None:
    net = _net(left="relu-theta")
    spec = LossSpec(name="splitz", penalty=0.3, ramp_share=0.5)
    plain = LossSpec(name="splitz")
    for _ in range(30):
        constant = net.estimate_lipschitz().item()
    assert constant > 0.5
    for progress, share in ((0.0, 0.0), (0.25, 0.15), (0.5, 0.3), (0.9, 0.3)):
        expected = (1 - share) * _loss(net, plain, progress) + share * constant
        torch.testing.assert_close(_loss(net, spec, progress), expected, rtol=1e-3, atol=0)
    _loss(net, spec, 0.9).backward()
    assert net.body[0].weight.grad.abs().max() > 0
    with torch.no_grad():
        net.body[0].weight *= 0.1
    expected = 0.7 * _loss(net, plain, 0.9) + 0.3 * 0.5
    torch.testing.assert_close(_loss(net, spec, 0.9), expected)


def test_losses_of_margins_need_a_linear_right_half() -> None:
    images, labels = _batch()
    emma = Objective(LossSpec(name="emma"), SYSTEM.losses)
    assert math.isfinite(emma.of(_net(hidden=""), images, labels, 0.5, contextlib.nullcontext()).item())
    with pytest.raises(UnsoundError, match=r"loss\.name=splitz"):
        emma.of(_net(), images, labels, 0.5, contextlib.nullcontext())
    with pytest.raises(ConfigError, match=r"loss\.penalty: must be below 1"):
        _loss(_net(), LossSpec(name="splitz", penalty=1.0), 0.5)


# ---- estimated radii


def test_estimated_radii_are_near_those_of_the_votes() -> None:
    net = _net(left="none", hidden="", sigma=0.3, samples=4000).eval()
    with torch.no_grad():
        net.head.weight *= 40  # so sure that a probability is a vote
    net.head.normalised = True
    images, _ = _batch(12)
    certificate = SmoothingCertifier(net)(images)
    sure = certificate.radius > 0
    net.validation_votes = 200  # type: ignore[misc]
    estimated = net.radius_estimator()(images, certificate.label.clamp_min(0))
    assert sure.sum() >= 4
    torch.testing.assert_close(estimated[sure], certificate.radius[sure], rtol=0, atol=0.06)
    assert (net.radius_estimator()(images[sure], (certificate.label[sure] + 1) % 3) < 0).all()
    largest = 0.3 * torch.special.ndtri(torch.tensor(0.001 ** (1 / 4000)))
    assert (estimated <= largest + 1e-12).all()


def test_estimated_radii_are_divided_by_the_estimated_constant() -> None:
    net, (images, labels) = _net(left="relu-theta").eval(), _batch()
    for _ in range(30):
        constant = net.estimate_lipschitz().item()
    one = net.radius_estimator()(images, labels)
    net.body[0].estimate_lipschitz = lambda: torch.tensor(2 * constant)
    torch.testing.assert_close(net.radius_estimator()(images, labels), one / 2, rtol=1e-3, atol=1e-9)


# ---- whole runs


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_its_preset(name: str) -> None:
    experiment = EXPERIMENTS[name]()
    assert experiment.preset == name
    assert experiment.model == PRESETS[name]
    assert 3 <= len(experiment.certify.eps) <= 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("splitz") / "run"
    changes = ["train.epochs=5", "certify.images=24", "optim.euclidean_lr=0.01"]
    runs.train("splitz/tiny", folder, overrides=changes)
    return folder


def test_a_run_tells_votes_confidence_and_abstentions(finished: Path, call: Call) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert (result["n"], result["kind"], result["confidence"]) == (24, "probabilistic", 0.999)
    assert result["clean"] > 0.5
    assert 0 <= result["abstained"] <= 24 * (1 - result["clean"]) + 1e-9
    stated = json.loads((finished / "certificate.json").read_text())
    assert stated["kind"] == "probabilistic"
    assert stated["smoothing"]["sigma"] == 0.25
    assert stated["smoothing"]["samples"] == 200
    _, out, _ = call("certify", finished)
    assert "l2 probabilistic (confidence 0.999 an image," in " ".join(out.split())
    certificate, test = runs.certify_run(finished)
    whole = load(EXPERIMENTS["tiny"]().data).test
    assert torch.equal(test.labels, whole.labels[[k * len(whole) // 24 for k in range(24)]])
    assert certificate.clean_accuracy(test.labels) == result["clean"]
    assert certificate.model_sha256 == result["model_sha256"]


def test_records_carry_the_confidence(finished: Path, call: Call, tmp_path: Path) -> None:
    assert call("certify", finished, "--records", tmp_path / "r.jsonl", "--json")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    assert all((line["kind"], line["confidence"]) == ("probabilistic", 0.999) for line in lines)
    assert all(line["pred"] >= 0 or line["radius"] == 0 for line in lines)


def test_what_needs_certainty_refuses_votes_in_one_line(finished: Path, call: Call) -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed (extra: serve)")
    for command, words in (
        (("audit", finished, "--samples", "2"), "label of a smoothed classifier is a vote"),
        (("serve", finished, "--port", "0"), "serve answers with radii that hold for certain"),
        (("certify", finished, "--semantics", "deployed"), "cannot be certified as a deployed program"),
        (("export", finished, "--to", "onnx", "--out", "net.onnx"), "needs a LinearHead, got a RightHalf"),
    ):
        code, _, err = call(*command)
        assert code == 3
        assert words in err
        assert len(err.strip().splitlines()) == 1
