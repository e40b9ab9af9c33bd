import pytest
import torch
from helpers import Flatten, jacobian, rotations, spectral_norm
from torch import Tensor, nn

from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import UnsoundError
from lipnext.core.module import LipschitzModule
from lipnext.core.network import LipschitzNetwork
from lipnext.core.propagation import after_product
from lipnext.core.rounding import RoundingState
from lipnext.nn.head import UnitRowHead
from lipnext.nn.pool import L2Pool
from lipnext.nn.position import Centre
from lipnext.systems.lipnext import build

SHAPE = (1, 4, 4)


class Double(LipschitzModule):
    """`2 x`: a layer whose bound is not 1."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def lipschitz_bound(self) -> LipschitzBound:
        return LipschitzBound(value=2.0, norm=2.0, proof="scaling")

    def rounding(self, state: RoundingState) -> RoundingState:
        return after_product(state, 1, 2.0, 2.0)


def _net() -> LipschitzNetwork:
    net = build(input_shape=SHAPE, classes=3, width=8, depth=2, patch=2, shift=0.125)
    with torch.no_grad():
        for block in net.body[2:4]:
            block.mixing.copy_(rotations(n=8, seed=1))
            block.position.normal_()
            block.bias.normal_()
    return net


def test_the_body_is_bounded_by_the_product_and_the_jacobian_stays_below():
    net = _net()
    with torch.no_grad():
        net.body[2].rotation.mul_(1.5)
    bound = net.lipschitz_bound()
    product = 1.0
    for _, layer in net.named_layers():
        product *= layer.lipschitz_bound().value
    assert bound.value == pytest.approx(product, rel=1e-14)
    assert bound.value >= product * (1 - 1e-15)
    for seed in range(3):
        x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed))
        assert spectral_norm(jacobian(net.features, x)) <= bound.value + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_materialise_is_bit_for_bit_the_same_network_in_evaluation_mode(dtype):
    net = _net().to(dtype).train()
    frozen = net.materialise()
    images = torch.rand(5, *SHAPE, dtype=dtype)
    assert torch.equal(frozen(images), net(images))
    assert not any(module.training for module in frozen.modules())
    assert net.training
    assert frozen.input_shape == SHAPE


def test_a_layer_applied_twice_counts_twice():
    twice = Double()
    net = LipschitzNetwork([twice, twice, Flatten()], UnitRowHead(16, 3), SHAPE)
    images = torch.rand(2, *SHAPE)
    assert [name for name, _ in net.named_layers()] == ["body.0", "body.1", "body.2"]
    assert net.lipschitz_bound().value == 4.0
    assert torch.equal(net.materialise()(images), net(images))
    assert MarginCertifier(net).evidence.body.value == 4.0


@pytest.mark.parametrize(
    "use", [LipschitzNetwork.lipschitz_bound, LipschitzNetwork.materialise, MarginCertifier]
)
def test_an_unknown_module_is_refused_by_its_path(use):
    net = LipschitzNetwork([Centre(SHAPE), nn.BatchNorm2d(1), L2Pool(1)], UnitRowHead(1, 2), SHAPE)
    with pytest.raises(
        UnsoundError, match=r"body\.1 is a BatchNorm2d, which has no proved Lipschitz bound; use a"
    ):
        use(net)


def test_rounding_refuses_an_unknown_module_too():
    net = LipschitzNetwork([Flatten(), nn.ReLU()], UnitRowHead(16, 2), SHAPE)
    with pytest.raises(UnsoundError, match=r"body\.1 is a ReLU"):
        net.rounding(RoundingState(norm=1.0, error=0.0, unit=2.0**-53))


@pytest.mark.parametrize("head", [nn.Linear(16, 2), Double()])
def test_a_head_that_is_no_linear_head_is_refused(head):
    net = LipschitzNetwork([Flatten()], UnitRowHead(16, 2), SHAPE)
    net.head = head
    with pytest.raises(UnsoundError, match=f"head is a {type(head).__name__}, .*use a LinearHead"):
        net.materialise()
    with pytest.raises(UnsoundError, match=type(head).__name__):
        MarginCertifier(net)


def test_an_empty_body_is_refused():
    with pytest.raises(UnsoundError, match="nothing to compose"):
        LipschitzNetwork([], UnitRowHead(16, 2), SHAPE).lipschitz_bound()


def test_float32_evaluation_stays_within_the_network_rounding():
    net = _net().float()
    exact = net.materialise().double()
    images = torch.rand(16, *SHAPE, dtype=torch.float32)
    state = net.rounding(RoundingState(norm=4.0, error=0.0, unit=2.0**-24))
    with torch.no_grad():
        truth = exact.features(images.double())
        measured = (net.features(images).double() - truth).norm(dim=1).max().item()
    assert 0 < measured <= state.error < 1e-3
    assert truth.norm(dim=1).max() <= state.norm
