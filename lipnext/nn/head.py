"""The last layer: rows as they are or of unit length, and the exact pairwise distances that turn a margin into a radius."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.bounds.spectral import absolute_norm_bound, spectral_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.network import LinearHead
from lipnext.core.propagation import after_affine, norm_up
from lipnext.core.rounding import RoundingState


class _RowHead(LinearHead):
    """What heads share, once their rows are known."""

    def rows(self) -> Tensor:
        """The rows as they are used, shape `(K, C)`."""
        return self.weight

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits in the dtype of the weights, autocast or not: a margin is a small difference."""
        with torch.autocast(features.device.type, enabled=False):
            return functional.linear(features.to(self.weight.dtype), self.rows(), self.bias)

    def distances(self) -> Tensor:
        """`||w_i - w_j||` for all pairs, shape `(K, K)`, differentiable; for losses, *not* rounded upwards."""
        rows = self.rows()
        with torch.autocast(rows.device.type, enabled=False):
            # not from the K x K x C differences: those are 8 GB for ImageNet at width 2048
            gram = rows @ rows.mT
        norms = torch.diagonal(gram)
        square = norms.unsqueeze(1) + norms.unsqueeze(0) - 2 * gram
        return torch.sqrt(square.clamp_min(1e-12))

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove the l2 norm of the matrix of rows."""
        return spectral_bound(self.materialise().weight)

    def rounding(self, state: RoundingState) -> RoundingState:
        """A product with C terms and the bias, as for any dense layer."""
        head = self.materialise()
        bound, absolute = spectral_bound(head.weight).value, absolute_norm_bound(head.weight)
        return after_affine(state, head.weight.shape[1], bound, absolute, norm_up(head.bias))


class PlainHead(_RowHead):
    """Logits `z_k = <w_k, y> + c_k`; features `(B, C)` to logits `(B, K)`. The certificate uses the distances of its rows.

    Args:
        channels: features C.
        classes: K, at least 2.
        generator: source of randomness; the entries of the weight start with variance 1 / C.
    """

    def __init__(self, channels: int, classes: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        rows = torch.randn(classes, channels, generator=generator, dtype=torch.float64) / channels**0.5
        self.weight = nn.Parameter(rows.to(torch.get_default_dtype()))
        self.bias = nn.Parameter(torch.zeros(classes))


class UnitRowHead(_RowHead):
    """Logits `z_k = <w_k / ||w_k||, y> + c_k` (last-layer normalisation, LLN); features `(B, C)` to logits `(B, K)`.

    The head as a whole is not 1-Lipschitz; the certificate uses the pairwise distances of its rows.

    Args:
        channels: features C.
        classes: K, at least 2.
        generator: source of randomness.
    """

    def __init__(self, channels: int, classes: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.normalised = False
        rows = torch.randn(classes, channels, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(functional.normalize(rows).to(torch.get_default_dtype()))
        self.bias = nn.Parameter(torch.zeros(classes))

    def rows(self) -> Tensor:
        """The rows as they are used, shape `(K, C)`: stored as they are once materialised, normalised before that."""
        return self.weight if self.normalised else functional.normalize(self.weight, dim=1)

    def materialise(self) -> Self:
        """Return a copy that stores the normalised rows."""
        head = super().materialise()
        with torch.no_grad():
            head.weight = nn.Parameter(self.rows().detach().clone())
        head.normalised = True
        return head


class FirstCoordinatesHead(PlainHead):
    """The first K features are the logits; nothing is learned, and all rows are `sqrt(2)` apart.

    Args:
        channels: features C, at least K.
        classes: K, at least 2.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(channels, classes)
        self.weight = nn.Parameter(torch.eye(classes, channels), requires_grad=False)
        self.bias.requires_grad_(False)
