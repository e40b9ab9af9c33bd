import copy

import pytest
import torch
from torch import nn

from lipnext.core.errors import ConfigError
from lipnext.core.network import LipschitzNetwork
from lipnext.nn.head import UnitRowHead
from lipnext.nn.mixing import OrthogonalMixing
from lipnext.nn.pool import L2Pool, SpaceToDepth
from lipnext.optim.groups import split_parameters
from lipnext.systems.lipnext import build


def _net() -> LipschitzNetwork:
    return build(input_shape=(1, 4, 4), classes=3, width=8, depth=2, patch=2, shift=0.125)


def test_the_split_follows_the_classes_and_covers_everything():
    net = _net()
    orthogonal, euclidean = split_parameters(net)
    assert list(orthogonal) == ["body.2.rotation", "body.2.mixing", "body.3.rotation", "body.3.mixing"]
    assert set(euclidean) == {
        "body.2.position", "body.2.bias", "body.3.position", "body.3.bias", "head.weight", "head.bias",
    }  # fmt: skip
    everything = dict(net.named_parameters())
    for name, parameter in {**orthogonal, **euclidean}.items():
        assert parameter is everything.pop(name)
    assert not everything


def test_a_deep_copy_splits_alike():
    names = [list(group) for group in split_parameters(_net())]
    assert [list(group) for group in split_parameters(copy.deepcopy(_net()))] == names


def test_a_frozen_parameter_keeps_its_group():
    """Averages and reports need it too; without a gradient no optimiser moves it."""
    net = _net()
    net.body[2].rotation.requires_grad_(False)
    net.head.bias.requires_grad_(False)
    orthogonal, euclidean = split_parameters(net)
    assert orthogonal["body.2.rotation"] is net.body[2].rotation
    assert "head.bias" in euclidean


def test_a_shared_parameter_appears_once():
    one, two = OrthogonalMixing(4), OrthogonalMixing(4)
    two.weight = one.weight
    net = LipschitzNetwork([SpaceToDepth(2, 4), one, two, L2Pool(4)], UnitRowHead(4, 2), (1, 4, 4))
    assert list(split_parameters(net)[0]) == ["body.1.weight"]


def test_a_parameter_that_no_group_matches_is_an_error():
    net = LipschitzNetwork([nn.Conv2d(1, 1, 3)], UnitRowHead(4, 2), (1, 4, 4))
    with pytest.raises(
        ConfigError,
        match=r"no optimiser group matches parameter body\.0\.weight of a Conv2d; derive the layer from Lips",
    ):
        split_parameters(net)


def test_a_matrix_declared_orthogonal_must_be_square():
    layer = OrthogonalMixing(4)
    layer.weight = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(
        ConfigError, match=r"weight is declared orthogonal but has shape \(4, 3\); only square"
    ):
        split_parameters(layer)
