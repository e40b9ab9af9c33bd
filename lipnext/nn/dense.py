"""An unconstrained dense layer: its constant is estimated for the loss and proved for the certificate."""

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.bounds.factor import factor_bound
from lipnext.bounds.spectral import absolute_norm_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.local import AffineModule
from lipnext.core.propagation import after_affine, norm_up
from lipnext.core.rounding import RoundingState
from lipnext.nn.power_iteration import estimate_dense_norm

STEPS = 5
"""Power iterations a training step, from where the last step left off."""


class Dense(AffineModule):
    """`x -> W x + b` on features `(B, n)`; `weight (m, n)`, `bias (m,)` or None.

    Args:
        features_in: n.
        features_out: m.
        bias: whether there is one.
        generator: source of randomness; the entries of the weight start with variance 1 / n.
    """

    vector: Tensor

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        start = torch.randn(features_out, features_in, generator=generator) / math.sqrt(features_in)
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(features_out)) if bias else None
        vector = torch.randn(features_in, generator=generator)
        self.register_buffer("vector", vector / torch.linalg.vector_norm(vector))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        check_flat(x)
        return functional.linear(x, self.weight, self.bias)

    @property
    def direction(self) -> Tensor:
        """Where the power iteration stands, `(1, n)`."""
        return self.vector[None]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return `W x` for rows x."""
        return functional.linear(x, weight)

    def adjoint(self, y: Tensor, weight: Tensor) -> Tensor:
        """Return `W^T y` for rows y."""
        return y @ weight

    def estimate_lipschitz(self) -> Tensor:
        """Power iteration on the weight, kept warm from step to step."""
        norm, vector = estimate_dense_norm(self.weight, self.vector, STEPS)
        self.vector = vector
        return norm

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove `||W||_2` by an approximate factorisation, or Gram iteration."""
        return factor_bound(self.weight)

    def rounding(self, state: RoundingState) -> RoundingState:
        """A product with n terms in each sum, and the bias."""
        bound, absolute = self.lipschitz_bound().value, absolute_norm_bound(self.weight)
        shift = 0.0 if self.bias is None else norm_up(self.bias)
        return after_affine(state, self.weight.shape[1], bound, absolute, shift)

    def materialise(self) -> Self:
        """Return a copy whose vector of the power iteration is not saved with it."""
        layer = super().materialise()
        layer.register_buffer("vector", layer.vector, persistent=False)
        return layer


def check_flat(x: Tensor) -> None:
    """Refuse anything but features `(B, n)`: the rounding of a dense layer's bias is counted once, not once a position."""
    if x.dim() != 2:
        raise ValueError(f"`x` must have the shape (B, n), got {tuple(x.shape)}; flatten it first.")
