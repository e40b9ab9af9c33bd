"""Activations that preserve gradient norms."""

import torch
from torch import Tensor

from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState


class BetaAbs(LipschitzModule):
    """`|x_i|` on the first `folded` channels, identity on the others (LipNeXt's beta-Abs; beta is `folded / C`).

    With beta = 1/2 it contains MinMax: rotate each pair by 45 degrees, fold one coordinate, rotate back.
    """

    def __init__(self, folded: int) -> None:
        super().__init__()
        self.folded = folded

    def forward(self, tokens: Tensor) -> Tensor:
        """Fold the first channels of `(..., C)`."""
        return torch.cat([tokens[..., : self.folded].abs(), tokens[..., self.folded :]], dim=-1)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1: absolute values never move two points apart."""
        return LipschitzBound(value=1.0, norm=2.0, proof="one-lipschitz")

    def rounding(self, state: RoundingState) -> RoundingState:
        """Exact in floating point; `| |a| - |b| | <= |a - b|` for the error that is already there."""
        return state
