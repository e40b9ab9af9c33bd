import math

import pytest
import torch

from lipnext.nn.activation import BetaAbs, MaxMin


@pytest.mark.parametrize("folded", [0, 3, 5])
def test_the_first_channels_are_folded(folded):
    x = torch.randn(2, 3, 4, 5)
    y = BetaAbs(folded)(x)
    for c in range(5):
        assert torch.equal(y[..., c], x[..., c].abs() if c < folded else x[..., c])


def test_norms_and_the_gradient_norm_are_preserved():
    x = torch.randn(4, 6, requires_grad=True)
    y = BetaAbs(3)(x)
    assert torch.equal(y.norm(dim=1), x.norm(dim=1))
    weight = torch.randn(4, 6)
    (y * weight).sum().backward()
    assert torch.equal(x.grad.abs(), weight.abs())


def test_half_folded_contains_minmax():
    """Rotate a pair by 45 degrees, fold one coordinate, rotate back: (a, b) -> (max, min)."""
    q = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    pairs = torch.randn(50, 2)
    result = BetaAbs(1)(pairs @ q.mT) @ q
    # |a - b| and a + b: (s + d)/2 is the max, (s - d)/2 the min
    wanted = torch.stack([pairs.max(dim=1).values, pairs.min(dim=1).values], dim=1)
    assert torch.allclose(result.sort(dim=1).values, wanted.sort(dim=1).values, rtol=0, atol=1e-14)
    assert torch.allclose(result, wanted, rtol=0, atol=1e-14)


def test_maxmin_of_a_training_step_has_torch_s_gradients_of_both_orders():
    """In evaluation it is made of torch's own maximum and minimum."""
    x = torch.randn(3, 4, 2, requires_grad=True)  # without ties
    weight = torch.randn(3, 4, 2)
    training, evaluation = MaxMin(), MaxMin().eval()
    assert torch.equal(training(x), evaluation(x))
    grads = [torch.autograd.grad((layer(x).sin() * weight).sum(), x)[0] for layer in (training, evaluation)]
    assert torch.equal(*grads)
    assert torch.autograd.gradgradcheck(training, x)


def test_maxmin_passes_the_whole_gradient_on_at_ties():
    x = torch.zeros(1, 2, requires_grad=True)
    (MaxMin()(x) * torch.tensor([[2.0, 5.0]])).sum().backward()
    assert x.grad.tolist() == [[2.0, 5.0]]
