"""The shared trunk: its sizes are the published ones, and what it leaves out are whole pairs."""

import pytest
import torch
from torch import nn

from lipnext.core.errors import ConfigError
from lipnext.core.rounding import RoundingState
from lipnext.nn.activation import MaxMin
from lipnext.nn.aol import AolConvolution
from lipnext.nn.trunk import EverySecondChannel, shrinking_trunk


def test_the_published_trunk_has_its_number_of_parameters() -> None:
    """Size XS, w = 16: 1.57M, the square last layer of 512 features included, which unit rows replace."""
    layers, features = shrinking_trunk(
        (3, 32, 32), AolConvolution, width=16, blocks=5, convolutions=5, patch=1
    )
    weights = sum(p.numel() for p in nn.ModuleList(layers).parameters() if p.dim() == 4)
    assert features == 512
    assert weights + features**2 == 1_569_280
    convolutions = [layer for layer in layers if isinstance(layer, AolConvolution)]
    assert [layer.weight.shape[-1] for layer in convolutions] == [1, *[3] * 20, *[1] * 5]
    assert [layer.input_size for layer in convolutions[1::5]] == [(2**n, 2**n) for n in (5, 4, 3, 2, 1)]


@pytest.mark.parametrize(
    ("shape", "patch", "features"), [((1, 28, 28), 4, 256), ((3, 10, 6), 2, 128), ((1, 8, 16), 2, 128)]
)
def test_features_are_what_comes_out(shape: tuple[int, int, int], patch: int, features: int) -> None:
    layers, number = shrinking_trunk(shape, AolConvolution, width=16, blocks=2, convolutions=1, patch=patch)
    x = torch.rand(2, *shape)
    for layer in layers:
        x = layer(x)
    assert x.shape == (2, number) == (2, features)


def test_both_partners_of_a_pair_stay() -> None:
    x = torch.randn(2, 8, 3, 3)
    kept = EverySecondChannel()(MaxMin()(x))
    a, b = x.chunk(2, dim=1)
    assert torch.equal(kept[:, :2], torch.maximum(a, b)[:, ::2])
    assert torch.equal(kept[:, 2:], torch.minimum(a, b)[:, ::2])
    assert EverySecondChannel().lipschitz_bound().value == 1.0
    state = RoundingState(norm=1.0, error=1e-9, unit=2.0**-24)
    assert EverySecondChannel().rounding(state) == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"width": 18},
            r"model\.width: must be a multiple of 4 that holds the 12 channels of a patch, got 18",
        ),
        ({"width": 8}, r"holds the 12 channels of a patch, got 8"),
        ({"blocks": 0}, r"blocks, convolutions and patch must be at least 1, got 0, 1 and 2"),
        ({"patch": 0}, r"must be at least 1, got 2, 1 and 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    sizes = {"width": 16, "blocks": 2, "convolutions": 1, "patch": 2} | change
    with pytest.raises(ConfigError, match=message):
        shrinking_trunk((3, 8, 8), AolConvolution, **sizes)
