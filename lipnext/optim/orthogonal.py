"""What the optimisers on the orthogonal group share: one batched call for all matrices of a shape, and Lookahead.

A step is `X <- X exp(T)` with a skew tangent step `T`. Subclasses turn the Riemannian gradient into `T`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipnext.manifold.exponential import fast_exp
from lipnext.manifold.polar import retract
from lipnext.manifold.skew import tangent

# Entries in one batched call. On a GPU a stack saves launches and costs memory; on a CPU it should stay in the cache.
MAX_STACK = {"cpu": 2**21}
MAX_STACK_ELSEWHERE = 2**28


class OrthogonalOptimizer(Optimizer, ABC):
    """Base: gradients to skew directions, directions to steps, steps along geodesics; all 2L equal matrices at once.

    Args:
        params: square matrices `(n, n)` or stacks of them, orthogonal on entry.
        defaults: options of the subclass, with `lr` and `lookahead` (every how many steps the slow weights
            move half way along the sum of the steps since, and the fast ones return to them; 0 is off).
    """

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], defaults: dict[str, Any]
    ) -> None:
        super().__init__(params, defaults)

    @abstractmethod
    def tangent_step(self, direction: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        """Return the skew tangent steps for a stack of Riemannian gradients.

        `states` are the matrices' own; all hold the same `step`, 1 at the first call.
        """

    def move(self, step: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the orthogonal factors `exp(step)` by which the points are multiplied from the right."""
        return fast_exp(step)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every matrix that has a gradient; one batched call for each shape, dtype and device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            # A matrix that had no gradient at first is some steps behind: it is not stacked with the others.
            for params in _alike(moving, [self.state[p].get("step", 0) for p in moving]):
                self._step_stack(params, group)
        return loss

    def _step_stack(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] = state.get("step", 0) + 1
        points = torch.stack(params)
        gradients = torch.stack([p.grad for p in params if p.grad is not None])
        step = self.tangent_step(tangent(points, gradients), states, group)
        looks_ahead = group["lookahead"] > 0
        moved = (
            self._look_ahead(points, step, states, group) if looks_ahead else points @ self.move(step, group)
        )
        torch._foreach_copy_(params, list(moved.unbind(0)))

    def _look_ahead(
        self, points: Tensor, step: Tensor, states: list[dict[str, Any]], group: dict[str, Any]
    ) -> Tensor:
        """Lookahead on the manifold: `X_slow <- X_slow exp(1/2 sum of the last K steps)`, then `X <- X_slow`."""
        if "slow" not in states[0]:
            for state, point in zip(states, points, strict=True):
                state["slow"], state["travel"], state["since"] = point.clone(), torch.zeros_like(point), 0
        for state, part in zip(states, step, strict=True):
            state["travel"] += part
            state["since"] += 1
        if states[0]["since"] < group["lookahead"]:
            return points @ self.move(step, group)
        travel = torch.stack([state["travel"] for state in states])
        slow = torch.stack([state["slow"] for state in states]) @ self.move(travel / 2, group)
        for state, point in zip(states, slow, strict=True):
            state["slow"], state["since"] = point.clone(), 0
            state["travel"].zero_()
        return slow

    @torch.no_grad()
    def retract(self) -> None:
        """Bring all matrices (and Lookahead's slow copies) back onto the manifold; the paper does so every epoch."""
        for group in self.param_groups:
            for params in _alike(group["params"], [0] * len(group["params"])):
                torch._foreach_copy_(params, list(retract(torch.stack(params)).unbind(0)))
                slow = [self.state[p]["slow"] for p in params if "slow" in self.state.get(p, {})]
                if slow:
                    torch._foreach_copy_(slow, list(retract(torch.stack(slow)).unbind(0)))


def _alike(params: list[Tensor], ages: list[int]) -> list[list[Tensor]]:
    """Group by shape, dtype, device and number of steps taken, with a limit on the entries in a group."""
    groups: dict[tuple[Any, ...], list[list[Tensor]]] = {}
    for p, age in zip(params, ages, strict=True):
        lists = groups.setdefault((p.shape, p.dtype, p.device, age), [[]])
        if lists[-1] and (len(lists[-1]) + 1) * p.numel() > MAX_STACK.get(p.device.type, MAX_STACK_ELSEWHERE):
            lists.append([])
        lists[-1].append(p)
    return [params for lists in groups.values() for params in lists]
