"""`lipnext certify --model` and `lipnext doctor MODEL`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lipnext.cli import app
from lipnext.core.errors import ConfigError, UnsoundError

FACTORIES = """
import torch
from torch import nn

def good():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).float()

def bad():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.GELU(), nn.Linear(10, 10))

def number():
    return 3

def broken():
    raise RuntimeError("no weights\\nhere")
"""


@pytest.fixture
def factories(tmp_path: Path) -> str:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES)
    return str(path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_certify_a_model(factories: str) -> None:
    for more in ([], ["--semantics", "deployed", "--arithmetic", "float32"]):
        document = json.loads(
            run("certify", "--model", f"{factories}:good", "--json", "--eps", "1/255", *more)
        )
        assert document["n"] == 359
        assert 0 <= document["cra"]["1/255"] <= document["clean"] <= 1
        assert document["semantics"] == ("deployed" if more else "real")
    assert "Lipschitz bound" in run("certify", "--model", f"{factories}:good")


def test_doctor_lists_every_operation(factories: str) -> None:
    document = json.loads(run("doctor", f"{factories}:good", "--json"))
    assert document["certifiable"]
    assert [row["place"] for row in document["operations"]] == ["0", "1", "2", "3"]
    assert document["operations"][1]["proof"] in ("gram-residual", "gram-iteration")
    assert "Linear(64, 32)" in run("doctor", f"{factories}:good")


def test_doctor_says_what_is_refused(factories: str) -> None:
    with pytest.raises(UnsoundError, match=r"cannot certify 2: GELU has no proved bound; build it from"):
        run("doctor", f"{factories}:bad")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["certify"], "either a run folder or --model"),
        (["certify", "run", "--model", "x.py:f"], "either a run folder or --model"),
        (["certify", "--model", "x.py"], r"must be file\.py:factory"),
        (["certify", "--model", "missing.py:f"], r"there is no file missing\.py"),
        (["doctor", "HERE:other"], "has no function 'other'"),
        (["doctor", "HERE:number"], r"must return a torch\.nn\.Module, got int"),
        (["doctor", "HERE:broken"], "failed with RuntimeError: no weights$"),
        (["doctor", "HERE:good", "--shape", "8,8"], "--shape must be C,H,W"),
        (
            ["certify", "--model", "HERE:good", "--semantics", "deployed", "--arithmetic", "bf16"],
            "--arithmetic must",
        ),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, factories: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        run(*(argument.replace("HERE", factories) for argument in arguments))
    assert "\n" not in str(caught.value)
