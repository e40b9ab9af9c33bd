import pytest
import torch
from helpers import is_norm_bound

from lipnext.nn.head import FirstCoordinatesHead, UnitRowHead


def _head(channels: int = 6, classes: int = 5, scale: float = 3.0) -> UnitRowHead:
    head = UnitRowHead(channels, classes, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.weight.mul_(scale * torch.rand(classes, 1, generator=torch.Generator().manual_seed(1)) + 0.1)
        head.bias.copy_(torch.randn(classes, generator=torch.Generator().manual_seed(2)))
    return head


def test_rows_are_normalised_and_logits_use_them():
    head = _head()
    assert not torch.allclose(head.weight.norm(dim=1), torch.ones(5))
    assert torch.allclose(head.rows().norm(dim=1), torch.ones(5), rtol=1e-15)
    y = torch.randn(3, 6)
    for k in range(5):
        wanted = y @ (head.weight[k] / head.weight[k].norm()) + head.bias[k]
        assert torch.allclose(head(y)[:, k], wanted, rtol=0, atol=1e-14)


def test_distances_are_those_of_the_rows():
    head = _head()
    rows, distances = head.rows(), head.distances()
    for i in range(5):
        for j in range(5):
            exact = (rows[i] - rows[j]).norm().item()
            # the floor under the root: sqrt(1e-12) on the diagonal
            assert distances[i, j].item() == pytest.approx(max(exact, 1e-6), rel=1e-9, abs=2e-7)


def test_distances_are_differentiable_and_finite_at_equal_rows():
    head = _head()
    with torch.no_grad():
        head.weight[1] = head.weight[0]
    head.distances().sum().backward()
    assert torch.isfinite(head.weight.grad).all()
    fresh = _head()

    def function(weight):
        distances = torch.func.functional_call(_Distances(fresh), {"head.weight": weight}, ())
        return distances[~torch.eye(5, dtype=torch.bool)]

    assert torch.autograd.gradcheck(function, (fresh.weight.detach().requires_grad_(),))


class _Distances(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self):
        return self.head.distances()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_materialise_stores_the_rows_and_is_bit_for_bit_the_same(dtype):
    head = _head().to(dtype)
    frozen = head.materialise()
    y = torch.randn(4, 6, dtype=dtype)
    assert torch.equal(frozen.weight, head.rows())
    assert torch.equal(frozen(y), head(y))
    assert torch.equal(frozen.materialise()(y), head(y))
    assert not head.normalised
    # float32 rows are a rounding away from unit length; they are stored as they are, not normalised again
    assert torch.equal(frozen.rows(), frozen.weight)
    assert torch.equal(
        frozen.double()(y.double()), y.double() @ frozen.weight.double().mT + frozen.bias.double()
    )


def test_logits_keep_the_dtype_of_the_weights_under_autocast():
    head = _head().float()
    y = torch.randn(2, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(y)
        distances = head.distances()
    assert logits.dtype == distances.dtype == torch.float32
    assert torch.equal(logits, head(y.float()))
    assert torch.equal(distances, head.distances())


def test_the_bound_is_that_of_the_rows():
    head = UnitRowHead(4, 3)
    assert is_norm_bound(head.materialise().weight, head.lipschitz_bound().value)
    opposite = UnitRowHead(2, 2)
    with torch.no_grad():
        opposite.weight.copy_(torch.tensor([[3.0, 0.0], [-2.0, 0.0]]))
    # both rows on one line: the norm is sqrt(2), not 1
    assert opposite.lipschitz_bound().value == pytest.approx(2**0.5, rel=1e-9)


def test_the_first_coordinates_are_logits_with_rows_root_two_apart_and_nothing_to_learn():
    head = FirstCoordinatesHead(6, 3)
    y = torch.randn(4, 6)
    assert torch.equal(head(y), y[:, :3])
    assert torch.equal(head.materialise()(y), y[:, :3])
    assert head.distances()[0, 1].item() == pytest.approx(2**0.5, rel=1e-15)
    assert not any(parameter.requires_grad for parameter in head.parameters())
