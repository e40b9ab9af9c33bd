"""What a checkpoint holds: the whole of it, whatever the number of processes that trained and that go on."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lipnext.optim.average import RetractedAverage
from lipnext.optim.lookahead import Lookahead
from lipnext.optim.owner import Owners

Parts = Mapping[str, tuple[Any, Iterable[str]]]
"""Of a training, by name: the part (None where there is none) and the parameters that it keeps state for."""


def gather_state(parts: Parts, owners: Owners) -> dict[str, Any]:
    """Return the states of all parts as one process that owns everything would have them; complete on the first alone."""
    return {
        name: _whole(part, list(names), owners) for name, (part, names) in parts.items() if part is not None
    }


def restore_state(state: Mapping[str, Any], parts: Parts, owners: Owners) -> None:
    """Give every part what this process owns of the state."""
    for name, (part, names) in parts.items():
        if part is not None:
            own = _own(part, state[name], list(names), owners)
            part.load_state_dict(own)
            if isinstance(part, torch.optim.Optimizer):
                _keep_dtypes(part, own["state"])


def _whole(part: Any, names: list[str], owners: Owners) -> dict[str, Any]:
    state: dict[str, Any] = part.state_dict()
    mine = owners.mine(names)
    if isinstance(part, torch.optim.Optimizer):
        found = owners.gather({mine[i]: values for i, values in state["state"].items()}, names)
        (group,) = state["param_groups"]
        return {
            "state": {i: found[name] for i, name in enumerate(names) if name in found},
            "param_groups": [group | {"params": list(range(len(names)))}],
        }
    if isinstance(part, Lookahead):
        found = owners.gather(dict(zip(mine, state["slow"], strict=True)), names)
        return state | {"slow": list(found.values())}
    if isinstance(part, RetractedAverage):
        return state | {"average": owners.gather(state["average"], names)}
    return state  # the network, which every process has


def _own(part: Any, state: Mapping[str, Any], names: list[str], owners: Owners) -> Any:
    """The inverse of `_whole`, for one process."""
    mine = owners.mine(names)
    number = {name: i for i, name in enumerate(names)}
    if isinstance(part, torch.optim.Optimizer):
        (group,) = state["param_groups"]
        saved = state["state"]
        return {
            "state": {i: saved[number[name]] for i, name in enumerate(mine) if number[name] in saved},
            "param_groups": [group | {"params": list(range(len(mine)))}],
        }
    if isinstance(part, Lookahead):
        return {**state, "slow": [state["slow"][number[name]] for name in mine]}
    if isinstance(part, RetractedAverage):
        return {**state, "average": {name: state["average"][name] for name in mine}}
    return state


def _keep_dtypes(optimizer: torch.optim.Optimizer, saved: dict[int, dict[str, Any]]) -> None:
    """Undo torch's cast of all state to the parameter's dtype: NAdam's `mu_product` has one of its own."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in saved.items():
        state = optimizer.state[params[index]]
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.dtype != state[key].dtype:
                state[key] = value.to(state[key].device)
