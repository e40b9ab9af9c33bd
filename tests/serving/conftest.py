"""A tiny bundle to serve."""

from pathlib import Path

import pytest
import tiny_runs
import torch

from lipnext.deployment.bundle import save_bundle
from lipnext.training.loop import train


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "bundle"
    torch.manual_seed(0)
    experiment = tiny_runs.experiment("train.epochs=4")
    data = tiny_runs.pictures(96), tiny_runs.pictures(12, seed=1)
    net, _ = train(tiny_runs.network(experiment), experiment, *data, folder.parent)
    save_bundle(net, experiment, tiny_runs.CLASSES, folder)
    return folder
