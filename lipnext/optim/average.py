"""Exponential moving average of the weights whose orthogonal matrices are retracted, so that the average is a network again."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.manifold.polar import retract
from lipnext.optim.groups import split_parameters


class RetractedAverage:
    """Average of parameters; `network()` returns it as a network with matrices back on the manifold.

    The entrywise average of orthogonal matrices lies inside their hull; its polar factor is the mean in the chordal metric.

    Args:
        parameters: to average, by name; where other processes average the rest, those of this one.
        decay: weight of the past at each update, 0 < decay < 1; ramped up in the first steps as `(1 + n) / (10 + n)`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.parameters = dict(parameters)
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self.average:
            current = [p.detach() for p in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    @torch.no_grad()
    def network(self, net: nn.Module) -> nn.Module:
        """Return a copy of a network that holds the retracted average of what is averaged."""
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
