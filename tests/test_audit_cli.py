"""`lipnext audit`: what it prints and writes, its exit codes, and bad input in one line."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import Call
from tiny_runs import DIGITS

from lipnext import runs
from lipnext.certificates.margin import MarginCertifier

FEW = ("--samples", "6", "--attacks", "minimal-norm")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit") / "run"
    runs.train("digits", folder, overrides=DIGITS)
    return folder


def test_a_sound_run_passes(call: Call, finished: Path, tmp_path: Path) -> None:
    before = sorted(finished.iterdir())
    code, out, err = call(
        "audit", finished, *FEW, "--eps", "1/8, 0.5", "--out", tmp_path / "a.json", "--json"
    )
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document == json.loads((tmp_path / "a.json").read_text())
    assert document["holds"]
    assert (document["n"], document["reproducers"], list(document["cra"])) == (6, [], ["1/8", "0.5"])
    certificate, test = runs.certify_run(finished)
    for sample in document["samples"]:
        assert sample["radius"] == pytest.approx(certificate.radius[sample["idx"]].item(), rel=1e-9)
        assert sample["label"] == test.labels[sample["idx"]].item()
        assert sample["distance"] >= sample["radius"]
    assert sorted(finished.iterdir()) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_tables_for_people(call: Call, finished: Path) -> None:
    code, out, err = call("audit", finished, *FEW)
    assert (code, err) == (0, "")
    for words in (
        "6 images, clean ",
        "certified",
        "attacked",
        "gap",
        "body.2",
        "slope found",
        "0 successes inside",
    ):
        assert words in " ".join(out.split())  # the title wraps where the path is long
    assert "REFUTED" not in out


def test_a_refuted_run_has_a_code_of_its_own_and_leaves_files(
    call: Call, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = MarginCertifier.__call__

    def doubled(self: MarginCertifier, images: object) -> object:
        certificate = honest(self, images)  # type: ignore[arg-type]
        return dataclasses.replace(certificate, radius=3 * certificate.radius)

    monkeypatch.setattr(MarginCertifier, "__call__", doubled)
    code, out, err = call("audit", finished, *FEW, "--out", tmp_path / "audit.json")
    assert code == 5
    assert "REFUTED" in out
    assert err.count("\n") == 1
    assert err.startswith("lipnext: refuted: sample ")
    assert "reproducer-0.npz" in err
    document = json.loads((tmp_path / "audit.json").read_text())
    assert not document["holds"]
    assert document["reproducers"][0] == "reproducer-0.npz"
    assert {"attack", "recount"} <= {violation["kind"] for violation in document["violations"]}
    with np.load(tmp_path / "reproducer-0.npz", allow_pickle=False) as data:
        assert data["logits_perturbed"].argmax() != data["label"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attacks", "pdg"], "unknown attack 'pdg'; did you mean 'pgd'?"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--eps", "36"], "36 looks like 8-bit units, write 36/255"),
        (["--out", "audit.txt"], "--out must end in .json, got 'audit.txt'"),
        (["--out", "/nowhere/audit.json"], "--out: the folder /nowhere does not exist"),
        (["--data", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, call: Call, finished: Path) -> None:
    code, out, err = call("audit", finished, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lipnext: ")
    assert err.count("\n") == 1
    assert words in err


def test_no_run(call: Call, tmp_path: Path) -> None:
    code, out, err = call("audit", tmp_path)
    assert (code, out) == (2, "")
    assert "the run is not finished or no run at all" in err
