"""The smallest experiment, data set and network that go through a whole run."""

import json
from pathlib import Path
from typing import Any

import torch

from lipnext.core.experiment import Experiment
from lipnext.core.network import LipschitzNetwork
from lipnext.data.dataset import Dataset
from lipnext.systems import build_network
from lipnext.training.checkpoint import list_checkpoints, load_checkpoint

MODEL: dict[str, bool | int | float | str] = {"width": 8, "depth": 1, "patch": 1, "shift": 0.125}
CLASSES = ("a", "b", "c")
SHAPE = (1, 4, 4)
# Sums over a batch are added in another order: some 2^-53 of each term. Newton-Schulz raises a small singular value of
# the momentum by 3.4445^3 * 1.875^2 = 143 at most in each of 9 steps. Observed: 2e-15.
SAME = 1e-12
DIGITS = ["model.width=8", "model.depth=1", "model.patch=2", "train.epochs=2", "train.batch_size=256"]
"""Overrides that make the experiment `digits` a matter of ten steps."""


def pictures(count: int = 24, seed: int = 0) -> Dataset:
    """Three classes of noisy 4 x 4 pictures that a few steps can tell apart."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    images = torch.randint(0, 100, (count, *SHAPE), generator=rng)
    images[torch.arange(count), 0, labels] += 150
    return Dataset(images=images.to(torch.uint8), labels=labels, classes=CLASSES)


def experiment(*changes: str) -> Experiment:
    """3 epochs of 3 steps on `pictures()`, with everything on that has a state."""
    base = Experiment(system="lipnext", model=MODEL)
    standard = [
        "train.epochs=3",
        "train.batch_size=8",
        "train.ema=0.9",
        "optim.lookahead=3",
        "augment.crop=1",
    ]
    return base.override([*standard, *changes])


def network(of: Experiment) -> LipschitzNetwork:
    return build_network(of, SHAPE, len(CLASSES))


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The log without the times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines


def difference(first: Any, second: Any) -> float:
    """The largest over two nested states, which must have the same form."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert first.shape == second.shape
        return (first.double() - second.double()).abs().max().item() if first.numel() else 0.0
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return max((difference(first[key], second[key]) for key in first), default=0.0)
    if isinstance(first, list | tuple):
        return max((difference(*pair) for pair in zip(first, second, strict=True)), default=0.0)
    if isinstance(first, float):
        return abs(first - second)
    assert first == second
    return 0.0


def nested_state() -> dict[str, Any]:
    """Everything that a checkpoint may hold."""
    shared = torch.arange(6.0).view(2, 3)
    return {
        "a": {0: {"step": 3, "moment": shared.mT}, 1: {}},
        "b": [1, 2.5, None, True, "text", (0.9, 0.999)],
        "c": {"half": torch.tensor([1.5], dtype=torch.bfloat16), "scalar": torch.tensor(0.1), "same": shared},
        "tiny": 5e-324,
        "none": torch.empty(0, dtype=torch.int64),
    }


def read_checkpoint(path: Path, digest: str) -> dict[str, Any]:
    """The whole state of a checkpoint of either kind."""
    if not path.is_dir():
        return load_checkpoint(path, digest)
    from lipnext.training.distributed_checkpoint import open_checkpoint  # a second to import

    state, fetch = open_checkpoint(path, digest)
    whole: dict[str, Any] = fetch(state)
    return whole


def newest_state(folder: Path, what: Experiment) -> dict[str, Any]:
    """Of the newest checkpoint of a run, without its time."""
    state = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1], what.digest())
    del state["progress"]["seconds"]
    return state


def assert_same_run(folder: Path, other: Path, what: Experiment) -> None:
    """The newest checkpoints and the logs agree."""
    assert difference(newest_state(folder, what), newest_state(other, what)) < SAME
    lines = log_lines(folder), log_lines(other)
    for line in (*lines[0], *lines[1]):
        del line["drift"]  # float64's roundoff itself
    assert difference(*lines) < SAME
