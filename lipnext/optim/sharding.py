"""FSDP2 for what does not fit: large matrices lie in rows over the processes and are whole only while their layer computes.

Torch's `fully_shard` gathers the matrices of a layer before its forward and its backward pass, and sums their gradients into
the rows. How rows come to the process that moves the matrix, and back, is told in `owner`.
"""

import copy
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lipnext.core.errors import ConfigError
from lipnext.core.module import LipschitzModule
from lipnext.core.network import LipschitzNetwork
from lipnext.core.world import World


def find_shardable(network: LipschitzNetwork, smallest: int) -> list[str]:
    """Names of the parameters that only the forward pass of a layer of the body reads, from `smallest` entries on.

    Raises:
        ConfigError: if there is none, or training changes more of the network than its parameters and buffers.
    """
    if type(network).set_progress is not LipschitzNetwork.set_progress:
        raise ConfigError(
            f"train.shard: a {type(network).__name__} changes with the progress of the training and cannot be sharded; "
            "set it to false"
        )
    # A loss would read the parameters of a layer whose constant it estimates, while they are not there.
    layers = {
        f"body.{number}": layer
        for number, layer in enumerate(network.body)
        if isinstance(layer, LipschitzModule)
        and type(layer).estimate_lipschitz is LipschitzModule.estimate_lipschitz
    }
    found = [
        f"{path}.{name}"
        for path, layer in layers.items()
        for name, parameter in layer.named_parameters()
        if parameter.numel() >= smallest
    ]
    if not found:
        raise ConfigError(
            f"train.shard: no matrix of this network's body could be sharded (of {smallest} entries or more, read by the "
            "forward pass alone); set it to false"
        )
    return found


def shard_parameters(network: nn.Module, names: Iterable[str], world: World) -> None:
    """Replace parameters of layers of the body by their rows, in place.

    Raises:
        ConfigError: if this torch cannot.
    """
    try:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        # Nothing here works in place on what a layer returned.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        mesh = init_device_mesh(next(network.parameters()).device.type, (world.size,))
        chosen = {name: network.get_parameter(name) for name in names}
        others = {p for name, p in network.named_parameters() if name not in chosen}
        layers = {".".join(name.split(".")[:2]) for name in chosen}
        for path in sorted(layers):
            fully_shard(network.get_submodule(path), mesh=mesh, ignored_params=others)
        # The root has nothing to gather; it lets the next layer be gathered while one computes.
        fully_shard(network, mesh=mesh, ignored_params=others)
        for module in network.modules():
            if isinstance(
                module, FSDPModule
            ):  # gradients are sums over the batch here, not means over processes
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"train.shard: torch {torch.__version__} cannot shard as is needed here ({error}); install torch 2.8 or newer, or "
            "set it to false"
        ) from error


def with_room(network: nn.Module, device: torch.device | str) -> nn.Module:
    """Return a copy with parameters of no particular value on a device; on "meta" they take no memory."""
    room = {
        id(p): nn.Parameter(torch.empty_like(p, device=device), p.requires_grad) for p in network.parameters()
    }
    return copy.deepcopy(network, room)


def pack_rows(tensors: Sequence[Tensor], shapes: Sequence[torch.Size], size: int) -> Tensor:
    """The rows that this process has of some tensors of these shapes, one after the other, all as long as the longest share."""
    packed = []
    for rows, shape in zip(tensors, shapes, strict=True):
        room = rows.new_zeros(_share(shape, size))
        room[: len(rows)] = rows
        packed.append(room.flatten())
    return torch.cat(packed)


def room_for_rows(like: Tensor, shapes: Sequence[torch.Size], size: int) -> Tensor:
    """A tensor into which what `pack_rows` returns fits, of no particular value."""
    return like.new_empty(sum(_share(shape, size).numel() for shape in shapes))


def unpack_rows(packed: Tensor, into: Sequence[Tensor], shapes: Sequence[torch.Size], size: int) -> None:
    """The inverse of `pack_rows`: overwrite this process's rows."""
    parts = packed.split([_share(shape, size).numel() for shape in shapes])
    for rows, part, shape in zip(into, parts, shapes, strict=True):
        rows.copy_(part.view(_share(shape, size))[: len(rows)])


def cut(tensors: Sequence[Tensor], size: int) -> list[Tensor]:
    """What `pack_rows` would give on each of the processes for the rows of whole tensors."""
    shapes = [tensor.shape for tensor in tensors]
    pieces = [[tensor[_rows(tensor.shape, size, rank)] for tensor in tensors] for rank in range(size)]
    return [pack_rows(piece, shapes, size) for piece in pieces]


def put_together(parts: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The inverse of `cut`: whole tensors from what all processes packed."""
    shares = [_share(shape, len(parts)) for shape in shapes]
    columns = torch.stack(list(parts)).split([share.numel() for share in shares], dim=1)
    # every process but the last ones has a full share, so that the padding comes last
    return [column.reshape(-1, *shape[1:])[: shape[0]] for column, shape in zip(columns, shapes, strict=True)]


def _share(shape: torch.Size, size: int) -> torch.Size:
    """The rows of one process, as `torch.chunk` cuts them."""
    return torch.Size((-(-shape[0] // size), *shape[1:]))


def _rows(shape: torch.Size, size: int, rank: int) -> slice:
    share = _share(shape, size)[0]
    return slice(min(rank * share, shape[0]), min((rank + 1) * share, shape[0]))
