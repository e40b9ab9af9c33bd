"""Orthogonal channel mixing: one square matrix applied to the channels of every position."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lipnext.bounds.spectral import absolute_norm_bound, near_orthogonal_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_product
from lipnext.core.rounding import RoundingState
from lipnext.manifold.haar import haar


class OrthogonalMixing(LipschitzModule):
    """`x -> W x` on the channels of tokens `(B, H, W, C)`; `weight` is a `C x C` matrix kept orthogonal by the optimiser.

    Args:
        channels: width `C`.
        identity: start at the identity instead of a Haar sample.
        generator: source of randomness.
    """

    orthogonal: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self, channels: int, *, identity: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        start = torch.eye(channels) if identity else haar(channels, generator=generator)
        self.weight = nn.Parameter(start.to(torch.get_default_dtype()))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `tokens @ weight^T`."""
        return tokens @ self.weight.mT

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove `||W||_2` from the stored weight's residual."""
        return near_orthogonal_bound(self.weight)

    def rounding(self, state: RoundingState) -> RoundingState:
        """A product with `C` terms in each sum."""
        return after_product(
            state, self.weight.shape[1], self.lipschitz_bound().value, absolute_norm_bound(self.weight)
        )
