"""A Lipschitz bound that carries its proof, and the estimate that is kept apart from it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lipnext.core.errors import UnsoundError, nearest
from lipnext.core.rounding import mul_up

PROOFS: dict[str, str] = {
    "isometry": "The map keeps distances: a permutation, a shift, zero padding or a reflection.",
    "one-lipschitz": "The map is 1-Lipschitz by an elementary inequality stated in its docstring.",
    "translation": "The map adds a constant, which leaves differences as they are.",
    "gram-residual": "||W||^2 <= 1 + ||W^T W - I|| plus the rounding error of the product, in float64.",
    "gram-iteration": "||W||^(2k) is at most the norm of the k-fold Gram product plus its rounding error.",
    "factor": "s I - W^T W = L L^T + E for some s and L, hence ||W||^2 <= s + ||E||, rounding errors included.",
    "exact": "The constant follows from the stored numbers without any rounding.",
    "product": "The constant of a composition is at most the product of the constants, rounded up.",
    "sum": "The constant of a sum is at most the sum of the constants, rounded up.",
    "scaling": "The map multiplies by a constant, whose absolute value is the Lipschitz constant.",
    "collatz-wielandt": "||A|| <= max_i (A v)_i / v_i for a non-negative symmetric A and any positive v.",
    "transfer-matrix": "A convolution is part of one on a torus, whose norm is that of its largest transfer matrix, "
    "bounded by its Gram matrix.",
    "schur": "||A||^2 <= (largest row sum) (largest column sum) of the absolute values of A (Schur test).",
    "window-overlap": "Each output is 1-Lipschitz in its window, and no input belongs to more than K^2 windows.",
    "root-sum-square": "The square of a concatenation's constant is at most the sum of the squares of its parts'.",
    "steepest-slope": "The map acts on every number by itself, with slopes of at most K in size.",
    "gradient-step": "x - W^T S relu(W x + b) is max(1, t - 1)-Lipschitz for t >= ||S^(1/2) W||^2.",
    "skew-exponential": "T terms of exp(L) are within ||L||^T / T! of an orthogonal map, since L is skew.",
    "quadratic-constraint": "Slopes within [0, 1] obey a quadratic inequality, which gives the constant that the layer's "
    "docstring derives.",
    "matrix-measure": "z = relu(A z + v) has one solution for every v if mu = max_i a_ii + sum_{j != i} |a_ij| < 1, and it is "
    "1 / (1 - max(mu, 0))-Lipschitz in v in linf.",
    "comparison": "The solution of z = relu(A z + B x + b), mu(A) < 1, moves by at most h ||x - x'|| in linf, unit by unit, "
    "for any h with (1 - a_ii) h_i >= sum_{j != i} |a_ij| h_j + sum_j |b_ij|.",
    "equivalent-norms": "A constant in linf is one in l2, and one in l2 times the root of the number of inputs is one in linf.",
    "row-sum": "In linf the constant of a matrix is its largest absolute row sum, rounded up.",
    "nearest-neighbour": "The distance to a fixed point set is 1-Lipschitz by the triangle inequality.",
}


@dataclass(frozen=True)
class Estimate:
    """A measured constant: a sample, an attack or a power iteration. It proves nothing and is no number.

    There is no conversion to float and no arithmetic on purpose; read `value` where an estimate is meant.

    Attributes:
        value: the estimate.
        method: how it was obtained, such as "power iteration, 20 steps".
    """

    value: float
    method: str


@dataclass(frozen=True, kw_only=True)
class LipschitzBound:
    """A proved upper bound: ||f(x) - f(y)|| <= value * ||x - y|| for all x, y, in the l2 or l-infinity norm.

    Attributes:
        value: the bound, finite and not negative.
        norm: 2.0 or inf, used on both sides of the inequality.
        proof: a key of `PROOFS`.

    Raises:
        UnsoundError: where the value is an estimate or no usable number, or the norm or proof is not known.
    """

    value: float
    norm: float
    proof: str

    def __post_init__(self) -> None:
        if isinstance(self.value, Estimate):
            raise UnsoundError(_estimate_refused(self.value))
        if not (_is_exact_float(self.value) and math.isfinite(self.value) and self.value >= 0):
            raise UnsoundError(
                f"a Lipschitz bound must be a finite Python float, at least 0, got {self.value!r}; "
                "round it up to a float first"
            )
        object.__setattr__(self, "value", float(self.value))
        norm_label(self.norm)
        if self.proof not in PROOFS:
            known = nearest(str(self.proof), PROOFS)
            raise UnsoundError(f"a Lipschitz bound needs a known proof, got {self.proof!r}; {known}")

    @staticmethod
    def compose(*bounds: "LipschitzBound") -> "LipschitzBound":
        """Bound the composition of maps by the product of their bounds, rounded up.

        Raises:
            UnsoundError: for no bound at all, something that is not a bound, or bounds in different norms.
        """
        if not bounds:
            raise UnsoundError("nothing to compose: pass at least one LipschitzBound")
        value = 1.0
        for bound in bounds:
            check_bound(bound)
            if bound.norm != bounds[0].norm:
                first, other = norm_label(bounds[0].norm), norm_label(bound.norm)
                raise UnsoundError(
                    f"cannot compose a bound in {first} with one in {other}; use one norm throughout"
                )
            value = mul_up(value, bound.value)
        return LipschitzBound(value=value, norm=bounds[0].norm, proof="product")


def check_bound(bound: object) -> None:
    """Refuse everything that is not a `LipschitzBound`.

    Raises:
        UnsoundError: for an `Estimate` (naming its method), a float or anything else.
    """
    if isinstance(bound, Estimate):
        raise UnsoundError(_estimate_refused(bound))
    if not isinstance(bound, LipschitzBound):
        raise UnsoundError(
            f"a proved LipschitzBound is needed, got {type(bound).__name__}; "
            "take it from lipschitz_bound() of the network"
        )


def layer_evidence(layers: Iterable[tuple[str, LipschitzBound]]) -> list[dict[str, Any]]:
    """Return what `certificate.json` says about each layer: its name, bound, proof, and what the proof states."""
    return [
        {"name": name, "bound": bound.value, "proof": bound.proof, "statement": PROOFS[bound.proof]}
        for name, bound in layers
    ]


def norm_label(norm: float) -> str:
    """Return "l2" for 2.0 and "linf" for inf.

    Raises:
        UnsoundError: for any other norm.
    """
    if norm == 2.0:
        return "l2"
    if norm == math.inf:
        return "linf"
    raise UnsoundError(f"the norm must be 2.0 or inf, got {norm!r}")


def _is_exact_float(value: object) -> bool:
    """Take integers only where float() keeps them: rounding 2**53 + 1 would lower the bound."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= 2**53


def _estimate_refused(estimate: Estimate) -> str:
    return (
        f"an estimate ({estimate.method}) is not a bound: it may lie below the true constant; "
        "use lipschitz_bound(), which proves its value"
    )
