"""A network as a chain of layers and a head: what a global margin certificate is derived from."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import UnsoundError
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState

SOFTPLUS_THRESHOLD = 40.0
"""Where torch's softplus becomes the identity: `log(1 + exp(-40))` is below the roundoff of 40, unlike at the default of 20."""


Walk = Callable[[Iterable[nn.Module], Tensor], Tensor]
"""A way to apply layers one after the other; all ways give the same values, and differ in what they store for the gradient."""


def in_turn(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Apply the layers one after the other."""
    for layer in layers:
        x = layer(x)
    return x


def signed_radii(logits: Tensor, labels: Tensor, distances: Tensor) -> Tensor:
    """`min_j (z_y - z_j) / distances_yj` for each sample, shape `(B,)`, negative where y is not predicted; not rounded down."""
    ratio = (logits.gather(1, labels[:, None]) - logits) / distances[labels]
    return ratio.scatter(1, labels[:, None], float("inf")).min(dim=1).values


class Head(LipschitzModule):
    """A last layer from features `(B, C)` to logits `(B, K)`; once materialised, the parameters are what is applied.

    `weight` and `bias (K,)` are those of its last affine map.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    @abstractmethod
    def distances(self) -> Tensor:
        """The constants of `z_i - z_j` for all pairs, shape `(K, K)`, differentiable; for losses, *not* rounded upwards."""

    def radius_estimator(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of features `(B, C)` and labels `(B,)` that estimates signed radii `(B,)` around the features."""
        distances = self.distances()

        def estimate(features: Tensor, labels: Tensor) -> Tensor:
            return signed_radii(self(features), labels, distances)

        return estimate


class LinearHead(Head):
    """A last layer `z = W y + c` with `weight (K, C)`; `distances()` are `||w_i - w_j||`."""


class SoftplusHead(Head):
    """A last layer with one hidden layer, `z = V softplus(U y + a) + c`, `softplus(t) = log(1 + exp(t))`.

    `inner (m, C)`, `inner_bias (m,)`, `weight (K, m)` and `bias` are U, a, V and c.
    """

    inner: nn.Parameter
    inner_bias: nn.Parameter

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits in the dtype of the weights, autocast or not: a margin is a small difference."""
        with torch.autocast(features.device.type, enabled=False):
            inner = functional.linear(features.to(self.weight.dtype), self.inner, self.inner_bias)
            soft = functional.softplus(inner, threshold=SOFTPLUS_THRESHOLD)
            return functional.linear(soft, self.weight, self.bias)

    @abstractmethod
    def hidden_rounding(self, state: RoundingState) -> RoundingState:
        """Return the state behind the softplus, from that of the features."""


class LipschitzNetwork(LipschitzModule):
    """Images `(B, c, H, W)` in [0, 1] through `body` to features, and through `head` to logits.

    Args:
        body: layers applied in order; their bounds multiply.
        head: the last layer; its constants enter the certificate pair by pair.
        input_shape: `(c, H, W)`.
    """

    def __init__(
        self, body: Sequence[LipschitzModule], head: Head, input_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.body = nn.ModuleList(body)
        self.head: Head = head
        self.input_shape = input_shape
        self.walk: Walk = in_turn

    def features(self, images: Tensor) -> Tensor:
        """Return what the head sees, shape `(B, C)`."""
        return self.walk(self.body, images)

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
        """The head's distances times the estimated K, shape `(K, K)`, differentiable; for losses alone."""
        return self.head.distances() * self.estimate_lipschitz()

    def radius_estimator(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of images `(B, c, H, W)` and labels `(B,)` that estimates signed radii `(B,)`.

        The radius of a sample is negative where its label is not predicted. For figures during training: what costs is
        done once, nothing is proved and no rounding counted.
        """
        frozen, constant = self.materialise(), self.estimate_lipschitz()
        around_features = frozen.head.radius_estimator()

        @torch.no_grad()
        def estimate(images: Tensor, labels: Tensor) -> Tensor:
            return around_features(frozen.features(images), labels) / constant

        return estimate

    def set_progress(self, progress: float) -> None:
        """Hear which share of the training is over, before every step. Most networks need not know."""

    def finalise(self, batches: Iterable[Tensor]) -> None:
        """Compute anew what the deployed network takes from the training images, such as running means. Most take nothing.

        Called before the network is looked at and kept.

        Args:
            batches: of training images `(B, c, H, W)`, one epoch, prepared only if asked for.
        """

    def rounding(self, state: RoundingState) -> RoundingState:
        """Follow the error of the body's evaluation layer by layer."""
        for _, layer in self.named_layers():
            state = layer.rounding(state)
        return state

    def materialise(self) -> Self:
        """Return a copy for inference, every layer materialised, in evaluation mode.

        Raises:
            UnsoundError: if a layer of the body is unknown, or the head is no `Head`.
        """
        if not isinstance(self.head, Head):
            raise UnsoundError(
                f"head is a {type(self.head).__name__}, whose distances nobody answers for; "
                "use a LinearHead such as lipnext.nn.head.UnitRowHead"
            )
        network = super().materialise()
        network.body = nn.ModuleList([layer.materialise() for _, layer in self.named_layers()])
        network.head = self.head.materialise()
        network.walk = in_turn
        return network.eval()
