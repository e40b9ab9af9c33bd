"""The base class of every layer that answers for its own Lipschitz bound and rounding error."""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Self

from torch import nn

from lipnext.core.bound import LipschitzBound
from lipnext.core.rounding import RoundingState


class LipschitzModule(nn.Module, ABC):
    """A layer with a proved bound; `forward` is a function of the input and the parameters alone.

    `orthogonal` names the parameters that are square orthogonal matrices, or stacks of them in the last two
    dimensions. It stands on the class because attributes of a tensor are lost by `deepcopy`.
    """

    orthogonal: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def lipschitz_bound(self) -> LipschitzBound:
        """Return a proved bound of the real-arithmetic map with exactly the stored weights."""

    @abstractmethod
    def rounding(self, state: RoundingState) -> RoundingState:
        """Return the state after this layer: its norm and floating-point error, from those before it."""

    def materialise(self) -> Self:
        """Return a copy for inference: products and normalisations of the weights are formed and stored once.

        Same function; what is certified, saved and exported is this copy. A layer with nothing to form
        returns a plain copy.
        """
        return copy.deepcopy(self)
