"""Lookahead for parameters that may be averaged as they are (Zhang et al., NeurIPS 2019); on the manifold see `orthogonal`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Lookahead:
    """Every few steps the slow weights move half way to the parameters, and the parameters return to them.

    `phi <- phi + 1/2 (theta - phi)`, then `theta <- phi`; the optimiser that moves `theta` keeps its state.

    Args:
        params: moved by any optimiser; the slow weights start where they are.
        every: steps from one merge to the next, at least 1.
    """

    def __init__(self, params: Iterable[nn.Parameter], every: int) -> None:
        self.params: list[Tensor] = list(params)
        self.every = every
        self.steps = 0
        self.slow: list[Tensor] = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self) -> None:
        """Count a step of the optimiser and merge where it is time to."""
        self.steps += 1
        if self.steps % self.every or not self.params:
            return
        torch._foreach_lerp_(self.slow, self.params, 0.5)
        torch._foreach_copy_(self.params, self.slow)

    def state_dict(self) -> dict[str, Any]:
        """Return what exact resuming needs."""
        return {"steps": self.steps, "slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a state that `state_dict` returned."""
        self.steps = int(state["steps"])
        for own, saved in zip(self.slow, state["slow"], strict=True):
            own.copy_(saved)
