"""The convex potential layer of CPL (Meunier et al., ICML 2022): a gradient step as long as the potential is smooth.

`y = x - h W^T relu(W x + b)` with `h = 2 / (||W||^2 + 1e-4)`. While training, `||W||` is a power iteration, which approaches
it from below and makes the step too long; for inference it is proved from above.
"""

import torch
from torch import Tensor

from lipnext.core.rounding import mul_up
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.gradient_step import GradientStep
from lipnext.nn.power_iteration import estimate_convolution_norm, estimate_dense_norm

EPSILON = 1e-4
"""Added to the squared norm, as published."""

_WARM_UP = 4  # rounds of power iteration before the first step: from a random vector, h could be several times too large


class ConvexPotential(GradientStep):
    """`y = x - h W^T relu(W x + b)`.

    Args:
        inner: as `GradientStep`.
        generator: source of randomness.
    """

    def __init__(self, inner: Dense | Convolution, generator: torch.Generator | None = None) -> None:
        super().__init__(inner, generator)
        for _ in range(_WARM_UP):
            self._iterate()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the step; in training, go on with the power iteration first."""
        if self.training and self.scale is None:
            self._iterate()
        return super().forward(x)

    def form_scale(self) -> Tensor:
        """`2 / (sigma^2 + 1e-4)` with the norm that the power iteration has reached, for every row."""
        inner = self.inner
        if isinstance(inner, Convolution):
            norm, _ = estimate_convolution_norm(inner.weight, inner.image, 0, padding=inner.padding)
        else:
            norm, _ = estimate_dense_norm(inner.weight, inner.vector, 0)
        return (2 / (norm**2 + EPSILON)).expand(len(inner.weight))

    def prove_scale(self) -> Tensor:
        """`2 / (sigma^2 + 1e-4)` with a proved bound of the norm."""
        norm = self.inner.lipschitz_bound().value
        scale = 2 / (norm**2 + EPSILON)
        return torch.full(
            (len(self.inner.weight),), scale, dtype=torch.float64, device=self.inner.weight.device
        )

    def curvature_bound(self) -> float:
        """`max(S) ||W||^2`."""
        norm = self.inner.lipschitz_bound().value
        return mul_up(self._checked_scale().max().item(), mul_up(norm, norm))

    @torch.no_grad()
    def _iterate(self) -> None:
        self.inner.estimate_lipschitz()
