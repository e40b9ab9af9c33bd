"""The bound by a semidefinite factor, against exact rationals and singular values."""

import pytest
import torch
from helpers import is_norm_bound, jacobian, rotations, spectral_norm
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lipnext.bounds.convolution import convolution_bound
from lipnext.bounds.factor import factor_bound, small_convolution_bound
from lipnext.bounds.spectral import spectral_bound
from lipnext.core.errors import UnsoundError


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    exponent=st.integers(-120, 120),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_it_is_a_norm_bound_in_exact_arithmetic_and_sharp(
    rows: int, columns: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng).to(dtype) * 2.0**exponent
    bound = factor_bound(weight)
    assert is_norm_bound(weight, bound.value)
    # s lies 2^-36 above the largest eigenvalue, the norm half as much above, and the residuals are far smaller
    assert bound.value <= spectral_norm(weight) * (1 + 2.0**-36)


def test_equal_singular_values_cost_nothing_where_gram_iteration_loses_a_percent() -> None:
    weight = 0.999 * rotations(n=96, seed=0)
    assert 0.999 * (1 - 1e-12) <= factor_bound(weight).value <= 0.999 * (1 + 1e-10)
    assert factor_bound(weight).proof == "factor"
    assert spectral_bound(weight).value > 0.999 * 1.005


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 2, dtype=torch.float64),
        torch.ones(4, 4, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64) * 2.0**-1060,
        torch.diag(torch.tensor([1.0, 1e-170, 1e-300], dtype=torch.float64)),
        torch.full((2, 3), 1e150, dtype=torch.float64),
    ],
    ids=["zero", "rank one", "subnormal", "far apart", "large"],
)
def test_degenerate_matrices_are_bounded_too(weight: torch.Tensor) -> None:
    assert is_norm_bound(weight, factor_bound(weight).value)


@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.5, 0.99, 1.0, 1.01, 2.0]))
def test_no_trust_in_eigenvalues_or_factors_is_needed(seed: int, share: float) -> None:
    """Whatever the libraries return, the residual is measured: the bound may get loose, never wrong."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 4, generator=rng)
    with pytest.MonkeyPatch.context() as patch:
        eigvalsh, cholesky = torch.linalg.eigvalsh, torch.linalg.cholesky_ex
        patch.setattr(torch.linalg, "eigvalsh", lambda a: share * eigvalsh(a))
        factor_bound_honest = factor_bound(weight)
        assert is_norm_bound(weight, factor_bound_honest.value)

        def wrong(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            factor, _ = cholesky(a)
            return factor + torch.randn(a.shape, generator=rng), torch.tensor(0)

        patch.setattr(torch.linalg, "cholesky_ex", wrong)
        spoiled = factor_bound(weight)
    assert spoiled.proof == "factor"
    assert is_norm_bound(weight, spoiled.value)


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(UnsoundError, match="a weight matrix holds NaN or infinity"):
        factor_bound(torch.full((2, 2), torch.nan))


@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_small_convolutions_are_bounded_by_their_own_matrix(
    channels: tuple[int, int], size: tuple[int, int], kernel: int, stride: int, padding: int, seed: int
) -> None:
    if min(size) + 2 * padding < kernel:
        return
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels[0], channels[1], kernel, kernel, generator=rng).float()

    def apply(x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, weight.double(), stride=stride, padding=padding)

    truth = spectral_norm(jacobian(apply, torch.zeros(1, channels[1], *size)))
    bound = small_convolution_bound(weight, size, stride=stride, padding=padding)
    # an SVD of a hundred rows is right to 1e-13; s lies 2^-36 above the largest eigenvalue
    assert truth * (1 - 1e-12) <= bound.value <= truth * (1 + 2.0**-36) or truth == 0
    torus = convolution_bound(weight, size, stride=stride, padding=padding)
    assert bound.value <= torus.value * (1 + 1e-10) + 1e-100


def test_the_matrix_of_a_small_convolution_is_exact() -> None:
    weight = torch.tensor([[[[3.0, -1.0], [0.5, 2.0]]]], dtype=torch.float32) / 3
    rows = []
    for i in range(2):
        for j in range(2):
            row = torch.zeros(3, 3, dtype=torch.float64)
            row[i : i + 2, j : j + 2] = weight[0, 0].double()
            rows.append(row.flatten())
    bound = small_convolution_bound(weight, (3, 3))
    assert is_norm_bound(torch.stack(rows), bound.value)
    assert bound == factor_bound(torch.stack(rows).mT)


def test_larger_convolutions_go_by_their_torus() -> None:
    weight = torch.randn(8, 8, 3, 3)
    assert small_convolution_bound(weight, (12, 12), padding=1) == convolution_bound(
        weight, (12, 12), padding=1
    )
    assert small_convolution_bound(weight, (4, 4), padding=1).proof == "factor"
    with pytest.raises(UnsoundError, match="NaN or infinity"):
        small_convolution_bound(weight * torch.inf, (4, 4), padding=1)
