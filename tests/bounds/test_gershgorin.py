"""Row sums of `W W^T`: against the dense operator, in exact rationals, and refused where they mean nothing."""

import math
from fractions import Fraction

import pytest
import torch
from helpers import fractions, spectral_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lipnext.bounds.gershgorin import row_sums, row_sums_up
from lipnext.core.errors import UnsoundError


def _weights(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator).exp()


def _slow_dense(weight: Tensor, witness: Tensor) -> list[Fraction]:
    """The definition, in exact rationals."""
    rows, v = fractions(weight), fractions(witness[None])[0]
    return [
        sum(
            (
                abs(sum((a * b for a, b in zip(rows[i], rows[j], strict=True)), Fraction(0))) * v[j] / v[i]
                for j in range(len(rows))
            ),
            Fraction(0),
        )
        for i in range(len(rows))
    ]


def _operator(weight: Tensor, height: int, width: int) -> Tensor:
    """The dense matrix of the convolution with zeros around the image."""
    basis = torch.eye(weight.shape[1] * height * width).reshape(-1, weight.shape[1], height, width)
    return functional.conv2d(basis, weight, padding=weight.shape[2] // 2).flatten(1).mT


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_dense_sums_are_the_definition_rounded_up(seed: int, rows: int, columns: int) -> None:
    weight, witness = _weights(seed, rows, columns)
    for up, plain, exact in zip(
        row_sums_up(weight, witness).tolist(),
        row_sums(weight, witness).tolist(),
        _slow_dense(weight, witness),
        strict=True,
    ):
        assert Fraction(up) >= exact
        assert up <= float(exact) * (1 + 1e-13)
        assert plain == pytest.approx(float(exact), rel=1e-13)


def test_convolution_sums_are_those_of_a_row_in_the_middle_of_a_large_image() -> None:
    weight, witness = _weights(0, 3, 2, 3, 3)
    gram = _operator(weight, 5, 5)
    gram = (gram @ gram.mT).reshape(3, 5, 5, 3, 5, 5)
    middle = (gram[:, 2, 2].abs().sum((2, 3)) * witness / witness[:, None]).sum(1)
    torch.testing.assert_close(row_sums(weight, witness), middle, rtol=1e-13, atol=0)
    torch.testing.assert_close(row_sums_up(weight, witness), middle, rtol=1e-12, atol=0)
    assert (row_sums_up(weight, witness) > middle * (1 - 1e-15)).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([(1, 1), (2, 3), (4, 4)]))
def test_the_scaled_operator_is_below_the_bound_also_at_the_border(seed: int, size: tuple[int, int]) -> None:
    weight, witness = _weights(seed, 3, 2, 3, 3)
    sums = row_sums_up(weight, witness)
    scale = torch.rand(3, generator=torch.Generator().manual_seed(seed))
    rows = _operator(weight, *size) * scale.sqrt().repeat_interleave(size[0] * size[1])[:, None]
    assert spectral_norm(rows) ** 2 <= (scale * sums).max().item() * (1 + 1e-12)


def test_the_bound_is_attained_where_no_products_cancel() -> None:
    weight = torch.rand(4, 6) + 0.1
    gram = weight @ weight.mT
    witness = torch.linalg.eigh(gram).eigenvectors[:, -1].abs()  # Perron's vector makes all sums equal
    sums = row_sums_up(weight, witness)
    torch.testing.assert_close(sums, torch.full((4,), spectral_norm(weight) ** 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(8))
def test_a_product_that_cancels_is_covered(seed: int) -> None:
    """Its rounding error is far above itself, and a witness that makes the other row count shows it."""
    generator = torch.Generator().manual_seed(seed)
    odd = (torch.rand(32, generator=generator) < 0.5) * 2.0**-52
    rows = torch.stack(
        [torch.ones(64), torch.cat([1 + odd, -torch.ones(32)])[torch.randperm(64, generator=generator)]]
    )
    witness = torch.tensor([1.0, 1e10])
    exact = _slow_dense(rows, witness)
    assert Fraction(row_sums_up(rows, witness)[0].item()) >= exact[0]


def test_squares_that_vanish_are_covered() -> None:
    small = torch.full((2, 3), 1e-200)
    exact = _slow_dense(small, torch.ones(2))
    assert all(
        Fraction(u) >= e for u, e in zip(row_sums_up(small, torch.ones(2)).tolist(), exact, strict=True)
    )


def test_gradients_reach_both_arguments() -> None:
    weight, witness = _weights(1, 3, 2)
    assert torch.autograd.gradcheck(row_sums, (weight.requires_grad_(), witness.requires_grad_()))


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 1e300])
def test_weights_about_which_nothing_can_be_proved_are_refused(spoilt: float) -> None:
    weight, witness = _weights(0, 3, 4)
    weight[1, 1] = spoilt
    with pytest.raises(UnsoundError, match="hold NaN, infinity or numbers that overflow"):
        row_sums_up(weight, witness)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 0.0, -1.0])
def test_a_witness_that_is_not_positive_is_refused(spoilt: float) -> None:
    weight, witness = _weights(0, 3, 4)
    witness[1] = spoilt
    with pytest.raises(UnsoundError, match="nothing can be proved about them"):
        row_sums_up(weight, witness)
