"""A network as a chain of layers and a linear head: what a global margin certificate is derived from."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import UnsoundError
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState


class LinearHead(LipschitzModule):
    """A last layer `z = W y + c`; once materialised, `weight (K, C)` and `bias (K,)` are what is applied."""

    weight: nn.Parameter
    bias: nn.Parameter

    @abstractmethod
    def distances(self) -> Tensor:
        """`||w_i - w_j||` for all pairs, shape `(K, K)`, differentiable; for losses, *not* rounded upwards."""


class LipschitzNetwork(LipschitzModule):
    """Images `(B, c, H, W)` in [0, 1] through `body` to features, and through `head` to logits.

    Args:
        body: layers applied in order; their bounds multiply.
        head: the last layer; its row distances enter the certificate pair by pair.
        input_shape: `(c, H, W)`.
    """

    def __init__(
        self, body: Sequence[LipschitzModule], head: LinearHead, input_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.body = nn.ModuleList(body)
        self.head: LinearHead = head
        self.input_shape = input_shape

    def features(self, images: Tensor) -> Tensor:
        """Return what the head sees, shape `(B, C)`."""
        x = images
        for layer in self.body:
            x = layer(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, K)`."""
        return self.head(self.features(images))

    def named_layers(self) -> list[tuple[str, LipschitzModule]]:
        """The layers of the body with their names.

        Raises:
            UnsoundError: if one of them does not answer for a bound; nothing can be proved about such a network.
        """
        layers: list[tuple[str, LipschitzModule]] = []
        for name, layer in enumerate(self.body):  # named_children() would skip a layer that is applied twice
            if not isinstance(layer, LipschitzModule):
                raise UnsoundError(
                    f"body.{name} is a {type(layer).__name__}, which has no proved Lipschitz bound; "
                    "use a layer of lipnext.nn or derive it from LipschitzModule"
                )
            layers.append((f"body.{name}", layer))
        return layers

    def lipschitz_bound(self) -> LipschitzBound:
        """Bound the body (not the head): the product of its layers' bounds."""
        return LipschitzBound.compose(*(layer.lipschitz_bound() for _, layer in self.named_layers()))

    def estimate_lipschitz(self) -> Tensor | float:
        """Estimate the body's constant by the product of its layers' estimates, differentiable; for losses alone."""
        constant: Tensor | float = 1.0
        for _, layer in self.named_layers():
            constant = constant * layer.estimate_lipschitz()
        return constant

    def estimate_distances(self) -> Tensor:
        """`K ||w_i - w_j||` with the estimated K, shape `(K, K)`, differentiable; for losses alone."""
        return self.head.distances() * self.estimate_lipschitz()

    def radius_estimator(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of images `(B, c, H, W)` and labels `(B,)` that estimates signed radii `(B,)`.

        The radius of a sample is negative where its label is not predicted. For figures during training: what costs is
        done once, nothing is proved and no rounding counted.
        """
        frozen = self.materialise()
        distances = frozen.head.distances() * self.estimate_lipschitz()

        @torch.no_grad()
        def estimate(images: Tensor, labels: Tensor) -> Tensor:
            logits = frozen(images)
            ratio = (logits.gather(1, labels[:, None]) - logits) / distances[labels]
            return ratio.scatter(1, labels[:, None], float("inf")).min(dim=1).values

        return estimate

    def rounding(self, state: RoundingState) -> RoundingState:
        """Follow the error of the body's evaluation layer by layer."""
        for _, layer in self.named_layers():
            state = layer.rounding(state)
        return state

    def materialise(self) -> Self:
        """Return a copy for inference, every layer materialised, in evaluation mode.

        Raises:
            UnsoundError: if a layer of the body is unknown, or the head is no `LinearHead`.
        """
        if not isinstance(self.head, LinearHead):
            raise UnsoundError(
                f"head is a {type(self.head).__name__}, whose row distances nobody answers for; "
                "use a LinearHead such as lipnext.nn.head.UnitRowHead"
            )
        network = super().materialise()
        network.body = nn.ModuleList([layer.materialise() for _, layer in self.named_layers()])
        network.head = self.head.materialise()
        return network.eval()
