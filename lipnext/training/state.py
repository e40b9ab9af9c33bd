"""What a checkpoint holds: the whole of it, whatever the number of processes that trained and that go on."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from lipnext.optim.average import RetractedAverage
from lipnext.optim.lookahead import Lookahead
from lipnext.optim.owner import Owners

Parts = Mapping[str, tuple[Any, Iterable[str]]]
"""Of a training, by name: the part (None where there is none) and the parameters that it keeps state for."""


def own_state(parts: Parts, owners: Owners) -> dict[str, Any]:
    """Return what this process owns of the states of all parts; those of all processes merge into that of one.

    What belongs to a parameter stands under its name. Of the network that is the parameter; what belongs to none comes from the
    first process.
    """
    return {name: _mine(part, list(names), owners) for name, (part, names) in _present(parts)}


def gather_state(parts: Parts, owners: Owners) -> dict[str, Any]:
    """Return the states of all parts as one process that owns everything would have them; complete on the first alone."""
    return {name: _whole(part, list(names), owners) for name, (part, names) in _present(parts)}


def restore_state(
    state: Mapping[str, Any], parts: Parts, owners: Owners, fetch: Callable[[Any], Any] = lambda own: own
) -> None:
    """Give every part what this process owns of the state. The network's other parameters are then to be sent by their owners.

    Args:
        state: of all processes, as `gather_state` returns it.
        parts: which take it.
        owners: of their parameters.
        fetch: given what this process owns, returns it with tensors in the place of what stands for them.
    """
    own = fetch(
        {name: _own(part, state[name], list(names), owners) for name, (part, names) in _present(parts)}
    )
    for name, (part, _) in _present(parts):
        part.load_state_dict(own[name])
        if isinstance(part, torch.optim.Optimizer):
            _keep_dtypes(part, own[name]["state"])


def _present(parts: Parts) -> list[tuple[str, tuple[Any, Iterable[str]]]]:
    return [(name, entry) for name, entry in parts.items() if entry[0] is not None]


def _mine(part: Any, names: list[str], owners: Owners) -> dict[str, Any]:
    state: dict[str, Any] = part.state_dict()
    mine = owners.mine(names)
    if isinstance(part, torch.optim.Optimizer):
        (group,) = state["param_groups"]
        return {
            "state": {mine[i]: values for i, values in state["state"].items()},
            "param_groups": [group | {"params": names}],
        }
    if isinstance(part, Lookahead):
        return state | {"slow": dict(zip(mine, state["slow"], strict=True))}
    return state


def _whole(part: Any, names: list[str], owners: Owners) -> dict[str, Any]:
    state = _mine(part, names, owners)
    if isinstance(part, Owners):
        return state | {"held": owners.gather_held()}
    table = _table(part)
    return state | {table: owners.gather(state[table], names)}


def _own(part: Any, state: Mapping[str, Any], names: list[str], owners: Owners) -> Any:
    """What this process needs of the whole, in the form that the part takes."""
    if isinstance(part, Owners):
        return {**state, "held": {name: state["held"][name] for name in owners.held}}
    mine = owners.mine(names)
    if isinstance(part, torch.optim.Optimizer):
        (group,) = state["param_groups"]
        saved = state["state"]
        return {
            "state": {i: saved[name] for i, name in enumerate(mine) if name in saved},
            "param_groups": [group | {"params": list(range(len(mine)))}],
        }
    if isinstance(part, Lookahead):
        return {**state, "slow": [state["slow"][name] for name in mine]}
    return {**state, "average": {name: state["average"][name] for name in mine}}


def _table(part: Any) -> str:
    """Where a state holds what belongs to parameters, by name."""
    if isinstance(part, RetractedAverage):
        return "average"
    return "slow" if isinstance(part, Lookahead) else "state"


def _keep_dtypes(optimizer: torch.optim.Optimizer, saved: dict[int, dict[str, Any]]) -> None:
    """Undo torch's cast of all state to the parameter's dtype: NAdam's `mu_product` has one of its own."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in saved.items():
        state = optimizer.state[params[index]]
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.dtype != state[key].dtype:
                state[key] = value.to(state[key].device)
