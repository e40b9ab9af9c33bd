import copy

import pytest
import torch

from lipnext.core.errors import UnsoundError
from lipnext.core.network import LipschitzNetwork
from lipnext.manifold.polar import polar_svd, residual
from lipnext.optim.average import RetractedAverage
from lipnext.optim.groups import split_parameters
from lipnext.optim.orthogonal_adam import OrthogonalAdam
from lipnext.systems.lipnext import build


def _net() -> LipschitzNetwork:
    return build(input_shape=(1, 4, 4), classes=3, width=8, depth=1, patch=2, shift=0.125)


def _move(net: LipschitzNetwork, seed: int) -> None:
    """A step of Adam on the manifold and noise on the rest."""
    generator = torch.Generator().manual_seed(seed)
    orthogonal, euclidean = split_parameters(net)
    for p in orthogonal.values():
        p.grad = torch.randn(p.shape, generator=generator)
    OrthogonalAdam(orthogonal.values(), lr=0.05).step()
    with torch.no_grad():
        for p in euclidean.values():
            p.add_(torch.randn(p.shape, generator=generator))


def test_the_average_is_the_recursion_and_matrices_are_its_polar_factors():
    net = _net()
    average = RetractedAverage(dict(net.named_parameters()), decay=0.6)
    slow = {name: p.detach().clone() for name, p in net.named_parameters()}
    for n in range(1, 9):
        _move(net, n)
        average.update()
        decay = min(0.6, (1 + n) / (10 + n))
        for name, p in net.named_parameters():
            slow[name] = decay * slow[name] + (1 - decay) * p.detach()
    averaged = average.network(net)
    orthogonal, euclidean = split_parameters(averaged)
    for name, p in euclidean.items():
        assert torch.allclose(p, slow[name], rtol=0, atol=1e-13)
    for name, p in orthogonal.items():
        assert residual(slow[name]) > 1e-4  # the plain average is not orthogonal
        assert residual(p) < 1e-13
        assert torch.allclose(p, polar_svd(slow[name]), rtol=0, atol=1e-12)
        assert torch.allclose(p.detach() @ p.mT.detach(), torch.eye(8), rtol=0, atol=1e-13)


def test_the_networks_given_are_left_alone():
    net = _net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    other = copy.deepcopy(net)
    average = RetractedAverage(dict(other.named_parameters()), decay=0.5)
    _move(other, 0)
    average.update()
    averaged = average.network(net)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
    assert averaged(torch.rand(2, 1, 4, 4)).shape == (2, 3)
    assert not torch.equal(averaged.body[2].mixing, net.body[2].mixing)


def test_a_state_dict_round_trip_goes_on_bit_for_bit():
    net = _net()
    average = RetractedAverage(dict(net.named_parameters()), decay=0.9)
    for n in range(3):
        _move(net, n)
        average.update()
    saved = copy.deepcopy(average.state_dict())
    other = RetractedAverage(dict(net.named_parameters()), decay=0.9)
    other.load_state_dict(saved)
    assert other.updates == 3
    _move(net, 3)
    for each in (average, other):
        each.update()
    for a, b in zip(average.network(net).parameters(), other.network(net).parameters(), strict=True):
        assert torch.equal(a, b)


def test_opposite_matrices_have_no_mean_and_are_refused():
    net = _net()
    average = RetractedAverage(dict(net.named_parameters()), decay=0.9)
    with torch.no_grad():
        average.average["body.2.mixing"].zero_()
    with pytest.raises(UnsoundError, match="cannot be retracted"):
        average.network(net)
