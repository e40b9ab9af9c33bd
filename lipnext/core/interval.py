"""What a box around one image asks of a network: layers that map boxes to boxes in the l-infinity norm, rounding included.

A box is a pair of float64 tensors. With `unit` None it holds what exact arithmetic gives for every input of the box before
it; with a unit roundoff it holds what a program of that arithmetic gives, in any order of summation.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from lipnext.core.module import LipschitzModule
from lipnext.core.network import Head
from lipnext.core.rounding import UNDERFLOW, UNIT_ROUNDOFF, gamma, tensor_down, tensor_up

_TINY = 1e-290  # covers every underflow in a float64 sum
_UP = 1 + 2.0**-40  # covers the rounding of the few operations that form a widening


class IntervalModule(LipschitzModule):
    """A layer that answers for boxes; its `lipschitz_bound` is in the l-infinity norm."""

    @abstractmethod
    def box(self, lower: Tensor, upper: Tensor, unit: float | None) -> tuple[Tensor, Tensor]:
        """Return a box that holds the outputs of all inputs in the box `lower, upper`, float64."""


class IntervalHead(Head):
    """A last layer that answers for boxes."""

    @abstractmethod
    def margins(self, lower: Tensor, upper: Tensor, labels: Tensor, unit: float | None) -> Tensor:
        """Bound `z_y - z_j` from below for all features in the box, `(n, K)`.

        Where it is positive, the logit of the label y `(n,)` is larger than that of j; the column of the label itself says
        nothing.
        """

    @abstractmethod
    def constants(self) -> Tensor:
        """Return the constants of `z_i - z_j` in the l-infinity norm of the features, rounded up, `(K, K)`, float64."""


def relative_error(operations: int, unit: float | None) -> float:
    """Bound the relative error of a sum or product of non-negative terms: of this evaluation, and of the program's."""
    own = gamma(operations + 4, UNIT_ROUNDOFF[torch.float64])
    return (own if unit is None else own + gamma(operations + 4, unit)) * _UP


def outward(
    lower: Tensor, upper: Tensor, lower_error: Tensor, upper_error: Tensor, unit: float | None
) -> tuple[Tensor, Tensor]:
    """Move the sides of a box outwards by errors of the shape of the sides, at least 0, and by what underflow can do."""
    least = _TINY if unit is None else _TINY + UNDERFLOW[unit]
    return tensor_down(lower - (lower_error * _UP + least)), tensor_up(upper + (upper_error * _UP + least))
