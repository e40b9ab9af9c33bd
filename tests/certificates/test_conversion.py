"""Radii in another norm, against the definition of both balls."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipnext.certificates.conversion import in_norm
from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.errors import UnsoundError


def certificate(radius: float, norm: float, constant: float = 1.5) -> Certificate:
    one = torch.tensor([radius], dtype=torch.float64)
    return Certificate(
        label=torch.zeros(1, dtype=torch.int64),
        radius=one,
        margin=one,
        slack=one,
        norm=norm,
        kind="deterministic",
        confidence=1.0,
        semantics="real",
        lipschitz=LipschitzBound(value=constant, norm=norm, proof="product"),
        model_sha256="0" * 64,
    )


@given(radius=st.floats(0, 100), constant=st.floats(1e-3, 1e3), numbers=st.integers(1, 10**6))
def test_the_new_ball_lies_in_the_old_one(radius: float, constant: float, numbers: int) -> None:
    found = in_norm(certificate(radius, 2.0, constant), math.inf, numbers)
    # exactly: the corner of the linf ball is at the l2 distance r sqrt(d)
    assert Fraction(found.radius.item()) ** 2 * numbers <= Fraction(radius) ** 2
    assert found.radius.item() * math.sqrt(numbers) >= radius * (1 - 1e-15) - 1e-300
    assert found.lipschitz is not None
    assert Fraction(found.lipschitz.value) ** 2 >= Fraction(constant) ** 2 * numbers
    back = in_norm(certificate(radius, math.inf, constant), 2.0, numbers)
    assert (
        radius * (1 - 1e-15) - 1e-300 <= back.radius.item() <= radius
    )  # an l2 ball lies in the linf ball of its radius
    assert back.lipschitz is not None
    assert constant <= back.lipschitz.value <= constant * (1 + 1e-15)
    assert (found.norm, back.norm) == (math.inf, 2.0)


def test_nothing_happens_in_the_same_norm_and_other_norms_are_refused() -> None:
    one = certificate(0.5, 2.0)
    assert in_norm(one, 2.0, 64) is one
    with pytest.raises(UnsoundError, match=r"the norm must be 2\.0 or inf"):
        in_norm(one, 1.0, 64)
