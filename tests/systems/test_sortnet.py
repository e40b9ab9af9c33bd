"""SortNet as a system: schedules, losses, masks, means that are estimated again, a whole run."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Call
from torch import Tensor

from lipnext import runs
from lipnext.core.eps import parse_eps_list
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import LossSpec
from lipnext.data.batches import batches
from lipnext.data.dataset import load as load_data
from lipnext.nn.mean_shift import MeanShift
from lipnext.nn.sort_neuron import SortDense, SortHead, TanhHead, worst_differences
from lipnext.systems import sortnet
from lipnext.systems.sortnet import (
    EXPERIMENTS,
    PRESETS,
    SYSTEM,
    SortNetwork,
    build,
    gated_hinge,
    gated_hinge_of,
    mixture,
    mixture_of,
)
from lipnext.training.objective import Objective

SHAPE = (1, 4, 5)


def _net(**changes: Any) -> SortNetwork:
    return build(input_shape=SHAPE, classes=4, **({"width": 12, "depth": 4, "keep": 0.5} | changes)).double()


def _batch(count: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(count, *SHAPE, generator=g, dtype=torch.float64), torch.arange(count) % 4


def test_the_mixture_loss_of_the_reference_vector() -> None:
    z = torch.tensor([[2, 1.7, -0.5], [0.2, 0.9, 0.1]], dtype=torch.float64)
    assert mixture_of(z, torch.tensor([0, 0]), 0.25, 1.5, 0.3).item() == pytest.approx(1.00884531, abs=1e-8)
    # No gradient of the hinge where a sample is wrong: its bound is clipped at 1.
    z.requires_grad_()
    mixture_of(z, torch.tensor([0, 0]), 0.25, 1.5, 0.0).backward()
    assert z.grad is not None
    assert z.grad[0].abs().max() > 0
    assert z.grad[1].abs().max() == 0


def test_the_gated_hinge_of_the_reference_vector() -> None:
    out = torch.tensor([[1, 0.5, -1], [0.1, 0.4, -0.2]], dtype=torch.float64)
    worst = torch.tensor([[0, 0.2, -1.3], [0, 0.9, 0.1]], dtype=torch.float64)
    found = gated_hinge_of(out, worst, torch.tensor([0, 0]), 1.0, 0.3)
    assert found.item() == pytest.approx(0.85250206, abs=1e-8)


def test_the_losses_of_a_network_are_those_of_its_logits() -> None:
    images, labels = _batch()
    net = _net().train()
    net.set_progress(0.5)
    spec = LossSpec(name="mixture", penalty=0.4)
    found = mixture(net, images, labels, spec=spec, radius=0.2, progress=0.5)
    logits, s = net(images), net.head.scale
    weight = 0.4 * 0.01 ** ((0.5 - 1 / 15) / (29 / 30 - 1 / 15))
    assert found.item() == pytest.approx(mixture_of(logits / s, labels, 0.2, s, weight).item(), rel=1e-12)
    through = Objective(
        LossSpec(name="mixture", penalty=0.4, radius="0.2", ramp_from=1.0, ramp_to=1.0), SYSTEM.losses
    )
    assert through.of(net, images, labels, 0.5, contextlib.nullcontext()).item() == pytest.approx(
        found.item(), rel=1e-12
    )

    net = _net(hidden=6).train()
    net.set_progress(0.5)
    spec = LossSpec(name="gated-hinge", penalty=0.4, temperature=0.5)
    found = gated_hinge(net, images, labels, spec=spec, radius=0.2, progress=0.5)
    features = net.masked_features(images)[0].flatten(0, 1)
    reach = 0.2 * 0.285714285714
    hidden = [
        torch.tanh(features @ net.head.inner.mT + side * reach * net.head.inner.abs().sum(1))
        for side in (-1, 1)
    ]
    worst = worst_differences(net.head.weight, net.head.bias, *hidden, labels)
    expected = gated_hinge_of(net(images), worst, labels, 2.0, weight)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    found.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_a_loss_that_needs_an_mlp_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"gated-hinge needs an MLP; set model\.hidden, or loss\.name=mixture"
    ):
        gated_hinge(_net(), *_batch(), spec=LossSpec(), radius=0.1, progress=0.0)


def test_a_training_step_computes_the_lp_norms_over_subsets_written_out() -> None:
    net, (images, _) = _net().train(), _batch()
    net.set_progress(0.3)
    features, columns = net.masked_features(images)
    found = net.masked_head(features, columns).flatten(0, 1)
    p = net.body[1].exponent
    assert p == pytest.approx(8 * 125 ** ((0.3 - 1 / 15) / 0.9), rel=1e-12)
    assert columns.shape == (2, 6)  # 32 images share a subset of half of the features
    # the same, group by group; masks are drawn again in the same order
    draw = sortnet.generator("sort-masks", 0, repr(0.3))
    dense = [layer for layer in net.body if isinstance(layer, SortDense)]
    subsets = [net._subset(2, layer, draw) for layer in (*dense, net.head)]
    assert torch.equal(subsets[-1], columns)
    assert subsets[0].shape == (2, 20)  # all pixels
    assert not torch.equal(subsets[1][0], subsets[1][1])
    x = [images[:32].flatten(1), images[32:].flatten(1)]
    for layer, ins, outs in zip(dense, subsets[:-1], subsets[1:], strict=True):
        y = [torch.cdist(x[g], layer.weight[outs[g]][:, ins[g]], p=p) for g in range(2)]
        for g in range(2):
            mean = []
            for feature in outs[g]:
                held = [(k, outs[k].tolist().index(feature)) for k in range(2) if feature in outs[k]]
                mean.append(torch.cat([y[k][:, place] for k, place in held]).mean())
            x[g] = y[g] - torch.stack(mean)
    y = [torch.cdist(x[g], net.head.weight[:, columns[g]], p=p) for g in range(2)]
    torch.testing.assert_close(found, net.head.scale * (net.head.bias - torch.cat(y)), rtol=0, atol=1e-9)
    assert torch.equal(net(images), found)


def test_masks_follow_from_seed_and_progress_alone() -> None:
    images = _batch()[0]
    one, other = _net().train(), _net().train()
    for net in (one, other):
        net.set_progress(0.25)
    one(images)
    assert torch.equal(one(images), other(images))
    other.set_progress(0.26)
    assert not torch.equal(one(images), other(images))
    assert not torch.equal(
        _net(seed=1).train().masked_features(images)[1], _net().train().masked_features(images)[1]
    )


@pytest.mark.parametrize("hidden", [0, 6])
def test_the_exponent_grows_to_infinity_and_the_deployed_network_knows_nothing_of_it(hidden: int) -> None:
    net, images = _net(hidden=hidden), _batch()[0]
    layers = [part for part in net.modules() if isinstance(part, SortDense | SortHead)]
    assert len(layers) == (2 if hidden else 4)
    deployed = net.eval()(images)
    for progress, exponent in ((0.0, 8.0), (0.05, 8.0), (0.516666666666667, 89.442719), (0.97, math.inf)):
        net.set_progress(progress)
        assert all(layer.exponent == pytest.approx(exponent) for layer in layers)
        assert torch.equal(net.eval()(images), deployed)
        assert torch.equal(net.materialise()(images), deployed)


def test_means_are_those_of_the_deployed_network_after_they_are_estimated_again() -> None:
    net, (images, labels) = _net().train(), _batch(128)
    net.set_progress(0.1)
    mixture(net, images, labels, spec=LossSpec(), radius=0.1, progress=0.1).backward()
    stale = [shift.mean.clone() for shift in net.modules() if isinstance(shift, MeanShift)]
    net.finalise([images])
    assert net.training
    net.eval()
    x = images.flatten(1)
    for layer, shift, before in zip(net.body[1::2], net.body[2::2], stale, strict=True):
        y = layer(x)
        torch.testing.assert_close(shift.mean, y.mean(0), rtol=0, atol=1e-12)
        assert (shift.mean - before).abs().max() > 0.1  # lp norms have other means
        x = y - y.mean(0)
    torch.testing.assert_close(net.features(images), x, rtol=0, atol=1e-12)
    # Of several batches it is the average of what each of them gives.
    first, second, both = _net(), _net(), _net()
    first.finalise([images[:64]])
    second.finalise([images[64:]])
    both.finalise([images[:64], images[64:]])
    torch.testing.assert_close(
        both.body[4].mean, (first.body[4].mean + second.body[4].mean) / 2, rtol=0, atol=1e-12
    )


def test_estimated_radii_are_half_the_margin() -> None:
    net, (images, labels) = _net(), _batch()
    net.finalise([images])
    net.eval()
    y = (net(images) / net.head.scale).tolist()
    expected = [(row[k] - max(row[:k] + row[k + 1 :])) / 2 for row, k in zip(y, labels.tolist(), strict=True)]
    assert net.radius_estimator()(images, labels).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_published_networks_have_their_sizes() -> None:
    sizes = {"cifar10-2": 120.64e6, "cifar10-mlp-8": 123.21e6, "mnist": 82.71e6}
    shapes = {"mnist": (1, 28, 28)}
    for name, expected in sizes.items():
        with torch.device("meta"):
            model = {**PRESETS[name]}
            width, depth, hidden = int(model["width"]), int(model["depth"]), int(model.get("hidden", 0))
        pixels = math.prod(shapes.get(name, (3, 32, 32)))
        layers = depth - 2 if hidden else depth - 1
        count = pixels * width + (layers - 1) * width**2
        count += width * hidden + hidden * 10 if hidden else width * 10
        assert count == pytest.approx(expected, rel=2e-3), name
    net = build(input_shape=SHAPE, classes=4, width=7, depth=5)
    assert sum(isinstance(part, SortDense | SortHead) for part in net.modules()) == 5
    net = build(input_shape=SHAPE, classes=4, width=7, depth=7, hidden=3)
    assert sum(isinstance(part, SortDense) for part in net.modules()) == 5
    assert isinstance(net.head, TanhHead)
    assert [layer.keep for layer in net.body[1::2]] == [1.0, 0.7, 0.7, 0.7, 0.7]


def test_experiments_certify_at_exact_sizes() -> None:
    for name, make in EXPERIMENTS.items():
        eps = parse_eps_list(make().certify.eps)
        assert eps["8/255"].numerator / eps["8/255"].denominator == 8 / 255, name
        assert eps["0.1"].denominator == 10, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be at least 1, hidden at least 0, and depth at least 2"),
        ({"depth": 1}, "and depth at least 2"),
        ({"depth": 2, "hidden": 4}, r"depth at least 2 \(3 with an MLP\), got 12, 4 and 2"),
        ({"spread": 0.0}, r"model\.spread: must be above 0"),
        ({"keep": 1.5}, r"keep must lie in \(0, 1\], got 1.5"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _net(**change)


@pytest.mark.slow
def test_a_whole_run_is_certified_and_audited(tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    result = runs.train("sortnet/tiny", run)
    assert result["clean"] > 0.7
    # What was kept are the means of the deployed network over the training part, not those of lp norms.
    model, splits = runs.load(run), load_data(EXPERIMENTS["tiny"]().data)
    means = [shift.mean.clone() for shift in model.net.modules() if isinstance(shift, MeanShift)]
    training = batches(splits.train, 64, seed=0, epoch=0)
    model.net.finalise(images for images, _ in training)
    for shift, before in zip(
        (m for m in model.net.modules() if isinstance(m, MeanShift)), means, strict=True
    ):
        torch.testing.assert_close(shift.mean, before, rtol=0, atol=1e-4)
    stated = json.loads((run / "certificate.json").read_text(encoding="utf-8"))
    assert stated["norm"] == "linf"
    assert stated["lipschitz"] == {"bound": 1.0, "proof": "product"}
    code, out, _ = call("audit", run, "--samples", "8", "--json")
    assert code == 0
    assert json.loads(out)["violations"] == []
    code, out, _ = call("certify", run, "--eps", "0.01", "--semantics", "deployed", "--json")
    assert code == 0
    assert json.loads(out)["cra"]["0.01"] <= result["cra"]["0.01"]
