import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lipnext.cli import app
from lipnext.core.errors import ConfigError, UnsoundError

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

def pooled():
    return nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 10))

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return str(path)


def test_analyse_gives_constants_radii_and_pixels_of_each_image(model: str) -> None:
    done = CliRunner().invoke(
        app, ["analyse", f"{model}:build", "--samples", "3", "--eps", "2/255,0.1", "--json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["n"], result["norm"], result["kind"], result["semantics"]) == (
        3,
        "linf",
        "deterministic",
        "real",
    )
    assert len(result["model_sha256"]) == 64
    for index, row in enumerate(result["images"]):
        assert row["index"] == index
        for eps in ("2/255", "0.1"):
            found = row["constants"][eps]
            assert 0 < found["joint"] <= found["recurjac"] * (1 + 1e-12)
            assert found["recurjac"] <= found["interval"] * (1 + 1e-12)
            growing, falling = set(row["growing"][eps]), set(row["falling"][eps])
            assert not growing & falling
            assert growing | falling <= set(range(64))
        assert row["constants"]["2/255"]["joint"] <= row["constants"]["0.1"]["joint"]
        assert row["radius"] > 0
    assert any(row["growing"]["2/255"] for row in result["images"])


def test_analyse_prints_radii_rounded_down_and_constants_up(model: str) -> None:
    arguments = ["analyse", f"{model}:build", "--samples", "1", "--eps", "0.1"]
    (row,) = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["images"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (line,) = [text.split() for text in done.stdout.splitlines() if text.split()[:1] == ["0"]]
    assert float(line[3]) <= row["radius"] < float(line[3]) + 1e-6
    for printed, method in zip(line[4:7], ("joint", "recurjac", "interval"), strict=True):
        assert row["constants"]["0.1"][method] <= float(printed) < row["constants"]["0.1"][method] + 1e-4


@pytest.mark.parametrize(
    ("factory", "options", "kind", "message"),
    [
        ("pooled", [], UnsoundError, r"cannot analyse 0 \(MaxPool2d"),
        ("few", [], ConfigError, "the network gives 3 logits, the data set has 10 classes"),
        ("build", ["--samples", "0"], ConfigError, "samples must be at least 1, got 0"),
        ("build", ["--eps", "0"], ConfigError, "eps must be above 0"),
        ("nothing", [], ConfigError, "has no function 'nothing'"),
    ],
)
def test_what_cannot_be_analysed_is_said_in_one_line(
    model: str, factory: str, options: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        CliRunner().invoke(app, ["analyse", f"{model}:{factory}", *options], catch_exceptions=False)
    assert "\n" not in str(caught.value)
