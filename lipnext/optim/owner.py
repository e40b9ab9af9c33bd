"""Every parameter has one owner among the processes, which alone keeps optimiser state for it and moves it.

After ZeRO (Rajbhandari et al., SC 2020), stage 2. Optimisers need not know: each process gives its own the parameters that it
owns. Gradients are summed into the owner while the backward pass is still under way, and moved parameters are sent from there.
Sharded (stage 3, see `sharding`), the network keeps rows of its large matrices and their gradients; the owner has the whole
matrix, gathers the rows of its gradient, and sends each process its rows of the moved matrix.
With one process, which owns everything, nothing happens here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lipnext.core.network import LipschitzNetwork
from lipnext.core.world import World
from lipnext.optim.sharding import (
    cut,
    find_shardable,
    pack_rows,
    put_together,
    room_for_rows,
    shard_parameters,
    unpack_rows,
    with_room,
)

SMALL = 2**15
"""Entries below which the parameters of an owner travel together, never sharded: a message would cost more than its content."""


@dataclass(eq=False)
class _Parcel:
    """Parameters that travel as one tensor."""

    owner: int
    names: list[str]
    sharded: bool = False
    missing: int = 0
    """Gradients that the backward pass still owes."""


@dataclass(eq=False)
class _Sent:
    """A parcel of gradients under way."""

    parcel: _Parcel
    work: Any
    parts: list[Tensor]
    """What arrives: the sum, or the rows of every process."""


class Owners:
    """Who owns what, and the ways of gradients and parameters; a context manager that takes its hooks off at the end.

    Args:
        network: with the same parameters on every process; each process runs the same graph, so a parameter that gets no
            gradient on one gets none on any. It is changed in place where it is sharded.
        world: the processes.
        shard: whether large parameters of several processes are sharded.

    Raises:
        ConfigError: if the network or this torch cannot be sharded.
    """

    held: dict[str, nn.Parameter]
    """Those that this process owns, whole: what optimisers move, in the order of the network."""

    def __init__(self, network: nn.Module, world: World, *, shard: bool = False) -> None:
        self.world = world
        whole = dict(network.named_parameters())
        self.owner = _assign({name: p.numel() for name, p in whole.items()}, world.size)
        self._network = network
        self._template: nn.Module | None = None
        self._sharded: dict[str, torch.Size] = {}
        if shard and world.size > 1:
            assert isinstance(network, LipschitzNetwork)
            self._sharded = {name: whole[name].shape for name in find_shardable(network, SMALL)}
            self._template = with_room(network, "meta")
        self.held = {
            name: nn.Parameter(whole[name].detach().clone()) if name in self._sharded else whole[name]
            for name in self.mine(whole)
        }
        if self._sharded:
            shard_parameters(network, self._sharded, world)
        self.parameters: dict[str, nn.Parameter] = dict(network.named_parameters())
        self._parcels = self._pack()
        self._next = len(self._parcels)  # nothing is expected
        self._sent: list[_Sent] = []
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
        for sent in self._sent:
            self.world.wait(sent.work)
            names = sent.parcel.names
            used = [self.parameters[name].grad is not None for name in names]
            for name in names:
                self.parameters[name].grad = None
            if sent.parcel.owner == self.world.rank:
                for name, grad, had in zip(names, self._received(sent), used, strict=True):
                    self.held[name].grad = grad if had else None
        self._sent = []

    def clip(self, largest: float) -> None:
        """Scale the gradients so that the norm of all of them, wherever they are, is at most `largest`."""
        grads = [p.grad for p in self.held.values() if p.grad is not None]
        norm = self.world.length(nn.utils.get_total_norm(grads))
        nn.utils.clip_grads_with_norm_(self.held.values(), largest, norm)

    @torch.no_grad()
    def spread(self, network: nn.Module) -> None:
        """Send every parameter of a network, built as the one that was given, from its owner to all others.

        The sharded network itself gets its rows of what the owners hold.
        """
        if self.world.size == 1:
            return
        parameters = dict(network.named_parameters())
        sent = []
        for parcel in self._parcels:
            if parcel.sharded and network is self._network:
                flat, work = self._scatter(parcel)
            else:
                flat = _flat([parameters[name].detach() for name in parcel.names])
                work = self.world.broadcast(flat, parcel.owner)
            sent.append((parcel, flat, work))
        for parcel, flat, work in sent:
            self.world.wait(work)
            targets = [parameters[name].detach() for name in parcel.names]
            if parcel.sharded and network is self._network:
                unpack_rows(
                    flat, [_local(target) for target in targets], self._shapes(parcel), self.world.size
                )
                continue
            for target, part in zip(targets, _unflat(flat, targets), strict=True):
                if part.data_ptr() != target.data_ptr():
                    target.copy_(part)

    @torch.no_grad()
    def whole_network(self) -> nn.Module:
        """The network with all of every parameter, on every process: itself, or a copy where it is sharded."""
        if self._template is None:
            return self._network
        whole = with_room(self._template, next(self._network.parameters()).device)
        for name, parameter in whole.named_parameters():
            parameter.copy_(self.held.get(name, parameter))
        for name, buffer in self._network.named_buffers():
            whole.get_buffer(name).copy_(buffer)
        self.spread(whole)
        return whole

    def own(self) -> dict[str, Tensor]:
        """What this process answers for: the parameters that it holds, and the buffers, which all have."""
        return {**self.held, **self.buffers()}

    def buffers(self) -> dict[str, Tensor]:
        """What the network's state holds beside its parameters."""
        return {name: t for name, t in self._network.state_dict().items() if name not in self.owner}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the network as far as this process owns it; the first process alone answers for the buffers."""
        return {"held": dict(self.held), "buffers": self.buffers() if self.world.is_first else {}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take what this process holds, and all buffers; `spread` brings the rest."""
        for own, saved in ((self.held, state["held"]), (self.buffers(), state["buffers"])):
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def gather_held(self) -> dict[str, Tensor]:
        """All parameters, whole, on the first process."""
        return self.gather(self.held, self.parameters) if self._sharded else dict(self.parameters)

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
                large.append(_Parcel(self.owner[name], [name], name in self._sharded))
        return [*large, *(parcel for parcel in small if parcel.names)]

    def _send(self, parcel: _Parcel) -> None:
        parameters = [self.parameters[name] for name in parcel.names]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if parcel.sharded:
            rows = pack_rows([_local(grad) for grad in grads], self._shapes(parcel), self.world.size)
            work, parts = self.world.gather(rows, parcel.owner)
        else:
            parts = [_flat(grads)]
            work = self.world.reduce(parts[0], parcel.owner)
        self._sent.append(_Sent(parcel, work, parts))

    def _received(self, sent: _Sent) -> list[Tensor]:
        if sent.parcel.sharded:
            return put_together(sent.parts, self._shapes(sent.parcel))
        return _unflat(sent.parts[0], [self.parameters[name] for name in sent.parcel.names])

    def _scatter(self, parcel: _Parcel) -> tuple[Tensor, Any]:
        """Begin to send each process its rows of what the owner holds."""
        size, owned = self.world.size, parcel.owner == self.world.rank
        parts = cut([self.held[name].detach() for name in parcel.names], size) if owned else []
        flat = room_for_rows(_local(self.parameters[parcel.names[0]].detach()), self._shapes(parcel), size)
        return flat, self.world.scatter(flat, parts, parcel.owner)

    def _shapes(self, parcel: _Parcel) -> list[torch.Size]:
        return [self._sharded[name] for name in parcel.names]


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


def _unflat(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _local(rows: Tensor) -> Tensor:
    """What this process has of a sharded tensor."""
    local: Tensor = rows.to_local()  # type: ignore[attr-defined]
    return local


def _on_cpu(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {key: _on_cpu(value) for key, value in entry.items()}
    return entry.cpu() if isinstance(entry, Tensor) else entry
