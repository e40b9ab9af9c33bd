"""Checkpoints that all processes write together, in the background, by `torch.distributed.checkpoint`: a folder each.

In `step-NNNNNNNNN` lie one safetensors file of each process, with what it owns, and `state.json`: the form of the state, its
plain values, and where each tensor lies, with its sha256. The folder is a draft, and does not count, until all have written.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as Written

from lipnext.core.errors import BundleError
from lipnext.core.files import atomic_write, sha256_tensors, sync_folder
from lipnext.core.world import World
from lipnext.training.checkpoint import (
    DRAFT,
    cannot_write,
    check_origin,
    copied,
    damaged,
    delete_checkpoint,
    list_checkpoints,
    put_together,
    take_apart,
)

FORMAT = "lipnext-distributed-checkpoint-1"
STATE = "state.json"


class BackgroundSave:
    """Writes checkpoints while training goes on, one at a time; every method is called by all processes.

    Args:
        folder: of the checkpoints; created with the first.
        digest: of the experiment; a checkpoint resumes only its own.
        keep: how many to keep, at least 1.
        world: the processes, each of which writes what it owns.
    """

    def __init__(self, folder: Path, digest: str, keep: int, world: World) -> None:
        self.folder, self.digest, self.keep, self.world = folder, digest, keep, world
        self._group = world.aside()  # what the thread says must not mix with what training says
        # Not dcp.async_save: nobody can wait for its thread, which holds the connection a little longer than the save takes.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: tuple[_Writer, Future[Metadata]] | None = None

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Copy a state and begin to write it.

        Args:
            step: optimiser steps done.
            state: this process's part, see `own_state`.

        Raises:
            TrainingError: if the checkpoint before could not be written.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        skeleton = take_apart(state, "", tensors)
        copies = {
            name: copied(tensor) for name, tensor in tensors.items()
        }  # training is about to change them
        writer = _Writer(self.folder / f"step-{step:09d}", skeleton, self.digest, self.keep)
        alone = self._group is None
        if alone:
            # One process is what is meant. The filter stays: the warning comes from the thread, at some later time.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        future = self._thread.submit(
            dcp.save, copies, storage_writer=writer, process_group=self._group, no_dist=alone
        )
        self._under_way = writer, future

    def wait(self) -> None:
        """Return when the checkpoint that was begun last counts.

        Raises:
            TrainingError: on all processes, if one could not write (disk full, no permission) or has gone; older checkpoints
                stay as they were.
        """
        if self._under_way is None:
            return
        writer, future = self._under_way
        error = None
        try:
            self.world.result(future)
        except CheckpointException as failed:
            error = next(iter(failed.failures.values()))[0]
            traceback.clear_frames(failed.__traceback__)  # they hold the connection, whose threads must end
        finally:
            if future.done():  # and not a second Ctrl-C
                self._under_way = None
        if error is not None:
            if self.world.is_first:
                shutil.rmtree(writer.draft, ignore_errors=True)  # there may be too little space
            raise (cannot_write(writer.final, error) if isinstance(error, OSError) else error)

    def close(self) -> None:
        """Give the connection of the thread back, once nothing is under way."""
        self._thread.shutdown()
        self.world.leave(self._group)
        self._group = None


class _Writer(HuggingFaceStorageWriter):
    """Writes one checkpoint: all that torch's writer does, the hashes, and the end, which makes it count."""

    def __init__(self, final: Path, skeleton: Any, digest: str, keep: int) -> None:
        self.final, self.draft = final, final.with_name(final.name + DRAFT)
        self.skeleton, self.digest, self.keep = skeleton, digest, keep
        super().__init__(str(self.draft), save_distributed=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Send the skeleton along, to the first process."""
        return dataclasses.replace(super().prepare_local_plan(plan), storage_data=self.skeleton)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Merge the skeletons, on the first process."""
        self.skeleton = functools.reduce(_merged, (plan.storage_data for plan in plans))
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Written[list[WriteResult]]:
        """Write this process's file, and send along what `state.json` has to say about its tensors."""
        results = []
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        for result in super().write_data(plan, planner).wait():
            tensor = cast(Tensor, tensors[result.index.fqn])
            entry = {"file": result.storage_data.relative_path, "sha256": sha256_tensors({"": tensor})}
            results.append(dataclasses.replace(result, storage_data=entry))
        sync_folder(self.draft)
        written: Written[list[WriteResult]] = Written()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make it count and delete old ones, on the first process, when all have written."""
        document = {
            "format": FORMAT,
            "digest": self.digest,
            "skeleton": self.skeleton,
            "tensors": {result.index.fqn: result.storage_data for part in results for result in part},
        }
        with atomic_write(self.draft / STATE) as file:
            json.dump(document | {"sha256": _hash(document)}, file)
        if self.final.exists():
            delete_checkpoint(self.final)
        os.rename(self.draft, self.final)
        sync_folder(self.final.parent)
        for old in list_checkpoints(self.final.parent)[: -self.keep]:
            delete_checkpoint(old)


def delete_drafts(folder: Path) -> None:
    """Delete what a run left unfinished that was killed."""
    for draft in folder.glob(f"step-*{DRAFT}"):
        shutil.rmtree(draft, ignore_errors=True)


def open_checkpoint(
    path: Path, digest: str, world: World = World()
) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """Read what a checkpoint says about its state; called by all processes.

    Args:
        path: a folder of `list_checkpoints`.
        digest: of the experiment that goes on.
        world: the processes that go on, of whatever number.

    Returns:
        The state, in which something stands for each tensor, and `fetch`: given a nested part of the state, it reads the
        tensors of that part alone and returns it with them. A tensor that does not have its sha256 is a BundleError.

    Raises:
        BundleError: if the checkpoint is damaged, of another format, or of another experiment.
    """
    document = world.first(lambda: _read_document(path, digest))
    entries: dict[str, dict[str, str]] = document["tensors"]
    state = put_together(document["skeleton"], {name: _Stored(name) for name in entries})

    def fetch(part: Any) -> Any:
        files: dict[str, dict[str, str]] = {}
        for name in _names(part):
            files.setdefault(entries[name]["file"], {})[name] = entries[name]["sha256"]
        tensors: dict[str, Tensor] = {}
        for file, hashes in files.items():
            tensors |= _read(path, file, hashes)
        return _filled(part, tensors)

    return state, lambda part: world.each(lambda: fetch(part))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Stands for a tensor in the files."""

    name: str


def _read_document(path: Path, digest: str) -> dict[str, Any]:
    try:
        document = json.loads((path / STATE).read_bytes())
        check_origin(path, document, FORMAT, digest)
        expected = document.pop("sha256", None)
    except (OSError, ValueError, AttributeError) as error:
        raise BundleError(damaged(path, str(error))) from error
    if expected != _hash(document):
        raise BundleError(damaged(path, f"the sha256 of {STATE} differs"))
    return cast(dict[str, Any], document)


def _read(path: Path, file: str, hashes: dict[str, str]) -> dict[str, Tensor]:
    tensors = {}
    try:
        with safe_open(path / file, "pt") as stored:
            for name, expected in hashes.items():
                tensors[name] = stored.get_tensor(name)
                if sha256_tensors({"": tensors[name]}) != expected:
                    raise BundleError(damaged(path, f"the sha256 of {name} in {file} differs"))
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(damaged(path, f"{file}: {error}")) from error
    return tensors


def _hash(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _merged(first: Any, second: Any) -> Any:
    """Of two skeletons: dictionaries have the entries of both, everything else is the first's."""
    if "dict" not in first or "dict" not in second:
        return first
    entries = dict(first["dict"])
    for key, value in second["dict"]:
        entries[key] = _merged(entries[key], value) if key in entries else value
    return {"dict": [[key, value] for key, value in entries.items()]}


def _names(value: Any) -> list[str]:
    """Of the tensors that a nested state is to have."""
    if isinstance(value, _Stored):
        return [value.name]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [name for item in items for name in _names(item)]


def _filled(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, _Stored):
        return tensors[value.name]
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(item, tensors) for item in value)
    return value
