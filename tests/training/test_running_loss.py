import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import experiment, log_lines, network, pictures
from torch.utils._python_dispatch import TorchDispatchMode

from lipnext.core.errors import TrainingError
from lipnext.core.world import World
from lipnext.training import loop, running_loss
from lipnext.training.loop import train
from lipnext.training.progress import Silent
from lipnext.training.running_loss import RunningLoss

CPU = torch.device("cpu")
PLAIN = ["optim.euclidean=sgd", "optim.clip=1", "train.accumulate=2"]
"""The rules of torch's Adam family look at their own step counter, which stays on the CPU and costs nothing."""


class Readings(TorchDispatchMode):
    """Counts what makes a program wait for its device: a value that becomes a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.count += 1
        return func(*args, **(kwargs or {}))


class AtSteps(Silent):
    """Notes how many readings there were by the end of each step."""

    def __init__(self, mode: Readings) -> None:
        self.mode = mode
        self.counts: list[int] = []

    def advance(self, count: int, note: str = "") -> None:
        self.counts.append(self.mode.count)


def test_losses_are_read_in_order_and_passes_add_up() -> None:
    losses = RunningLoss(CPU, 2, World())
    assert losses.read() == []
    for value in (1.0, 2.0, math.inf, 4.0):
        losses.add(torch.tensor(value, requires_grad=True) * 1)
    assert losses.is_due
    assert losses.read() == [3.0, math.inf]
    assert not losses.is_due
    assert RunningLoss(torch.device("meta"), 1, World()).every == running_loss.READ_EVERY_ELSEWHERE


def test_a_step_reads_nothing_back_from_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where losses wait: from the first step of an epoch to its last no value becomes a Python number."""
    monkeypatch.setattr(running_loss, "READ_EVERY", {})
    what = experiment("train.epochs=1", "train.data_on_device=true", *PLAIN)
    with Readings() as mode:
        steps = AtSteps(mode)
        train(network(what), what, pictures(80), pictures(12, seed=1), tmp_path, reporter=steps)
    assert len(steps.counts) == 10
    assert steps.counts[-1] == steps.counts[0]
    assert mode.count > steps.counts[-1]  # the end of the epoch does look


@pytest.mark.parametrize("every", [2, 50])
def test_how_often_losses_are_read_changes_no_bit(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, nets = experiment(), []
    for name, often in (("each", 1), ("seldom", every)):
        monkeypatch.setattr(running_loss, "READ_EVERY", {"cpu": often})
        (tmp_path / name).mkdir()
        nets.append(train(network(what), what, pictures(), pictures(12, seed=1), tmp_path / name)[0])
    for first, second in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(first, second)
    assert log_lines(tmp_path / "each") == log_lines(tmp_path / "seldom")


@pytest.mark.parametrize("every", [2, 50])
def test_a_loss_that_is_not_finite_ends_the_run_within_its_epoch_and_its_step_is_named(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoiled(loop.Objective):
        def __call__(self, *args: Any) -> torch.Tensor:
            loss = super().__call__(*args)
            return loss * math.nan if 0.4 < args[-1] < 0.5 else loss  # step 4 of 9, in the second epoch

    monkeypatch.setattr(loop, "Objective", Spoiled)
    monkeypatch.setattr(running_loss, "READ_EVERY", {"cpu": every})
    what = experiment()
    with pytest.raises(
        TrainingError, match=r"the loss became nan at step 4 \(epoch 2\); the last good check"
    ):
        train(network(what), what, pictures(), pictures(12, seed=1), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000003.safetensors"]
