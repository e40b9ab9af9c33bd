"""The estimated local constant: the reference vector, a slow dense reference per sample, and limits that are known."""

import copy

import pytest
import torch
from helpers import spectral_norm
from local_lip_vector import EPS, image, network
from torch import Tensor, nn

from lipnext.core.errors import UnsoundError
from lipnext.core.network import LipschitzNetwork
from lipnext.nn.clipped import ClippedReLU
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.head import PlainHead
from lipnext.nn.local_estimate import LocalEstimate, estimate_local
from lipnext.nn.pool import L2Pool
from lipnext.nn.reshape import Flatten
from lipnext.systems.local_lip import build


def _converged(net: LipschitzNetwork) -> LipschitzNetwork:
    """Let the warm power iteration of every layer arrive, to some 1e-4."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for _ in range(200):
            net.estimate_lipschitz()
    return net


def _close(actual: Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_reference_vector() -> None:
    net = _converged(network())
    estimate = estimate_local(net, image(), torch.tensor([1]), EPS, steps=200)
    first, second = estimate.stages
    _close(first.lower, 0.6322949, -1.03572291, -0.02062306)
    _close(first.upper, 0.9677051, -0.78427709, 0.18062306)
    assert first.varying.tolist() == [[False, False, True]]
    _close(first.radius, 0.19728206)
    _close(second.lower, 0.25, 0.79581308, -0.2)
    _close(second.upper, 0.28612461, 0.85, -0.09162616)
    assert second.varying.tolist() == [[True, False, False]]
    _close(second.radius, 0.25411002)
    _close(torch.cat([first.norm, second.norm]), 0.67082039, 0.2)
    _close(net.body[2](net.body[1](image().flatten(1))), 0.5, 0.0, 0.08)
    _close(net.features(image()), 0.266, 0.5, 0.0)
    _close(first.radius / EPS, 1.31521374)
    _close(second.radius / first.radius, 1.28805438)
    _close(estimate.constant, 0.13416408)
    _close(EPS * estimate.constant, 0.02012461)
    _close(estimate.logits, -0.084, 0.2468)
    _close(estimate.worst, -0.084 + 0.02414953, 0.2468)
    head = net.head.weight
    _close(torch.linalg.matrix_norm(head, 2), 1.41933567)
    _close(net.estimate_lipschitz() * torch.linalg.matrix_norm(head, 2), 2.40444948)
    _close(estimate.constant * torch.linalg.matrix_norm(head * second.varying, 2), 0.13682105)
    # of the margin: local with the last layer masked, and global
    pair = head[0] - head[1]
    _close(estimate.constant * (pair * second.varying).norm(), 0.16099689)
    _close(net.estimate_lipschitz() * pair.norm(), 3.28928279)


def _matrix(layer: nn.Module, shape: torch.Size) -> Tensor:
    """The matrix of an affine layer, column by column."""
    unit = torch.eye(shape.numel()).view(-1, *shape)
    return (layer(unit) - layer(torch.zeros(1, *shape))).flatten(1).mT


def _slow(net: LipschitzNetwork, x: Tensor, eps: float) -> tuple[float, Tensor, Tensor]:
    """Constant of the body and box of the features for one image, with matrices, SVDs and the rules of the paper."""
    lower, upper, centre, ball = x - eps, x + eps, x, eps
    varying, constant = torch.ones(x.numel(), dtype=torch.bool), 1.0
    for number, layer in enumerate(net.body):
        if isinstance(layer, Flatten):
            lower, upper, centre = layer(lower), layer(upper), layer(centre)
        if not isinstance(layer, Convolution | Dense):
            continue
        w, activation, inner = _matrix(layer, centre.shape[1:]), net.body[number + 1], layer(centre)
        middle, half = layer((lower + upper) / 2).flatten(), w.abs() @ (upper - lower).flatten() / 2
        filters = layer.weight.flatten(1).norm(dim=1)
        width = ball * filters.repeat_interleave(inner.numel() // len(filters))
        low = torch.maximum(middle - half, inner.flatten() - width)
        high = torch.minimum(middle + half, inner.flatten() + width)
        if isinstance(activation, ClippedReLU):
            rows = columns = ~((high <= 0) | (low >= activation.threshold.flatten()))
        else:
            n = len(low) // 2
            top = torch.maximum(low[:n], low[n:]) < activation.ceiling.flatten()
            bottom = torch.minimum(high[:n], high[n:]) > activation.floor.flatten()
            columns, rows = torch.cat([top, bottom]), torch.cat([top | bottom] * 2)
        constant *= spectral_norm(rows[:, None] * w * varying)
        ball, varying = ball * spectral_norm(w), columns
        lower, upper = activation(low.view_as(inner)), activation(high.view_as(inner))
        centre = activation(inner)
    return constant, lower.flatten(), upper.flatten()


@pytest.mark.parametrize("activation", ["relu-theta", "maxmin"])
@torch.no_grad()
def test_a_batch_of_images_against_a_dense_reference(activation: str) -> None:
    shape = (2, 6, 6)
    settings = {"convolutions": "4x3,6x4/2", "hidden": "8", "ceilings": "0.3", "floors": "-0.2"}
    net = _converged(build(input_shape=shape, classes=3, activation=activation, **settings).double())
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    for eps in (0.02, 0.3):
        estimate = estimate_local(net, images, torch.tensor([0, 1, 2]), eps, steps=500)
        assert not all(stage.varying.all() for stage in estimate.stages)
        last = estimate.stages[-1]
        for k in range(len(images)):
            constant, lower, upper = _slow(net, images[k : k + 1], eps)
            assert estimate.constant[k].item() == pytest.approx(constant, rel=1e-3)
            torch.testing.assert_close(last.stage.activate(last.lower)[k], lower, rtol=0, atol=1e-3)
            torch.testing.assert_close(last.stage.activate(last.upper)[k], upper, rtol=0, atol=1e-3)


def _small(ceilings: str = "0.3") -> tuple[LipschitzNetwork, Tensor, Tensor]:
    net = build(input_shape=(1, 6, 6), classes=3, convolutions="4x3", hidden="8", ceilings=ceilings).double()
    images = torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return net, images, torch.zeros(5, dtype=torch.int64)


@torch.no_grad()
def test_the_constant_grows_with_the_ball_and_stays_below_the_global_one() -> None:
    net, images, labels = _small()
    net = _converged(net)
    sizes = (0.0, 0.01, 0.05, 0.2, 1.0)
    constants = torch.stack([estimate_local(net, images, labels, eps, 500).constant for eps in sizes])
    assert (constants.diff(dim=0) >= -1e-6).all()
    assert (constants <= net.estimate_lipschitz() * (1 + 1e-6)).all()
    assert (constants[2] < constants[-1]).any()


@torch.no_grad()
def test_one_radius_for_each_image_is_the_same_as_one_after_the_other() -> None:
    net, images, labels = _small()
    net = _converged(net)
    radii = torch.tensor([0.01, 0.02, 0.05, 0.1, 0.3])
    together: LocalEstimate = estimate_local(net, images, labels, radii)
    for k, radius in enumerate(radii.tolist()):
        alone = estimate_local(net, images[k : k + 1], labels[:1], radius)
        torch.testing.assert_close(together.worst[k], alone.worst[0], rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_a_threshold_that_is_never_reached_leaves_the_rule_of_relu() -> None:
    for stage in estimate_local(*_small(ceilings="1e6"), 0.05).stages:
        assert torch.equal(stage.varying, (stage.upper > 0).view_as(stage.varying))
        assert not stage.varying.all()


def test_gradients_reach_every_parameter() -> None:
    net, images, labels = _small(ceilings="0.3,0.05")
    estimate_local(net, images, labels, 0.05).worst.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_layers_of_another_kind_are_refused() -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    net = LipschitzNetwork([L2Pool(4)], PlainHead(2, 2), (2, 2, 2))
    with pytest.raises(
        UnsoundError, match=r"body\.0 is a L2Pool, for which there is no bound around an image"
    ):
        estimate_local(net, torch.rand(1, 2, 2, 2), labels, 0.1)
    net = LipschitzNetwork([Flatten()], PlainHead(4, 2), (1, 2, 2))
    with pytest.raises(UnsoundError, match="needs an affine layer in the body"):
        estimate_local(net, torch.rand(1, 1, 2, 2), labels, 0.1)
