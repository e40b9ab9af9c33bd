"""Local-Lip as a system: descriptions, both losses, estimated radii, the published constant, a whole run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lipnext import runs, systems
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import LossSpec
from lipnext.nn.clipped import Clipped, ClippedMaxMin, ClippedReLU
from lipnext.nn.convolution import Convolution
from lipnext.nn.local_estimate import estimate_local
from lipnext.systems import local_lip
from lipnext.systems.local_lip import PRESETS, SYSTEM, LocalLipNetwork, build

SHAPE = (1, 6, 6)


def _small(**changes: Any) -> LocalLipNetwork:
    settings: dict[str, Any] = {"convolutions": "4x3/2", "hidden": "8", "ceilings": "0.3"}
    return build(input_shape=SHAPE, classes=3, **(settings | changes)).double()


def _batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 3


def test_a_description_becomes_layers() -> None:
    net = build(
        input_shape=(3, 9, 8), classes=5, convolutions="4x3, 6x4/2p0", hidden="7,5", ceilings="1,2,3,4"
    )
    convolutions = [layer for layer in net.body if isinstance(layer, Convolution)]
    assert [(c.weight.shape[:2], c.stride, c.padding) for c in convolutions] == [
        ((4, 3), 1, 1),
        ((6, 4), 2, 0),
    ]
    assert convolutions[1].input_size == (9, 8)
    assert convolutions[1].output_size == (3, 3)
    thresholds = [layer.threshold for layer in net.body if isinstance(layer, ClippedReLU)]
    assert [t.shape for t in thresholds] == [(4, 9, 8), (6, 3, 3), (7,), (5,)]
    assert [t.unique().tolist() for t in thresholds] == [[1], [2], [3], [4]]
    assert net(torch.rand(2, 3, 9, 8)).shape == (2, 5)


def test_the_published_networks_have_their_sizes() -> None:
    net = build(input_shape=(3, 32, 32), classes=10, **PRESETS["cifar10"])
    limits = [layer for layer in net.body if isinstance(layer, ClippedMaxMin)]
    assert len(limits) == 7
    assert (limits[1].ceiling[0, 0, 0].item(), limits[1].floor[0, 0, 0].item()) == (0.1, -0.15)
    weights = sum(
        p.numel() for layer in net.body if not isinstance(layer, Clipped) for p in layer.parameters()
    )
    # 6C2F: 896 + 9,248 + 16,416 + 18,496 + 36,928 + 65,600 + 2,097,664
    assert weights == 2_245_248
    # start of the convolutions: variance 2 / (k^2 c_out)
    assert net.body[8].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"convolutions": "4x3x2"}, r"model\.convolutions: '4x3x2' cannot be read; write channels x kernel"),
        ({"convolutions": "4x3/2,0x3"}, r"'0x3' cannot be read"),
        ({"convolutions": "4x9"}, r"a kernel of 9 does not fit into 6 x 6 pixels"),
        ({"hidden": "8,many"}, r"model\.hidden: must be numbers with commas between them, got '8,many'"),
        ({"hidden": "2.5"}, r"model\.hidden: must be widths of at least 1"),
        ({"activation": "relu"}, r"must be 'relu-theta' or 'maxmin', got 'relu'"),
        ({"activation": "maxmin", "hidden": "7"}, r"maxmin takes even numbers of channels, got 7"),
        ({"ceilings": "1,2,3"}, r"ceilings and floors must be one number or 2, one for each activation"),
        ({"floors": "nan"}, r"model\.floors: must be numbers"),
    ],
)
def test_descriptions_that_cannot_be_read_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _small(**change)


SPEC = LossSpec(name="local-lip-b", ramp_share=0.5)


@pytest.mark.parametrize(("progress", "kappa"), [(0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (0.9, 0.0)])
def test_loss_b_moves_from_the_clean_to_the_worst_logits(progress: float, kappa: float) -> None:
    net, (images, labels) = _small(), _batch()
    estimate = estimate_local(net, images, labels, 0.1)
    clean, worst = (functional.cross_entropy(z, labels) for z in (estimate.logits, estimate.worst))
    loss = local_lip.local_lip_b(net, images, labels, spec=SPEC, radius=0.1, progress=progress)
    assert loss.item() == pytest.approx((kappa * clean + (1 - kappa) * worst).item(), rel=1e-3)
    assert worst > clean


def test_loss_g_adds_the_strongest_rival_as_a_class() -> None:
    net, (images, labels) = _small(), _batch()
    estimate = estimate_local(net, images, labels, 0.1)
    total = 0.0
    for logits, worst, y in zip(estimate.logits, estimate.worst, labels.tolist(), strict=True):
        rival = max(worst[k].item() for k in range(3) if k != y)
        total += math.log(logits.exp().sum().item() + math.exp(rival)) - logits[y].item()
    loss = local_lip.local_lip_g(net, images, labels, spec=SPEC, radius=0.1, progress=0.3)
    assert loss.item() == pytest.approx(total / len(labels), rel=1e-3)


@pytest.mark.parametrize("name", SYSTEM.losses)
def test_the_penalty_weighs_how_open_the_boxes_are(name: str) -> None:
    net, (images, labels) = _small(), _batch()
    estimate = estimate_local(net, images, labels, 0.1)
    open_by = sum(
        stage.stage.monotone[0].openness(stage.lower, stage.upper).item() for stage in estimate.stages
    )
    values = [
        SYSTEM.losses[name](
            net, images, labels, spec=SPEC.model_copy(update={"penalty": p}), radius=0.1, progress=0.25
        ).item()
        for p in (0.0, 0.2)
    ]
    assert values[1] - values[0] == pytest.approx(0.5 * 0.2 * open_by, rel=1e-2)


def test_estimated_radii_are_signed_and_not_below_the_global_ones() -> None:
    net, (images, _) = _small(), _batch()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        logits = net(images)
        distances = net.estimate_distances()
        net.load_state_dict(before)
        right, wrong = logits.argmax(1), logits.argmin(1)
        radii = net.radius_estimator()(images, right)
        ratio = (logits.gather(1, right[:, None]) - logits) / distances[right]
        globally = ratio.scatter(1, right[:, None], math.inf).amin(1)
        assert (net.radius_estimator()(images, wrong) < 0).all()
    assert (radii >= globally * (1 - 1e-9)).all()
    assert (radii > 1.1 * globally).any()
    assert (radii <= 8 * globally * (1 + 1e-9)).all()
    # nothing of the training's power iteration was moved
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_published_constant_is_below_the_proved_one() -> None:
    net = _small()
    estimate = local_lip.published(net)
    proved = MarginCertifier(net).evidence.body.value
    # the torus of a convolution on 6 pixels adds frequencies that the image does not have
    assert 0.8 * proved < estimate.value <= proved
    assert "2000 steps" in estimate.method


@pytest.mark.slow
def test_a_run_ends_in_a_bundle_that_is_loaded_certified_and_audited(tmp_path: Path) -> None:
    result = runs.train("local-lip/tiny", tmp_path / "run", overrides=["train.epochs=1"])
    assert result["system"] == "local-lip"
    model = runs.load(tmp_path / "run")
    certificate, test = runs.certify_run(tmp_path / "run")
    assert certificate.per_image
    assert certificate.accuracy_at("36/255", test.labels) == result["cra"]["36/255"]
    assert model.system == "local-lip"
    found = runs.audit(tmp_path / "run", samples=2, attacks="pgd")
    assert found.violations == ()


def test_every_preset_is_built_by_an_experiment() -> None:
    used = {systems.experiment(f"local-lip/{name}").preset for name in SYSTEM.experiments}
    assert used == set(PRESETS)
