"""The base class of every layer that answers for its own Lipschitz bound and rounding error."""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Self

from torch import Tensor, nn

from lipnext.core.bound import LipschitzBound
from lipnext.core.rounding import RoundingState


class LipschitzModule(nn.Module, ABC):
    """A layer with a proved bound; in evaluation `forward` is a function of the input and the stored tensors alone.

    `orthogonal` names the parameters that are square orthogonal matrices, or stacks of them in the last two
    dimensions. It stands on the class because attributes of a tensor are lost by `deepcopy`. `batch_parts` says how a
    batch may be cut in training: at will where images do not depend on each other; into one part for each process where
    the layer takes its means over all of them (`lipnext.core.world.batch_mean`); or not at all.
    """

    orthogonal: ClassVar[tuple[str, ...]] = ()
    batch_parts: ClassVar[Literal["any", "processes", "none"]] = "any"

    @abstractmethod
    def lipschitz_bound(self) -> LipschitzBound:
        """Return a proved bound of the real-arithmetic map with exactly the stored weights."""

    @abstractmethod
    def rounding(self, state: RoundingState) -> RoundingState:
        """Return the state after this layer: its norm and floating-point error, from those before it."""

    def estimate_lipschitz(self) -> Tensor | float:
        """Estimate the constant, differentiable in the weights: what a loss scales a margin by while training.

        1 for a layer that is 1-Lipschitz by construction. It proves nothing and never reaches a certificate.
        """
        return 1.0

    def unfused(self) -> nn.Module:
        """Return the same function of the same tensors as plain operations, for export; most layers are plain already."""
        return self

    def materialise(self) -> Self:
        """Return a copy for inference: products and normalisations of the weights are formed and stored once.

        Same function; what is certified, saved and exported is this copy. A layer with nothing to form
        returns a plain copy.
        """
        return copy.deepcopy(self)
