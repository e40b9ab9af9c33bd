import copy
from pathlib import Path

import pytest
import torch

from lipnext import runs, systems
from lipnext.core.errors import ConfigError
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.systems.cll import build, published
from tests.helpers import jacobian, spectral_norm

CIFAR = (3, 32, 32)


@pytest.mark.parametrize(
    ("preset", "shape", "classes", "convolutions", "weights"),
    [
        # Counted by hand: kernels and matrices with their biases.
        (
            "4c3f", CIFAR, 10, 4,
            (3 * 9 + 1) * 32 + (32 * 16 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * 16 + 1) * 64
            + (64 * 64 + 1) * 512 + 513 * 512 + 513 * 10,
        ),
        (
            "6c2f", CIFAR, 10, 6,
            (3 * 9 + 1) * 32 + (32 * 9 + 1) * 32 + (32 * 16 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * 9 + 1) * 64
            + (64 * 16 + 1) * 64 + (64 * 64 + 1) * 512 + 513 * 10,
        ),
        (
            "8c2f", (3, 64, 64), 200, 8,
            (3 * 9 + 1) * 64 + (64 * 9 + 1) * 64 + (64 * 16 + 1) * 64 + (64 * 9 + 1) * 128 + (128 * 9 + 1) * 128
            + (128 * 16 + 1) * 128 + (128 * 9 + 1) * 256 + (256 * 16 + 1) * 256
            + (256 * 36 + 1) * 256 + 257 * 200,
        ),
    ],
)  # fmt: skip
def test_the_published_networks_have_their_sizes(
    preset: str, shape: tuple[int, int, int], classes: int, convolutions: int, weights: int
) -> None:
    net = build(input_shape=shape, classes=classes, **systems.get("cll").presets[preset])  # type: ignore[arg-type]
    assert sum(type(layer).__name__ == "Convolution" for layer in net.body) == convolutions
    assert sum(p.numel() for p in net.parameters()) == weights
    assert net(torch.zeros(1, *shape)).shape == (1, classes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trunk": "5c"}, "model.trunk: must be one of none, 4c, 6c, 8c, got '5c'"),
        ({"dense": "512,x"}, "model.dense: must be numbers separated by commas"),
        ({"width": 31}, "widths must be even, got 31"),
        ({"dense": "33"}, "widths must be even"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(input_shape=CIFAR, classes=10, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="images of 2 x 2 are too small for 8c"):
        build(input_shape=(1, 2, 2), classes=10, trunk="8c")


def test_the_published_constant_approaches_the_true_norms_from_below() -> None:
    net = build(input_shape=(1, 8, 8), classes=4, trunk="4c", width=4, dense="16").eval()
    x, truth = torch.zeros(1, 1, 8, 8, dtype=torch.float64), 1.0
    for layer in copy.deepcopy(net).double().body:
        if isinstance(layer, Convolution | Dense):
            truth *= spectral_norm(jacobian(layer, x))
        x = layer(x)
    estimate = published(net)
    assert 0.99 * truth < estimate.value <= truth * (1 + 1e-5)
    assert truth <= net.materialise().double().lipschitz_bound().value
    assert published(net.materialise()).value == pytest.approx(estimate.value, rel=1e-3)


@pytest.mark.slow
def test_on_two_moons_less_slack_certifies_more(tmp_path: Path) -> None:
    """The published experiment: with p = 0.75 the boundary is too smooth for the moons, with p = 0.01 it follows them."""
    shares = []
    for slack in (0.75, 0.01):
        overrides = [f"loss.slack={slack}", "certify.eps=1/24", "train.epochs=100"]
        result = runs.train("cll/two-moons", tmp_path / str(slack), overrides=overrides)
        shares.append(result["cra"]["1/24"])
    assert shares[0] < 0.92
    assert shares[1] > 0.94
