"""Every parameter has one owner among the processes, which alone keeps optimiser state for it and moves it.

After ZeRO (Rajbhandari et al., SC 2020), stage 2. Optimisers need not know: each process gives its own the parameters that it
owns. Gradients are summed into the owner while the backward pass is still under way, and moved parameters are sent from there.
With one process, which owns everything, nothing happens here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lipnext.core.world import World

SMALL = 2**15
"""Entries below which the parameters of an owner travel together: there a message costs more than its content."""


@dataclass(eq=False)
class _Parcel:
    """Parameters that travel as one tensor."""

    owner: int
    names: list[str]
    missing: int = 0
    """Gradients that the backward pass still owes."""


class Owners:
    """Who owns what, and the ways of gradients and parameters; a context manager that takes its hooks off at the end.

    Args:
        network: with the same parameters on every process; each process runs the same graph, so a parameter that gets no
            gradient on one gets none on any.
        world: the processes.
    """

    def __init__(self, network: nn.Module, world: World) -> None:
        self.world = world
        self.parameters: dict[str, nn.Parameter] = dict(network.named_parameters())
        self.owner = _assign({name: p.numel() for name, p in self.parameters.items()}, world.size)
        self._parcels = self._pack()
        self._next = len(self._parcels)  # nothing is expected
        self._sent: list[tuple[_Parcel, Tensor, Any]] = []
        parcels = {self.parameters[name]: parcel for parcel in self._parcels for name in parcel.names}

        def arrived(parameter: Tensor) -> None:
            parcels[parameter].missing -= 1  # type: ignore[index]
            # In one order on all processes, however autograd goes about it: a parcel waits for those before it.
            while self._next < len(self._parcels) and self._parcels[self._next].missing == 0:
                self._send(self._parcels[self._next])
                self._next += 1

        self._hooks = [
            p.register_post_accumulate_grad_hook(arrived) for p in self.parameters.values() if world.size > 1
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def mine(self, names: Iterable[str]) -> list[str]:
        """Those of the names that this process owns, in their order."""
        return [name for name in names if self.owner[name] == self.world.rank]

    def expect(self) -> None:
        """Send the gradients of the next backward pass as soon as they are there; call it before the last pass of a step."""
        for parcel in self._parcels:
            parcel.missing = len(parcel.names)
        self._next = 0

    def reduce(self) -> None:
        """Wait for the gradients: what this process owns has that of the whole batch then, and nothing else has any."""
        if self.world.size == 1:
            return
        for parcel in self._parcels[self._next :]:
            if any(self.parameters[name].grad is not None for name in parcel.names):
                self._send(parcel)
        self._next = len(self._parcels)
        for parcel, flat, work in self._sent:
            self.world.wait(work)
            owned = parcel.owner == self.world.rank
            for parameter, part in self._unpack(parcel, flat, self.parameters):
                parameter.grad = part if owned and parameter.grad is not None else None
        self._sent = []

    def clip(self, largest: float) -> None:
        """Scale the gradients so that the norm of all of them, wherever they are, is at most `largest`."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = self.world.length(nn.utils.get_total_norm(grads))
        nn.utils.clip_grads_with_norm_(self.parameters.values(), largest, norm)

    @torch.no_grad()
    def spread(self, network: nn.Module) -> None:
        """Send every parameter of a network, built as the one that was given, from its owner to all others."""
        if self.world.size == 1:
            return
        parameters = dict(network.named_parameters())
        sent = []
        for parcel in self._parcels:
            flat = _flat([parameters[name].detach() for name in parcel.names])
            sent.append((parcel, flat, self.world.broadcast(flat, parcel.owner)))
        for parcel, flat, work in sent:
            self.world.wait(work)
            for parameter, part in self._unpack(parcel, flat, parameters):
                if part.data_ptr() != parameter.data_ptr():
                    parameter.copy_(part)

    def gather(self, entries: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """Bring what the owners know about parameters to the first process, one parameter at a time.

        Args:
            entries: by name, of those that this process owns; some may be left out.
            names: of all processes together.

        Returns:
            On the first process the entries of all, in the order of `names`; on the others their own.
        """
        whole = {}
        for name in names:
            owner, entry = self.owner[name], entries.get(name)
            if owner != 0 and self.world.rank == owner:
                self.world.send(_on_cpu(entry), 0)
            elif owner != 0 and self.world.rank == 0:
                entry = self.world.receive(owner)
            if entry is not None:
                whole[name] = entry
        return whole

    def _pack(self) -> list[_Parcel]:
        """Large parameters alone, from the last to the first, as gradients come; then the small ones of each owner."""
        large, small = [], [_Parcel(rank, []) for rank in range(self.world.size)]
        for name in reversed(self.parameters):
            if self.parameters[name].numel() < SMALL:
                small[self.owner[name]].names.append(name)
            else:
                large.append(_Parcel(self.owner[name], [name]))
        return [*large, *(parcel for parcel in small if parcel.names)]

    def _send(self, parcel: _Parcel) -> None:
        parameters = [self.parameters[name] for name in parcel.names]
        flat = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        self._sent.append((parcel, flat, self.world.reduce(flat, parcel.owner)))

    def _unpack(
        self, parcel: _Parcel, flat: Tensor, into: Mapping[str, nn.Parameter]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        parameters = [into[name] for name in parcel.names]
        parts = flat.split([p.numel() for p in parameters])
        return [(p, part.view(p.shape)) for p, part in zip(parameters, parts, strict=True)]


def _assign(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Give the largest first, each to the process that has the least: equal matrices are dealt in turn."""
    loads, owner = [0] * count, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = loads.index(min(loads))
        owner[name] = rank
        loads[rank] += sizes[name]
    return owner


def _flat(tensors: list[Tensor]) -> Tensor:
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _on_cpu(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {key: _on_cpu(value) for key, value in entry.items()}
    return entry.cpu() if isinstance(entry, Tensor) else entry
