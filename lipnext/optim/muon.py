"""Muon on the orthogonal group: every step rotates all planes of the momentum by the same angle."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.manifold.exponential import taylor_exp
from lipnext.manifold.skew import skew_sign
from lipnext.optim.orthogonal import OrthogonalOptimizer

# Largest angle at which each Taylor order leaves ||P^T P - I||_2 below float32's roundoff (see `taylor_exp`).
ANGLES = ((0.029, 3), (0.127, 4))


class ManifoldMuon(OrthogonalOptimizer):
    """`X <- X exp(-t J)`, `J` the orthogonal factor of the momentum of `A = (X^T G - G^T X) / 2`.

    `J` is the steepest direction of the spectral norm on the skew matrices (Muon's choice, seen from the body frame); with
    `J^2 = -I` the step would be `X (cos t - sin t J)` in closed form. Newton-Schulz leaves singular values only near 1 and
    those of a rank-deficient momentum anywhere below, so the closed form loses orthogonality step by step;
    the exponential of the *exactly* skew `-t J` does not, whatever `J` is, and costs as many products.
    Its Taylor order follows from the angle, since the spectral norm is known to be about `t`.

    Args:
        params: orthogonal matrices.
        lr: step angle t in radians.
        momentum: decay of the momentum; Nesterov's variant is used, as in Muon.
        sign_steps: Newton-Schulz steps in `skew_sign`, three products each.
        sign_dtype: in which they run; None is the matrices' own.
        lookahead: period of Lookahead in steps; 0 is off.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        sign_steps: int = 5,
        sign_dtype: torch.dtype | None = None,
        lookahead: int = 0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "sign_steps": sign_steps, "lookahead": lookahead}
        )
        self.sign_dtype = sign_dtype

    def tangent_step(self, direction: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        """Update the momentum and return `-t J`."""
        parts = list(direction.unbind(0))
        if "momentum" not in states[0]:
            for state, part in zip(states, parts, strict=True):
                state["momentum"] = torch.zeros_like(part)
        momenta = [s["momentum"] for s in states]
        torch._foreach_lerp_(momenta, parts, 1 - group["momentum"])
        nesterov = torch.lerp(direction, torch.stack(momenta), group["momentum"])
        return skew_sign(nesterov, group["sign_steps"], self.sign_dtype).mul_(-group["lr"])

    def move(self, step: Tensor, group: dict[str, Any]) -> Tensor:
        """Exponential by a Taylor order chosen from the step angle (Lookahead's half sum of steps is longer)."""
        angle = 1.1 * group["lr"] * max(1.0, group["lookahead"] / 2)
        for largest, order in ANGLES:
            if angle <= largest:
                return taylor_exp(step, order)
        return torch.linalg.matrix_exp(step)
