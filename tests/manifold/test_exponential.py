import math

import pytest
import torch
from helpers import skew_with_angles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.manifold.exponential import THRESHOLDS, fast_exp, taylor_exp

EDGES = [edge for edge, _ in THRESHOLDS]


def _direction(n: int, norm: float, seed: int) -> Tensor:
    """A skew matrix of the given Frobenius norm."""
    g = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    a = g - g.T
    return a * (norm / torch.linalg.matrix_norm(a))


def _slow_taylor(a: Tensor, order: int) -> Tensor:
    total, term = torch.eye(len(a)), torch.eye(len(a))
    for k in range(1, order + 1):
        term = term @ a / k
        total = total + term
    return total


def test_thresholds_are_the_papers():
    assert THRESHOLDS == ((0.05, 2), (0.25, 3), (1.0, 4))


@pytest.mark.parametrize("order", [2, 3, 4])
def test_taylor_is_the_power_series(order):
    a = _direction(7, 0.8, seed=order)
    assert torch.allclose(taylor_exp(a, order), _slow_taylor(a, order), rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm", [1e-12, 0.01, 0.0499, 0.0501, 0.2499, 0.2501, 0.9999, 1.0001, 7.0])
def test_fast_exp_near_each_threshold_takes_the_stated_order_and_keeps_the_stated_error(norm):
    a = _direction(9, norm, seed=0)
    exact = torch.linalg.matrix_exp(a)
    order = next((order for edge, order in THRESHOLDS if norm < edge), None)
    if order is None:
        assert torch.equal(fast_exp(a), exact)
        return
    assert torch.allclose(fast_exp(a), _slow_taylor(a, order), rtol=0, atol=1e-15)
    # 1e-15: rounding of a handful of products of numbers below 1
    remainder = norm ** (order + 1) / math.factorial(order + 1) + 1e-15
    assert torch.linalg.matrix_norm(fast_exp(a) - exact) <= remainder


def test_a_norm_equal_to_an_edge_takes_the_next_order():
    # 16 entries of +-edge/4: the computed norm is exactly the edge
    for edge, order in ((0.25, 4), (1.0, None)):
        a = torch.zeros(8, 8)
        for k in range(4):
            for j in range(2):
                a[k, 4 + (k + j) % 4] = edge / 4
        a = a - a.T
        assert torch.linalg.matrix_norm(a).item() == edge
        wanted = torch.linalg.matrix_exp(a) if order is None else taylor_exp(a, order)
        assert torch.equal(fast_exp(a), wanted)


@given(
    norms=st.lists(st.sampled_from([0.0, 0.003, 0.04, 0.06, 0.2, 0.3, 0.9, 1.5, 4.0]), max_size=6),
    n=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_a_mixed_batch_equals_its_matrices_one_by_one(norms, n, seed):
    if n == 1:
        batch = torch.zeros(len(norms), 1, 1)
    else:
        batch = torch.stack(
            [_direction(n, norm, seed + k) for k, norm in enumerate(norms)] or [torch.zeros(0, n, n)]
        )
        batch = batch.reshape(-1, n, n)
    together = fast_exp(batch)
    assert together.shape == batch.shape
    for matrix, result in zip(batch, together, strict=True):
        # the same polynomial, but a batched product may sum in another order
        assert torch.allclose(result, fast_exp(matrix), rtol=0, atol=1e-14)


def test_a_stack_of_stacks_keeps_its_shape():
    batch = torch.stack([_direction(4, 0.02, 1), _direction(4, 0.5, 2)]).reshape(2, 1, 4, 4)
    assert torch.allclose(fast_exp(batch)[1, 0], fast_exp(batch[1, 0]), rtol=0, atol=1e-15)


RESIDUALS = {
    2: lambda t: t**4 / 4,
    3: lambda t: -(t**4) / 12 + t**6 / 36,
    4: lambda t: -(t**6) / 72 + t**8 / 576,
}


@pytest.mark.parametrize("order", [2, 3, 4])
def test_residual_has_the_stated_eigenvalues(order):
    angles = torch.tensor([0.9, 0.6, 0.35, 0.1])
    p = taylor_exp(skew_with_angles(angles, seed=3), order)
    measured = torch.linalg.eigvalsh(p.mT @ p - torch.eye(8))
    stated = RESIDUALS[order](angles).repeat_interleave(2).sort().values
    assert torch.allclose(measured, stated, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("order", "residual_order"), [(2, 4), (3, 4), (4, 6)])
def test_error_and_residual_fall_at_the_stated_order(order, residual_order):
    a = skew_with_angles(torch.tensor([0.9, 0.5, 0.2]), seed=1)
    error, residual = [], []
    for scale in (0.4, 0.2):
        p = taylor_exp(scale * a, order)
        error.append(torch.linalg.matrix_norm(p - torch.linalg.matrix_exp(scale * a)).item())
        residual.append(torch.linalg.matrix_norm(p.mT @ p - torch.eye(6)).item())
    # 0.15: the next term is (0.4 * 0.9)^2 / 12 = 1 % of the leading one, log2(1.01) = 0.014 with room
    assert math.log2(error[0] / error[1]) == pytest.approx(order + 1, abs=0.15)
    assert math.log2(residual[0] / residual[1]) == pytest.approx(residual_order, abs=0.15)


def test_float32_stays_float32():
    a = _direction(6, 0.1, seed=0).float()
    assert fast_exp(a).dtype == torch.float32
    assert torch.allclose(fast_exp(a).double(), torch.linalg.matrix_exp(a.double()), rtol=0, atol=1e-5)


def test_nan_is_not_hidden():
    a = torch.zeros(2, 3, 3)
    a[1, 0, 1] = math.nan
    result = fast_exp(a)
    assert torch.equal(result[0], torch.eye(3))
    assert result[1].isnan().any()


def test_unknown_order_is_refused():
    with pytest.raises(ValueError, match=r"`order` must be 2, 3 or 4, got 5\."):
        taylor_exp(torch.zeros(2, 2), 5)
