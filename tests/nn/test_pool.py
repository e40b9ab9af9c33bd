import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipnext.nn.pool import L2Pool, SpaceToDepth


def test_pool_is_the_norm_over_positions():
    x = torch.randn(2, 3, 4, 5)
    y = L2Pool(12)(x)
    for b in range(2):
        for c in range(5):
            total = sum(x[b, h, w, c].item() ** 2 for h in range(3) for w in range(4))
            assert y[b, c].item() == pytest.approx(total**0.5, rel=1e-14)


def test_the_gradient_at_zero_is_zero():
    x = torch.randn(2, 3, 3, 4)
    x[..., 1] = 0.0
    x.requires_grad_()
    L2Pool(9)(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(x.grad[..., 1], torch.zeros(2, 3, 3))
    assert torch.allclose(x.grad[..., 0].flatten(1).norm(dim=1), torch.ones(2))


def test_half_precision_sums_in_float32():
    x = torch.full((1, 64, 64, 1), 1.0, dtype=torch.bfloat16)
    y = L2Pool(4096)(x)
    assert y.dtype == torch.float32
    assert y.item() == 64.0  # a bfloat16 sum of ones would stop at 256
    assert L2Pool(4096)(x.double()).dtype == torch.float64


def test_a_width_too_small_for_the_patches_is_refused():
    with pytest.raises(ValueError, match=r"`width` must be at least 12 to hold the patches, got 11\."):
        SpaceToDepth(2, 11)(torch.zeros(1, 3, 4, 4))


@given(
    s=st.integers(1, 4),
    c=st.integers(1, 3),
    h=st.integers(1, 7),
    w=st.integers(1, 7),
    spare=st.integers(0, 3),
    seed=st.integers(0, 999),
)
@settings(max_examples=50, deadline=None)
def test_space_to_depth_is_an_isometry_that_places_every_pixel(s, c, h, w, spare, seed):
    """Sides that the patch does not divide are padded with zeros; missing channels are zero."""
    width = c * s * s + spare
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 2, c, h, w, generator=g)
    layer = SpaceToDepth(s, width)
    tokens = layer(x)
    assert tokens.shape == (2, -(-h // s), -(-w // s), width)
    slow = torch.zeros_like(tokens)
    for channel in range(c):
        for row in range(h):
            for column in range(w):
                index = channel * s * s + (row % s) * s + column % s
                slow[:, row // s, column // s, index] = x[:, channel, row, column]
    assert torch.equal(tokens, slow)
    # a permutation and zeros: the same squares, summed in another order
    apart = (layer(x) - layer(y)).flatten(1).norm(dim=1)
    assert torch.allclose(apart, (x - y).flatten(1).norm(dim=1), rtol=1e-14)
