"""Adam on the orthogonal group, as in LipNeXt: both moments live on the skew direction."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.optim.orthogonal import OrthogonalOptimizer


class OrthogonalAdam(OrthogonalOptimizer):
    """`X <- X FastExp(-lr m / (sqrt(v) + eps))` with Adam's moments of `A = (X^T G - G^T X) / 2`.

    The first moment of skew matrices is skew and the elementwise second moment is symmetric, so the quotient is skew. Five
    `n x n` products a matrix at most: one for `A`, up to two in FastExp (small steps), one to move, and Lookahead's share.

    Args:
        params: orthogonal matrices.
        lr: step size; an entry of the tangent step is at most about `lr`, its Frobenius norm about `lr n`.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        lookahead: period of Lookahead in steps; 0 is off.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lookahead: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "lookahead": lookahead})

    def tangent_step(self, direction: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        """Update the moments and return `-lr u`."""
        beta1, beta2 = group["betas"]
        parts = list(direction.unbind(0))
        if "first" not in states[0]:
            for state, part in zip(states, parts, strict=True):
                state["first"], state["second"] = torch.zeros_like(part), torch.zeros_like(part)
        first, second = [s["first"] for s in states], [s["second"] for s in states]
        torch._foreach_lerp_(first, parts, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, parts, parts, 1 - beta2)
        count = states[0]["step"]
        mean = torch.stack(first) / (1 - beta1**count)
        scale = (torch.stack(second) / (1 - beta2**count)).sqrt_().add_(group["eps"])
        return mean.div_(scale).mul_(-group["lr"])
