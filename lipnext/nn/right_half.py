"""The right half of a split network: plain convolutions and dense layers, trained with noise on their input."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import UnsoundError
from lipnext.core.module import LipschitzModule
from lipnext.core.network import Head
from lipnext.core.rounding import RoundingState
from lipnext.nn.activation import ReLU
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.reshape import Flatten


class RightHalf(Head):
    """`(B, c, h, w)` to logits `(B, K)` by convolutions and dense layers with ReLU behind each.

    What is certified of it comes from votes under noise alone; no Lipschitz constant is asked for, and none is given.

    Args:
        shape: `(c, h, w)` of the latent.
        classes: K.
        convolutions: (channels, kernel, stride, padding) of each.
        hidden: widths of the dense layers.
        generator: source of randomness.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        convolutions: Sequence[tuple[int, int, int, int]] = (),
        hidden: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        layers: list[LipschitzModule] = []
        channels, *size = shape
        for out, kernel, stride, padding in convolutions:
            layer = Convolution(
                channels,
                out,
                kernel,
                (size[0], size[1]),
                stride=stride,
                padding=padding,
                generator=generator,
            )
            layers += [layer, ReLU()]
            channels, size = out, list(layer.output_size)
        layers.append(Flatten())
        features = channels * size[0] * size[1]
        for width in hidden:
            layers += [Dense(features, width, generator=generator), ReLU()]
            features = width
        self.layers = nn.ModuleList(layers)
        for part in self.layers:
            if isinstance(part, Convolution | Dense):  # ReLU halves the variance
                part.weight.data *= 2**0.5
        rows = torch.randn(classes, features, generator=generator, dtype=torch.float64) / features**0.5
        self.weight = nn.Parameter(rows.to(torch.get_default_dtype()))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, latent: Tensor) -> Tensor:
        """Return the logits."""
        for layer in self.layers:
            latent = layer(latent)
        return functional.linear(latent, self.weight, self.bias)

    def materialise(self) -> "RightHalf":
        """Return a copy without the states of power iterations, which nobody asks for here."""
        head = super().materialise()
        head.layers = nn.ModuleList([cast(LipschitzModule, layer).materialise() for layer in head.layers])
        return head

    def distances(self) -> Tensor:
        """There are none."""
        raise UnsoundError(_NO_CONSTANT)

    def lipschitz_bound(self) -> LipschitzBound:
        """There is none."""
        raise UnsoundError(_NO_CONSTANT)

    def rounding(self, state: RoundingState) -> RoundingState:
        """What is executed is the base classifier itself: nothing to bound."""
        raise UnsoundError(_NO_CONSTANT)


_NO_CONSTANT = (
    "the right half of a split network has no Lipschitz constant; certify it by votes under noise, and train it with a loss "
    "of its own system, such as loss.name=splitz"
)
