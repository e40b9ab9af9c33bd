"""Exponential moving average of the weights whose orthogonal matrices are retracted, so that the average is a network again."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.manifold.polar import retract
from lipnext.optim.groups import split_parameters


class RetractedAverage:
    """Average of all parameters; `network()` returns it as a network with matrices back on the manifold.

    The entrywise average of orthogonal matrices lies inside their hull; its polar factor is the mean in the chordal metric.

    Args:
        net: the network that is trained.
        decay: weight of the past at each update, 0 < decay < 1; ramped up in the first steps as `(1 + n) / (10 + n)`.
        names: parameters to average, where other processes average the rest; None averages all.
    """

    def __init__(self, net: nn.Module, decay: float, names: Iterable[str] | None = None) -> None:
        self.decay = decay
        self.updates = 0
        parameters = dict(net.named_parameters())
        self.average: dict[str, Tensor] = {
            name: parameters[name].detach().clone() for name in (parameters if names is None else names)
        }

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move the average towards the network's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(net.named_parameters())
        if self.average:
            current = [parameters[name].detach() for name in self.average]
            torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    @torch.no_grad()
    def network(self, net: nn.Module) -> nn.Module:
        """Return a copy of `net` that holds the retracted average of what is averaged."""
        averaged = copy.deepcopy(net)
        orthogonal, _ = split_parameters(averaged)
        parameters = dict(averaged.named_parameters())
        for name, value in self.average.items():
            parameters[name].copy_(retract(value) if name in orthogonal else value)
        return averaged

    def state_dict(self) -> dict[str, Any]:
        """Return what exact resuming needs."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a state that `state_dict` returned."""
        self.updates = int(state["updates"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
