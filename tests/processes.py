"""Several processes that meet as under torchrun, forked from a server that has imported the package already."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from lipnext.core.world import World, join

SERVER = multiprocessing.get_context("forkserver")
# the last three are imported by a first step of an optimiser and by the modules of tests
SERVER.set_forkserver_preload(
    ["lipnext.training.loop", "lipnext.systems.liresnet", "torch._dynamo", "pytest", "hypothesis"]
)
SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def together(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `work(world, *arguments)` in `size` processes and return what each of them gave or raised, by rank.

    A process that ended without a word stands as its exit code. `work` is a function of a module of tests. One process is
    this one, for the time being under torch's own default dtype as the others are.
    """
    if size == 1:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return [work(World(), *arguments)]
        finally:
            torch.set_default_dtype(default)
    return apart(size, _joined, work, *arguments)


def apart(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The same for `work(*arguments)`, which joins the others itself."""
    port, processes, ends = free_port(), [], []
    for rank in range(size):
        end, other = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=_run, args=(rank, size, port, other, work, arguments), daemon=True)
        process.start()
        other.close()
        processes.append(process)
        ends.append(end)
    outcomes = []
    try:
        for process, end in zip(processes, ends, strict=True):
            try:
                assert end.poll(SECONDS), "a process hangs"
                outcomes.append(pickle.loads(end.recv_bytes()))
            except EOFError:
                process.join(SECONDS)
                outcomes.append(process.exitcode)
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            process.kill()  # one that has ended does not mind
    return outcomes


def values(outcomes: list[Any]) -> list[Any]:
    """What the processes gave; the first error is raised."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def _joined(work: Callable[..., Any], *arguments: Any) -> Any:
    with join("cpu") as world:
        return work(world, *arguments)


def _run(
    rank: int, size: int, port: int, end: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        outcome = work(*arguments)
    except BaseException as error:
        error.add_note(traceback.format_exc())
        outcome = error
    end.send_bytes(
        pickle.dumps(outcome)
    )  # by value: a pipe of torch would share the memory of a process that ends
