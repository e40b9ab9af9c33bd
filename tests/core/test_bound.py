"""A bound cannot be made of an estimate, and composing rounds up."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipnext.core.bound import PROOFS, Estimate, LipschitzBound, check_bound, norm_label
from lipnext.core.errors import UnsoundError


def bound(value: float = 1.0, norm: float = 2.0, proof: str = "exact") -> LipschitzBound:
    return LipschitzBound(value=value, norm=norm, proof=proof)


@given(st.lists(st.floats(min_value=0, max_value=10), min_size=1, max_size=20))
def test_compose_is_never_below_the_exact_product(values: list[float]) -> None:
    exact = math.prod(map(Fraction, values))
    composed = LipschitzBound.compose(*map(bound, values))
    assert Fraction(composed.value) >= exact
    # One rounding a factor, each at most 2^-52 relative or one subnormal step times the factors that follow.
    assert Fraction(composed.value) <= exact * (1 + Fraction(1, 2**52)) ** 20 + Fraction(10**21, 2**1074)
    assert composed.proof == "product"
    assert composed.norm == 2.0


def test_sixty_four_isometries_compose_to_exactly_one() -> None:
    assert LipschitzBound.compose(*[bound(proof="isometry")] * 64).value == 1.0


def test_an_estimate_is_no_number_and_no_bound() -> None:
    estimate = Estimate(0.97, "power iteration, 10 steps")
    with pytest.raises(TypeError):
        float(estimate)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        estimate * 1.0  # type: ignore[operator]
    for refused in (
        lambda: bound(estimate),
        lambda: check_bound(estimate),
        lambda: LipschitzBound.compose(estimate),
    ):
        with pytest.raises(UnsoundError, match=r"an estimate \(power iteration, 10 steps\) is not a bound"):
            refused()


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -1e-300, "1", None, True, 2**53 + 1, 10**400, torch.tensor(1.0), np.float32(1)],
)
def test_unusable_values_are_refused(value: object) -> None:
    with pytest.raises(UnsoundError, match="must be a finite Python float, at least 0, got"):
        bound(value)  # type: ignore[arg-type]


def test_small_integers_become_floats() -> None:
    assert isinstance(bound(1).value, float)


def test_unknown_norm_and_proof_are_refused() -> None:
    with pytest.raises(UnsoundError, match=r"the norm must be 2.0 or inf, got 1.0"):
        bound(norm=1.0)
    with pytest.raises(UnsoundError, match="needs a known proof, got 'gram'; known: collatz"):
        bound(proof="gram")


def test_compose_refuses_nothing_numbers_and_mixed_norms() -> None:
    with pytest.raises(UnsoundError, match="nothing to compose"):
        LipschitzBound.compose()
    with pytest.raises(UnsoundError, match="a proved LipschitzBound is needed, got float"):
        LipschitzBound.compose(bound(), 1.0)  # type: ignore[arg-type]
    with pytest.raises(UnsoundError, match="cannot compose a bound in l2 with one in linf"):
        LipschitzBound.compose(bound(), bound(norm=math.inf))
    with pytest.raises(UnsoundError, match="got inf; round it up"):
        LipschitzBound.compose(bound(1e200), bound(1e200))


def test_every_proof_is_explained_in_one_sentence() -> None:
    assert all(text.endswith(".") and "\n" not in text for text in PROOFS.values())


def test_norm_labels() -> None:
    assert norm_label(2.0) == "l2"
    assert norm_label(math.inf) == "linf"
