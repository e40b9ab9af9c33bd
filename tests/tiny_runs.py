"""The smallest experiment, data set and network that go through a whole run."""

import json
from pathlib import Path
from typing import Any

import torch

from lipnext.core.experiment import Experiment
from lipnext.core.network import LipschitzNetwork
from lipnext.data.dataset import Dataset
from lipnext.systems import build_network

MODEL: dict[str, bool | int | float | str] = {"width": 8, "depth": 1, "patch": 1, "shift": 0.125}
CLASSES = ("a", "b", "c")
SHAPE = (1, 4, 4)
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
