import math

import pytest
import torch

from lipnext.nn.activation import BetaAbs


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
