"""The network of CPL and SLL: its order of layers, its sizes, and what it refuses."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lipnext.core.errors import ConfigError
from lipnext.core.network import LipschitzNetwork
from lipnext.nn.convex_potential import ConvexPotential
from lipnext.nn.head import FirstCoordinatesHead
from lipnext.nn.residual_network import residual_network

SIZE = {"width": 5, "depth": 2, "dense_depth": 2, "inner": 3, "dense_inner": 7, "patch": 1}


def build(
    shape: tuple[int, int, int] = (1, 8, 8), classes: int = 4, **changes: int | bool
) -> LipschitzNetwork:
    options = {**SIZE, "unit_rows": True, "seed": 0, **changes}
    return residual_network(ConvexPotential)(input_shape=shape, classes=classes, **options)  # type: ignore[arg-type]


def slow(network: LipschitzNetwork, images: Tensor, window: int) -> Tensor:
    """The published network, spelled out with torch's functions on stored weights."""
    x = functional.pad(images - 0.5, (0, 0, 0, 0, 0, 5 - images.shape[1]))
    for layer in network.body:
        if not isinstance(layer, ConvexPotential):
            continue
        w, b, s = layer.inner.weight, layer.inner.bias, layer.scale
        assert s is not None
        if w.dim() == 4:
            hidden = torch.relu(functional.conv2d(x, w, b, padding=1))
            x = x - functional.conv_transpose2d(hidden * s.view(-1, 1, 1), w, padding=1)
        else:
            if x.dim() == 4:
                x = (functional.avg_pool2d(x, window) * window).flatten(1)
            x = x - (torch.relu(functional.linear(x, w, b)) * s) @ w
    return functional.linear(x, network.head.weight, network.head.bias)


def test_the_network_is_the_published_chain() -> None:
    network = build().materialise()
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(network(images), slow(network, images, 4))


def test_patches_make_channels_and_the_window_stays_four_pixels() -> None:
    network = build(patch=2)
    assert network.features(torch.rand(2, 1, 8, 8)).shape == (2, 5 * 2 * 2)
    assert build().features(torch.rand(2, 1, 8, 8)).shape == (2, 5 * 2 * 2)
    assert build((1, 28, 28), patch=4, width=16).features(torch.rand(1, 1, 28, 28)).shape == (1, 16 * 7 * 7)


def test_the_body_is_one_lipschitz_for_inference() -> None:
    network = build().float().double().materialise()
    assert network.lipschitz_bound().value == 1.0


def test_seeds_decide_the_weights() -> None:
    one, same, other = build(seed=1), build(seed=1), build(seed=2)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs if a.std() > 0)


def test_the_first_features_can_be_the_logits() -> None:
    network = build(unit_rows=False).eval()
    images = torch.rand(2, 1, 8, 8)
    assert isinstance(network.head, FirstCoordinatesHead)
    assert torch.equal(network(images), network.features(images)[:, :4])


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((3, 8, 8), {"width": 2}, "model.width: 2 channels cannot hold patches of 3 x 1 x 1 = 3 pixels"),
        (
            (1, 8, 8),
            {"patch": 3},
            "model.patch: must be 1, 2 or 4, which divide the window of 4 pixels, got 3",
        ),
        ((1, 8, 8), {"depth": 0}, "dense_inner must be at least 1, got 5, 0, 2, 3 and 7"),
        ((1, 3, 8), {}, "images of 3 x 8 pixels are smaller than the window of 4 x 4"),
        ((1, 4, 4), {"unit_rows": False, "classes": 6}, "model.width: 5 features cannot be the logits of 6"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(
    shape: tuple[int, int, int], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build(shape, **changes)
    assert "\n" not in str(error.value)
