"""The checkpoints of a run, whichever kind `train.checkpoints` names: written, kept, found again."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from lipnext.core.errors import ConfigError, TrainingError
from lipnext.core.experiment import Experiment, TrainSpec
from lipnext.core.world import World
from lipnext.optim.owner import Owners
from lipnext.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from lipnext.training.state import Parts, gather_state, own_state, restore_state

OLDEST = "2.9"
"""The torch whose writer of safetensors from several processes is the one that is used here."""


class Checkpoints:
    """Every method is called by all processes; as a context manager it waits at its end for a save that is under way.

    Args:
        folder: where they lie; created with the first.
        experiment: says how they are written, and is the only one that goes on from them.
        world: the processes.

    Raises:
        ConfigError: for `train.checkpoints=distributed` with a torch that is too old, or with `train.checkpoint_part`.
    """

    def __init__(self, folder: Path, experiment: Experiment, world: World) -> None:
        check_checkpoints(experiment.train)
        self.folder, self.spec, self.digest, self.world = folder, experiment.train, experiment.digest(), world
        self._background = None
        if self.spec.checkpoints == "distributed":
            from lipnext.training import distributed_checkpoint  # a second to import, and not in every torch

            world.first(lambda: distributed_checkpoint.delete_drafts(folder))
            self._background = distributed_checkpoint.BackgroundSave(
                folder, self.digest, self.spec.keep, world
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except TrainingError:
            if error is None:  # else it is known already why the run ends
                raise
        finally:
            if self._background is not None:
                self._background.close()

    def newest(self) -> Path | None:
        """The checkpoint to go on from, if any."""
        found = self.world.first(lambda: list_checkpoints(self.folder)[-1:])
        return found[0] if found else None

    def restore(self, path: Path, parts: Parts, owners: Owners) -> dict[str, Any]:
        """Give every part what this process owns, and return the counters, as `save` was given them.

        Raises:
            BundleError: if the checkpoint is damaged, of another format, or of another experiment.
        """
        if path.is_dir():
            from lipnext.training.distributed_checkpoint import open_checkpoint

            state, fetch = open_checkpoint(path, self.digest, self.world)
            restore_state(state, parts, owners, fetch)
        else:
            state = load_checkpoint(path, self.digest)
            restore_state(state, parts, owners)
        counters: dict[str, Any] = state["progress"]
        return counters

    def save(self, counters: dict[str, Any], parts: Parts, owners: Owners) -> None:
        """Write a checkpoint, or begin to; delete all but the newest `train.keep`.

        Args:
            counters: plain values, "step" among them.
            parts: whose states it holds.
            owners: of their parameters.

        Raises:
            TrainingError: on all processes, if this one, or the one before, cannot be written (disk full, no permission).
        """
        step = counters["step"]
        if self._background is not None:
            self._background.begin(step, {"progress": counters, **own_state(parts, owners)})
            return
        state = {"progress": counters, **gather_state(parts, owners)}
        keep, part = self.spec.keep, self.spec.checkpoint_part
        self.world.first(lambda: save_checkpoint(self.folder, step, state, self.digest, keep, part))

    def wait(self) -> None:
        """Return when what was saved is on the disk.

        Raises:
            TrainingError: as `save`.
        """
        if self._background is not None:
            self._background.wait()


def check_checkpoints(spec: TrainSpec) -> None:
    """Refuse `train.checkpoints=distributed` where it cannot work, before anything is trained.

    Raises:
        ConfigError: if torch is too old or was built without its distributed part, or files of a largest size are asked for.
    """
    if spec.checkpoints == "whole":
        return
    if torch.__version__ < OLDEST or not dist.is_available():
        raise ConfigError(
            f"train.checkpoints: 'distributed' needs torch {OLDEST} or later with torch.distributed, "
            f"this is torch {torch.__version__}; set it to 'whole'"
        )
    if spec.checkpoint_part is not None:
        raise ConfigError(
            f"train.checkpoint_part: only whole checkpoints are cut into files of {spec.checkpoint_part} MB; set it to null, "
            "or train.checkpoints to 'whole'"
        )
