import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Call

import lipnext
from lipnext import zoo
from lipnext.core.errors import BundleError, ConfigError
from lipnext.core.files import write_json
from lipnext.deployment import locate as locating
from lipnext.deployment.bundle import load_experiment
from lipnext.deployment.locate import ZOO, locate, packaged

NAMES = ["cifar10-cpu", "digits", "fashion-mnist"]
FILES = ["README.md", "certificate.json", "config.json", "log.jsonl", "model.safetensors", "result.json"]
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of the digits alone, to be spoiled."""
    shutil.copytree(ZOO / "digits", tmp_path / "zoo" / "digits")
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "zoo")
    monkeypatch.setattr(locating, "ZOO", tmp_path / "zoo")
    return tmp_path / "zoo" / "digits"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    write_json(path, document)


# ---- what is packaged


def test_each_model_is_whole_small_and_names_no_folder_of_a_machine() -> None:
    assert packaged() == NAMES
    for name in NAMES:
        assert sorted(p.name for p in (ZOO / name).iterdir()) == FILES
        assert (ZOO / name / "model.safetensors").stat().st_size < 3e6
        assert load_experiment(ZOO / name).data.path is None
        for file in (ZOO / name).iterdir():
            assert not re.search(rb"/(home|root|tmp|usr|work|mnt|data)/", file.read_bytes()), file


def test_numbers_are_those_of_the_committed_results() -> None:
    if not RESULTS.is_dir():
        pytest.skip("the results are in the repository, not in an installed package")
    for row in zoo.entries():
        committed = json.loads((RESULTS / f"{row['preset']}-seed{row['seed']}.json").read_text())
        for key in ("n", "clean", "cra", "acr", "lipschitz", "model_sha256", "minutes", "command", "notes"):
            assert row[key] == committed[key], key
        assert committed["command"].split()[2] == row["preset"]
        log = [json.loads(line) for line in (ZOO / row["name"] / "log.jsonl").read_text().splitlines()]
        assert log[-1]["epoch"] == row["epochs"]


# ---- where a name leads


def test_a_name_leads_to_the_package_unless_there_is_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("digits") == ZOO / "digits"
    assert lipnext.load("digits").classes == tuple(str(k) for k in range(10))
    (tmp_path / "digits").mkdir()
    assert locate("digits") == Path("digits")
    with pytest.raises(BundleError, match=r"digits has no model\.safetensors"):
        lipnext.load("digits")


def test_what_is_nowhere_is_told_with_the_nearest_name() -> None:
    with pytest.raises(
        BundleError, match=r"fashionmnist is no folder .*; did you mean 'fashion-mnist'\? known: cifar"
    ):
        locate("fashionmnist")
    with pytest.raises(BundleError, match="runs/digits is no folder; give a run folder"):
        locate("runs/digits")
    with pytest.raises(ConfigError, match="unknown packaged model 'digit'; did you mean 'digits'"):
        zoo.check("digit")


def test_a_command_says_what_the_name_stands_for(call: Call) -> None:
    code, out, err = call("certify", "digits", "--eps", "36/255", "--json")
    assert code == 0
    assert f"lipnext: digits is {ZOO / 'digits'}\n" in err
    assert json.loads(out)["cra"] == {"36/255": 339 / 359}
    code, out, err = call("certify", "fashion-mnist")
    assert (code, out) == (2, "")
    assert "data.path is missing; give " in err
    assert call("verify", "digts")[0] == 2


# ---- list and verify


def test_list(call: Call) -> None:
    code, out, err = call("zoo", "list")
    assert (code, err) == (0, "")
    for text in (
        "fashion-mnist",
        "0.8730",
        "0.8378",
        "digits: lipnext/digits, l2 deterministic, semantics real",
    ):
        assert text in out
    code, out, _ = call("zoo", "list", "--json")
    assert [row["name"] for row in json.loads(out)] == NAMES


def test_verify_derives_the_digits_again(call: Call) -> None:
    pytest.importorskip("flint", reason="python-flint is not installed (extra: verify)")
    code, out, _ = call("zoo", "verify", "digits")
    assert (code, out) == (0, "digits: holds (bundle verified; test part: 359 images certified again)\n")


@pytest.mark.slow
def test_verify_finds_every_bundle_proved(call: Call) -> None:
    pytest.importorskip("flint", reason="python-flint is not installed (extra: verify)")
    code, out, _ = call("zoo", "verify", "--json")
    assert code == 0
    assert [(r["name"], r["holds"]) for r in json.loads(out)] == [(name, True) for name in NAMES]


@pytest.mark.slow
def test_verify_derives_fashion_mnist_again(call: Call, fashion_mnist: Path) -> None:
    pytest.importorskip("flint", reason="python-flint is not installed (extra: verify)")
    code, out, _ = call("zoo", "verify", "fashion-mnist", "--data", fashion_mnist)
    assert code == 0
    assert "10000 images certified again" in out


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("result.json", lambda d: d.update(clean=(349 + 1) / 359), "clean is published as 0.9749"),
        ("result.json", lambda d: d["cra"].update({"72/255": 324 / 359}), "cra is published as"),
        ("result.json", lambda d: d.update(acr=d["acr"] + 1e-8), "acr is published as"),
        ("result.json", lambda d: d.update(margin=d["margin"] + 1e-8), "margin is published as"),
        ("result.json", lambda d: d.update(n=360), "n is published as 360, measured 359"),
        (
            "result.json",
            lambda d: d["lipschitz"].update(bound=1.0),
            "lipschitz of result.json is not that of",
        ),
        ("result.json", lambda d: d.update(minutes=0.01), "README.md is not the card of these numbers"),
        ("certificate.json", lambda d: d["lipschitz"].update(bound=1.0), "changed"),
    ],
)
def test_verify_sees_what_was_changed(
    copied: Path, call: Call, file: str, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    pytest.importorskip("flint", reason="python-flint is not installed (extra: verify)")
    edit(copied / file, change)
    code, out, err = call("zoo", "verify")
    assert code != 0
    assert problem in out + err


def test_verify_believes_the_independent_checker(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(arguments: list[str]) -> int:
        assert arguments[0] == str(copied)
        assert "--records" in arguments
        print(json.dumps({"holds": False, "reason": "no"}))
        return 1

    monkeypatch.setattr(zoo, "verify", refuse)
    assert zoo.check("digits")["problems"] == ["verify: no"]


def test_data_belongs_to_one_model(call: Call, tmp_path: Path) -> None:
    code, out, err = call("zoo", "verify", "--data", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--data is the data set of one model; name it" in err
