"""How one operation moves the pair (norm, error) of a float64 or float32 evaluation (soundness analysis 5.4, step 3).

`state.norm` bounds the exact activations of one sample from above, `state.error` the l2 distance between computed and exact
ones. Every bound holds for any order of summation, with or without fused multiply-add, as long as subnormal numbers are kept.
"""

import math

from torch import Tensor

from lipnext.core.rounding import RoundingState, add_up, gamma, mul_up, sqrt_up, up


def norm_up(tensor: Tensor, copies: int = 1) -> float:
    """`sqrt(copies) ||tensor||_2` rounded up; summed exactly by `math.fsum` on squares rounded up."""
    squares = math.fsum(up(float(v) * float(v)) for v in tensor.detach().double().flatten().tolist())
    return sqrt_up(mul_up(up(squares), float(copies)))


def after_addition(state: RoundingState, shift_norm: float) -> RoundingState:
    """Adding a stored constant of the given norm: one rounding, relative to the computed sum."""
    norm = add_up(state.norm, shift_norm)
    error = add_up(state.error, mul_up(state.unit, add_up(norm, state.error)))
    return RoundingState(norm=norm, error=error, unit=state.unit)


def after_product(state: RoundingState, terms: int, bound: float, absolute: float) -> RoundingState:
    """A matrix product with inner dimension `terms`, `||W||_2 <= bound` and `|| |W| ||_2 <= absolute`.

    `|fl(W x) - W x| <= gamma_terms |W| |x|` in every component, hence
    `error' = bound error + gamma absolute (norm + error)`.
    """
    rounding = mul_up(gamma(terms, state.unit), mul_up(absolute, add_up(state.norm, state.error)))
    error = add_up(add_up(mul_up(bound, state.error), rounding), state.underflow)
    return RoundingState(norm=mul_up(bound, state.norm), error=error, unit=state.unit)


def after_affine(
    state: RoundingState, terms: int, bound: float, absolute: float, shift_norm: float
) -> RoundingState:
    """`W x + b` as one operation (`addmm`): the bias may enter the sum first and be rounded with every term.

    In every component the error is at most `gamma_(terms + 1) (|W| |x| + |b|)`.
    """
    size = add_up(mul_up(absolute, add_up(state.norm, state.error)), shift_norm)
    rounding = add_up(mul_up(gamma(terms + 1, state.unit), size), state.underflow)
    error = add_up(mul_up(bound, state.error), rounding)
    return RoundingState(norm=add_up(mul_up(bound, state.norm), shift_norm), error=error, unit=state.unit)


def after_relative(state: RoundingState, units: float) -> RoundingState:
    """A 1-Lipschitz map that keeps 0 and is computed with an error of at most `units` unit roundoffs of the norm before it."""
    rounding = mul_up(mul_up(units, state.unit), add_up(state.norm, state.error))
    error = add_up(add_up(state.error, rounding), state.underflow)
    return RoundingState(norm=state.norm, error=error, unit=state.unit)


def after_pooling(state: RoundingState, window: int) -> RoundingState:
    """A root of a sum of `window` squares: 1-Lipschitz, relative error below `gamma_(window + 2)`."""
    rounding = mul_up(gamma(window + 2, state.unit), add_up(state.norm, state.error))
    error = add_up(add_up(state.error, rounding), state.underflow)
    return RoundingState(norm=state.norm, error=error, unit=state.unit)
