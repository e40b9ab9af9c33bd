"""The processes that train one network together: one, unless torchrun has started several.

Every process has a rank from 0 to size - 1 and runs the same program. Each method is called by all of them, in one order; with
one process nothing is sent, and a method returns what it was given. Numbers and objects travel over gloo, tensors of GPUs over
NCCL.
"""

import functools
import importlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from lipnext.core.errors import ConfigError, LipnextError, TrainingError

T = TypeVar("T")
_GROUPS = itertools.count()


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is.

    Raises:
        TrainingError: from every method that communicates, if another process has gone.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and speaks to people."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` things in a row; the parts of all are disjoint and cover them."""
        return _piece(0, count, self.rank, self.size)

    def parts(self, count: int, pieces: int) -> list[slice]:
        """The same, cut into `pieces` that follow each other; sizes differ by one at most."""
        mine = self.share(count)
        return [_piece(mine.start, mine.stop, piece, pieces) for piece in range(pieces)]

    def add(self, value: float) -> float:
        """The sum over the processes, in float64; NaN if one of them is."""
        if self.size == 1:
            return value
        return self.add_(torch.tensor(value, dtype=torch.float64)).item()

    def largest(self, value: float) -> float:
        """The largest over the processes; no NaN may be among them."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64)
        with _talking():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def length(self, norm: Tensor) -> Tensor:
        """The l2 norm of a vector of which each process holds some entries, from the norms of these."""
        return norm if self.size == 1 else norm.new_tensor(math.sqrt(self.add(norm.item() ** 2)))

    def add_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by the sum over the processes."""
        if self.size > 1:
            with _talking():
                dist.all_reduce(tensor)
        return tensor

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process work; all get its result, or raise its error if it is a `LipnextError`."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = work()
            except LipnextError as error:
                box[1] = error
        with _talking():
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return cast(T, box[0])

    def each(self, work: Callable[[], T]) -> T:
        """Let every process work for itself; if one meets a `LipnextError`, all raise the first."""
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except LipnextError as met:
            error = met
        errors: list[LipnextError | None] = [None] * self.size
        with _talking():
            dist.all_gather_object(errors, error)
        for found in filter(None, errors):
            raise found
        return cast(T, result)

    def aside(self) -> dist.ProcessGroup | None:
        """A second connection, over gloo, for a thread that talks while this one does; None with one process."""
        if self.size == 1:
            return None
        with _talking():
            return dist.new_group(backend="gloo")

    def leave(self, group: dist.ProcessGroup | None) -> None:
        """Close what `aside` opened."""
        if group is not None:
            dist.destroy_process_group(group)

    def result(self, future: Future[T]) -> T:
        """Wait for what a thread does that talks over `aside`."""
        with _talking():
            return future.result()

    def reduce(self, tensor: Tensor, to: int) -> dist.Work:
        """Begin to sum a tensor into the process `to`; what the others keep in it is undefined. Needs two or more."""
        with _talking():
            return dist.reduce(tensor, dst=to, async_op=True)

    def broadcast(self, tensor: Tensor, source: int) -> dist.Work:
        """Begin to overwrite a tensor by that of the process `source`. Needs two or more."""
        with _talking():
            return dist.broadcast(tensor, src=source, async_op=True)

    def gather(self, tensor: Tensor, to: int) -> tuple[dist.Work, list[Tensor]]:
        """Begin to collect tensors of one shape in the process `to`; the list is empty on the others. Needs two or more."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == to else []
        with _talking():
            return dist.gather(tensor, parts or None, dst=to, async_op=True), parts

    def scatter(self, tensor: Tensor, parts: list[Tensor], source: int) -> dist.Work:
        """Begin to overwrite a tensor by the part that `source` has for this process. Needs two or more."""
        with _talking():
            return dist.scatter(tensor, parts or None, src=source, async_op=True)

    def wait(self, work: dist.Work) -> None:
        """Wait for what one of these four began."""
        with _talking():
            work.wait()

    def send(self, value: object, to: int) -> None:
        """Send an object, whose tensors are on the CPU, to a process that calls `receive` for it."""
        with _talking():
            dist.send_object_list([value], dst=to)

    def receive(self, source: int) -> Any:
        """Receive an object that `source` sends."""
        box: list[Any] = [None]
        with _talking():
            dist.recv_object_list(box, src=source)
        return box[0]


@contextmanager
def join(device: str) -> Iterator[World]:
    """Meet the other processes that torchrun has started, if any; leave them at the end.

    Args:
        device: as in `train.device`; of several processes on GPUs each takes its own, "cuda".

    Raises:
        ConfigError: if the variables that torchrun sets are incomplete, or all processes would share one GPU.
        TrainingError: if the others cannot be reached.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield World()
        return
    rank = os.environ.get("RANK", "")
    if not (size.isdecimal() and rank.isdecimal() and "MASTER_ADDR" in os.environ):
        raise ConfigError(
            f"WORLD_SIZE is {size}, but RANK or MASTER_ADDR is missing; start several processes with torchrun"
        )
    backend = "gloo"
    if device.startswith("cuda"):
        if device != "cuda":
            raise ConfigError(
                f"train.device: '{device}' would be shared by {size} processes; take 'cuda', and each has its own"
            )
        torch.cuda.set_device(local_device(device))
        backend = "cpu:gloo,cuda:nccl"
    # The first step of torch.optim imports torch._dynamo, and that import, inside a group, keeps the group for ever: its
    # threads outlive the interpreter then, and a tensor that one of them lets go at that moment aborts a finished process.
    importlib.import_module("torch._dynamo")
    # The store outlives a group, and under torchrun a restart, too: what one group wrote must not be read by the next.
    attempt = f"lipnext-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(_GROUPS)}"
    with _talking():
        store = _meeting_place(
            os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", ""), int(rank), int(size)
        )
        dist.init_process_group(
            backend, store=dist.PrefixStore(attempt, store), rank=int(rank), world_size=int(size)
        )
    try:
        yield World(int(rank), int(size))
    finally:
        dist.destroy_process_group()


@functools.cache
def _meeting_place(address: str, port: str, rank: int, size: int) -> dist.Store:
    """The store over which groups are made, one for the life of the process.

    One for each group would be served by the first process under the same port again and again, and another process could
    still reach the one before, which is about to close, and wait there for ever.
    """
    store: dist.Store = next(dist.rendezvous("env://", rank, size))[0]
    return store


def local_device(name: str) -> torch.device:
    """The device of that name; under torchrun "cuda" is the GPU with the number of the process on its machine."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def batch_mean(x: Tensor, dim: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The mean over dimensions of which one is the batch, of all processes where a batch is spread over several.

    Args:
        x: this process's part of the batch.
        dim: what to average over.
        dtype: of the result and the sums.

    Returns:
        The same on every process, differentiable.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x.mean(dim, dtype=dtype)
    sums = x.sum(dim, dtype=dtype)
    count = sums.new_full((1,), x.numel() / sums.numel())
    everything = _Sum.apply(torch.cat([sums.flatten(), count]))
    return (everything[:-1] / everything[-1]).view_as(sums)


class _Sum(Function):
    """The sum over the processes; what every process's loss says about it is added up in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


def _summed(x: Tensor) -> Tensor:
    total = x.clone()
    with _talking():
        dist.all_reduce(total)
    return total


def _piece(start: int, stop: int, number: int, of: int) -> slice:
    count = stop - start
    return slice(start + count * number // of, start + count * (number + 1) // of)


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"another process of this job has ended or cannot be reached ({reason}); the last checkpoint is "
            "intact, run the same command again to go on from it"
        ) from error
