"""The right half of a split network: its layers, and that it claims no constant."""

import pytest
import torch
from torch.nn import functional

from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import RoundingState
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.reshape import ChannelsFirst
from lipnext.nn.right_half import RightHalf


def test_it_is_convolutions_and_dense_layers_with_relu_between() -> None:
    head = RightHalf((2, 6, 5), 3, convolutions=[(4, 3, 2, 1)], hidden=[7])
    x = torch.randn(5, 2, 6, 5)
    convolution, _, _, dense, _ = head.layers
    assert isinstance(convolution, Convolution)
    assert isinstance(dense, Dense)
    y = torch.relu(functional.conv2d(x, convolution.weight, convolution.bias, stride=2, padding=1)).flatten(1)
    y = torch.relu(y @ dense.weight.mT + dense.bias)
    torch.testing.assert_close(head(x), y @ head.weight.mT + head.bias)
    assert y.shape[1] == 7
    assert convolution.output_size == (3, 3)


def test_activations_keep_their_size_at_the_start() -> None:
    head = RightHalf((1, 16, 16), 3, convolutions=[(32, 3, 2, 1), (64, 3, 2, 1)], hidden=[300, 300])
    x = torch.randn(200, 1, 16, 16)
    for layer in head.layers:
        x = layer(x)
    assert 0.3 < x.square().mean().item() < 3.0


def test_without_layers_it_is_linear() -> None:
    head = RightHalf((2, 1, 1), 2)
    x = torch.randn(4, 2, 1, 1)
    torch.testing.assert_close(head(x), x.flatten(1) @ head.weight.mT + head.bias)


def test_what_is_stored_holds_no_state_of_power_iterations() -> None:
    head = RightHalf((1, 4, 4), 2, convolutions=[(2, 3, 1, 1)], hidden=[3])
    stored = head.materialise()
    assert stored.state_dict().keys() == dict(head.named_parameters()).keys()
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(stored(x), head(x))


def test_no_constant_is_claimed() -> None:
    head = RightHalf((2, 1, 1), 2)
    for ask in (
        head.distances,
        head.lipschitz_bound,
        lambda: head.rounding(RoundingState(norm=1.0, error=0.0, unit=2.0**-53)),
    ):
        with pytest.raises(UnsoundError, match=r"has no Lipschitz constant; certify it by votes") as refusal:
            ask()
        assert "\n" not in str(refusal.value)


def test_tokens_become_images() -> None:
    tokens = torch.randn(2, 3, 4, 5)
    images = ChannelsFirst()(tokens)
    assert images.shape == (2, 5, 3, 4)
    assert images[1, 2, 0, 3] == tokens[1, 0, 3, 2]
    assert ChannelsFirst().lipschitz_bound().value == 1.0
