import torch
from helpers import is_norm_bound, rotations

from lipnext.nn.mixing import OrthogonalMixing


def test_every_position_is_multiplied_by_the_matrix():
    layer = OrthogonalMixing(6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 4, 6)
    assert torch.allclose(layer(x), torch.einsum("ij,bhwj->bhwi", layer.weight, x), rtol=0, atol=1e-14)
    assert torch.allclose(layer(x).norm(), x.norm(), rtol=1e-14)


def test_identity_start_is_the_identity():
    x = torch.randn(1, 2, 2, 5)
    assert torch.equal(OrthogonalMixing(5, identity=True)(x), x)


def test_the_bound_follows_the_stored_weight():
    """Drift off the manifold is seen, not assumed away."""
    layer = OrthogonalMixing(4).float()
    with torch.no_grad():
        layer.weight.copy_(1.01 * rotations(n=4, seed=0))
    # two squarings of the residual 0.0201 I cost at most 4^(1/8) of it
    assert 1.0099 < layer.lipschitz_bound().value < 1 + 0.01 * 4 ** (1 / 8) + 1e-4
    assert is_norm_bound(layer.weight, layer.lipschitz_bound().value)


def test_weights_take_the_default_dtype_and_are_declared_orthogonal():
    assert OrthogonalMixing(3).weight.dtype == torch.get_default_dtype()
    assert OrthogonalMixing.orthogonal == ("weight",)
