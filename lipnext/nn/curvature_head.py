"""The last layer of CRC-Lip: one hidden layer with a bounded curvature (Singla & Feizi, NeurIPS 2022)."""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.bounds.spectral import absolute_norm_bound, spectral_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.network import SoftplusHead
from lipnext.core.propagation import after_affine, norm_up
from lipnext.core.rounding import RoundingState, add_up, mul_up, sqrt_up
from lipnext.nn.power_iteration import estimate_dense_norm

STEPS = 2
"""Power iterations for the curvature of each pair of classes, from the first singular vector of the inner weight."""


class CurvatureHead(SoftplusHead):
    """Logits `z = V softplus(U y + a) + c`; features `(B, C)` to logits `(B, K)`. No weight is constrained.

    With `w = v_i - v_j`, the Hessian of `z_i - z_j` is `U^T diag(w s') U`, `0 < s' <= 1/4`, hence not below
    `-m_ij = -||U^T diag(max(-w, 0)) U|| / 4` (equation 6 of the paper). The certificate is `lipnext.certificates.curvature`.

    Args:
        channels: features C.
        classes: K, at least 2.
        hidden: m.
        generator: source of randomness; weights start uniform within `1 / sqrt(C)` and `1 / sqrt(m)`.
    """

    vector: Tensor | None

    def __init__(
        self, channels: int, classes: int, hidden: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()

        def uniform(*shape: int, inputs: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(inputs))

        self.inner = uniform(hidden, channels, inputs=channels)
        self.inner_bias = uniform(hidden, inputs=channels)
        self.weight = uniform(classes, hidden, inputs=hidden)
        self.bias = uniform(classes, inputs=hidden)
        start = torch.randn(channels, generator=generator)
        _, vector = estimate_dense_norm(self.inner.detach(), start, 50)
        self.register_buffer("vector", vector)

    def distances(self) -> Tensor:
        """Estimate `||U|| ||v_i - v_j||`, which the slope of `z_i - z_j` never exceeds, shape `(K, K)`; for losses alone."""
        norm, _ = self._singular()
        square = (self.weight[:, None] - self.weight).square().sum(-1)
        return norm * torch.sqrt(square.clamp_min(1e-12))

    def curvatures(self) -> Tensor:
        """Estimate `m_ij`, shape `(K, K)`, differentiable in the weights; for losses alone, power iteration is from below."""
        with torch.autocast(self.weight.device.type, enabled=False):
            falling = functional.relu(self.weight - self.weight[:, None]).flatten(0, 1)  # (K^2, m), of -w
            with torch.no_grad():
                vectors = self._singular()[1].expand(len(falling), -1)
                for _ in range(STEPS):
                    vectors = functional.normalize((vectors @ self.inner.mT * falling) @ self.inner)
            norms = ((vectors @ self.inner.mT).square() * falling).sum(1)
            return norms.view(len(self.weight), -1) / 4

    def _singular(self) -> tuple[Tensor, Tensor]:
        """Estimate `||U||` and its right singular vector, kept warm while training; a materialised head starts afresh."""
        if self.vector is None:
            return estimate_dense_norm(self.inner, torch.ones_like(self.inner[0]), 50)
        norm, vector = estimate_dense_norm(self.inner, self.vector, 1)
        if self.training:
            self.vector = vector
        return norm, vector

    def radius_estimator(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of features `(B, C)` and labels `(B,)` that estimates signed radii by the closed form.

        The curvatures of one rival for all labels come from power iteration; for wrong samples the radius is the negative
        of that of the boundary to the label.
        """
        curvatures = self.curvatures().detach()

        def estimate(features: Tensor, labels: Tensor) -> Tensor:
            features = features.to(self.weight.dtype)
            slopes = torch.sigmoid(functional.linear(features, self.inner, self.inner_bias))
            logits = self(features)
            gradients = (slopes[:, None] * self.weight) @ self.inner  # (B, K, C)
            rows = torch.arange(len(labels), device=labels.device)
            length = torch.linalg.vector_norm(gradients[rows, labels][:, None] - gradients, dim=2)
            margin = logits.gather(1, labels[:, None]) - logits
            curvature = torch.where(margin > 0, curvatures[labels], curvatures.mT[labels])
            root = torch.sqrt(length.square() + 2 * curvature * margin.abs())
            ratio = 2 * margin / (length + root).clamp_min(1e-12)
            return ratio.scatter(1, labels[:, None], float("inf")).min(dim=1).values

        return estimate

    def lipschitz_bound(self) -> LipschitzBound:
        """Bound the whole head by `||V|| ||U||`: softplus is 1-Lipschitz."""
        return LipschitzBound.compose(spectral_bound(self.inner), spectral_bound(self.weight))

    def hidden_rounding(self, state: RoundingState) -> RoundingState:
        """An affine map; softplus of a number t is off by at most `16 u (1 + |t|)`, see `lipnext.certificates.curvature`."""
        inner = after_affine(
            state,
            self.inner.shape[1],
            spectral_bound(self.inner).value,
            absolute_norm_bound(self.inner),
            norm_up(self.inner_bias),
        )
        ones = sqrt_up(float(len(self.inner)))
        size = add_up(ones, add_up(inner.norm, inner.error))
        return RoundingState(
            norm=add_up(inner.norm, ones),  # softplus(t) <= |t| + log 2
            error=add_up(inner.error, mul_up(16 * state.unit, size)),
            unit=state.unit,
        )

    def rounding(self, state: RoundingState) -> RoundingState:
        """The hidden layer and an affine map."""
        return after_affine(
            self.hidden_rounding(state),
            self.weight.shape[1],
            spectral_bound(self.weight).value,
            absolute_norm_bound(self.weight),
            norm_up(self.bias),
        )

    def materialise(self) -> Self:
        """Return a copy without the vector of the power iteration."""
        head = super().materialise()
        head.register_buffer("vector", None)
        return head
