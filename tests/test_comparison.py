import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lipnext import comparison, runs
from lipnext.comparison import Run, compare, epoch_seconds, tabulate
from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.eps import parse_eps_list
from lipnext.core.errors import ConfigError
from lipnext.data.dataset import Dataset
from tests.helpers import Call

EPS = parse_eps_list("36/255,1/2")


def part(n: int = 200) -> Dataset:
    return Dataset(
        images=torch.zeros(n, 1, 2, 2, dtype=torch.uint8),
        labels=torch.zeros(n, dtype=torch.int64),
        classes=("a", "b"),
    )


def certificate(radius: Tensor, label: Tensor, norm: float = 2.0) -> Certificate:
    return Certificate(
        label=label,
        radius=radius.double(),
        margin=radius.double(),
        slack=torch.zeros(len(radius), dtype=torch.float64),
        norm=norm,
        kind="deterministic",
        confidence=1.0,
        semantics="real",
        lipschitz=LipschitzBound(value=2.0, norm=norm, proof="product"),
        model_sha256="0" * 64,
    )


def made_up(name: str, shift: float, seed: int = 0, published: float | None = None) -> Run:
    generator = torch.Generator().manual_seed(seed)
    radius = (torch.rand(200, generator=generator) + shift).clamp_min(0)
    label = (torch.rand(200, generator=generator) < 0.1).long()
    return Run(
        name=name,
        seed=seed,
        facts={"parameters": 1},
        certificate=certificate(radius, label),
        published=published,
    )


def test_a_row_holds_the_means_over_its_seeds() -> None:
    found = [made_up("a", 0.0, 0), made_up("a", 0.0, 1), made_up("b", 0.1, 2)]
    rows = {row["name"]: row for row in tabulate(found, part(), EPS)["rows"]}
    assert list(rows) == ["a", "b"]
    assert rows["a"]["seeds"] == [0, 1]
    pair = [run.certificate.summary(part().labels, EPS) for run in found[:2]]
    assert rows["a"]["clean"] == pytest.approx(np.mean([p["clean"] for p in pair]), abs=1e-15)
    assert rows["a"]["acr"] == pytest.approx(np.mean([p["acr"] for p in pair]), abs=1e-12)
    for text in EPS:
        assert rows["a"]["cra"][text] == pytest.approx(np.mean([p["cra"][text] for p in pair]), abs=1e-15)
    assert rows["b"]["curve"]["accuracy"][0] == pytest.approx(rows["b"]["clean"], abs=1e-15)


def test_intervals_hold_the_value_and_have_the_width_of_a_binomial() -> None:
    row = tabulate([made_up("a", 0.0)], part(), EPS)["rows"][0]
    low, high = row["interval"]["36/255"]
    share = row["cra"]["36/255"]
    assert low < share < high
    # Half the width of a 95 % interval is 1.96 standard errors; 1,000 resamples find it within a tenth.
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(share * (1 - share) / 200), rel=0.15)


def test_differences_are_paired() -> None:
    """Two models that are right on the same images differ for certain, however wide the interval of each is."""
    one = made_up("a", 0.0)
    better = replace(
        one, name="b", certificate=certificate(one.certificate.radius + 0.3, one.certificate.label)
    )
    first, second = tabulate([one, better], part(), EPS)["rows"]
    assert first["difference"]["acr"] == (0.0, 0.0)
    low, high = second["difference"]["acr"]
    assert 0.2 < low < high < 0.31
    assert high - low < second["interval"]["acr"][1] - second["interval"]["acr"][0]


def test_a_published_constant_that_is_too_small_certifies_more() -> None:
    row = tabulate([made_up("a", 0.0, published=0.5)], part(), EPS)["rows"][0]
    halved = parse_eps_list("18/255,1/4")
    right = made_up("a", 0.0).certificate
    wanted = [right.accuracy_at(value, part().labels) for value in halved.values()]
    assert list(row["cra_published"].values()) == pytest.approx(wanted, abs=0.0051)  # radii on the boundary
    assert tabulate([made_up("a", 0.0)], part(), EPS)["rows"][0]["cra_published"] is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"norm": np.inf}, "norm"),
        ({"kind": "probabilistic", "confidence": 0.999}, "kind"),
        ({"semantics": "deployed"}, "semantics"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, object], word: str) -> None:
    other = made_up("b", 0.0)
    bound = LipschitzBound(value=2.0, norm=float(changes.get("norm", 2.0)), proof="product")
    spoilt = replace(other, certificate=replace(other.certificate, lipschitz=bound, **changes))
    with pytest.raises(
        ConfigError, match=rf"a is certified with {word} .* and b with .*; radii of another {word}"
    ):
        tabulate([made_up("a", 0.0), spoilt], part(), EPS)


@pytest.mark.slow
def test_experiments_are_trained_certified_and_found_again(tmp_path: Path, call: Call) -> None:
    words = [
        "compare",
        "lipnext/tiny",
        "cll/tiny",
        "--epochs",
        "1",
        "--seeds",
        "2",
        "--folder",
        str(tmp_path),
    ]
    code, text, _ = call(
        *words, "--attacked", "3", "--out", str(tmp_path / "t.json"), "--figure", str(tmp_path / "f.svg")
    )
    assert code == 0
    assert "nearest neighbour" in text
    document = json.loads((tmp_path / "t.json").read_text())
    (table,) = document["tables"]
    assert [row["name"] for row in table["rows"]] == ["lipnext/tiny", "cll/tiny", "nearest neighbour"]
    assert "<svg" in (tmp_path / "f.svg").read_text()
    for row in table["rows"][:2]:
        run = tmp_path / f"{row['name'].replace('/', '-')}-seed0"
        result = json.loads((run / runs.RESULT).read_text())
        assert result["epochs"] == 1
        assert row["seeds"] == [0, 1]
        assert row["attacked"]["violations"] == 0
        assert row["attacked"]["n"] == 3
    lipnext, cll, _ = table["rows"]
    assert "published" not in lipnext
    assert lipnext["cra_published"] is None
    assert 0 < cll["published"]["constant"] <= cll["lipschitz"]["bound"] * (1 + 1e-6)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    again = sorted(str(path.parent) for path in stamps)
    code, text, _ = call("compare", *again, "--no-nearest-neighbour", "--json")
    assert code == 0
    (table,) = json.loads(text)["tables"]
    assert {tuple(row["seeds"]) for row in table["rows"]} == {(0, 1)}
    assert len(table["rows"]) == 2
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    with pytest.raises(ConfigError, match="holds a run of another experiment; choose another --folder"):
        compare(["lipnext/tiny"], epochs=1, folder=tmp_path, overrides=["optim.lr=0.1"])


def test_each_norm_has_its_table_and_one_norm_only_on_request(tmp_path: Path, call: Call) -> None:
    words = [
        "compare",
        "cll/tiny",
        "nemon/tiny",
        "--epochs",
        "1",
        "--folder",
        str(tmp_path),
        "--images",
        "20",
    ]
    code, text, _ = call(*words, "--json")
    assert code == 0
    document = json.loads(text)
    found = [(t["norm"], [row["name"] for row in t["rows"]]) for t in document["tables"]]
    assert found == [("l2", ["cll/tiny", "nearest neighbour"]), ("linf", ["nemon/tiny"])]
    assert document["n"] == 20
    code, text, _ = call(*words, "--norm", "linf", "--json")
    (table,) = json.loads(text)["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    assert table["norm"] == "linf"
    assert {name: row["converted"] for name, row in rows.items()} == {
        "cll/tiny": True,
        "nemon/tiny": False,
        "nearest neighbour": True,
    }
    before = document["tables"][0]["rows"][0]
    assert rows["cll/tiny"]["acr"] == pytest.approx(before["acr"] / 8, rel=1e-12)  # 64 pixels
    assert rows["nemon/tiny"]["acr"] == document["tables"][1]["rows"][0]["acr"]
    code, text, _ = call(*words, "--norm", "l2")
    assert "converted from another norm: nemon/tiny" in text
    code, _, error = call(*words, "--figure", str(tmp_path / "f.svg"))
    assert code == 2
    assert "radii of another norm cannot be compared, draw them apart" in error


def test_as_many_images_as_the_runs_certify_unless_a_number_is_asked_for(tmp_path: Path) -> None:
    few = compare(["cll/tiny"], epochs=1, folder=tmp_path, overrides=["certify.images=15"])
    assert few["n"] == 15
    (folder,) = tmp_path.iterdir()
    assert compare([str(folder)], images=20)["n"] == 20


def test_a_time_budget_becomes_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < epoch_seconds(runs.resolve("cll/tiny")) < 60
    monkeypatch.setattr(comparison, "epoch_seconds", lambda experiment: 2.9)
    document = compare(["cll/tiny"], minutes=0.1, folder=tmp_path, nearest_neighbour=False)
    assert document["tables"][0]["rows"][0]["epochs"] == 2


def test_runs_of_other_data_or_splits_are_refused(tmp_path: Path) -> None:
    compare(["cll/tiny"], epochs=1, folder=tmp_path / "a", nearest_neighbour=False)
    compare(["cll/tiny"], epochs=1, folder=tmp_path / "b", overrides=["data.seed=1"], nearest_neighbour=False)
    folders = [str(tmp_path / name / "cll-tiny-seed0") for name in "ab"]
    with pytest.raises(
        ConfigError, match=r"has another test part than .*; compare runs of the same data and split"
    ):
        compare(folders)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lipnext/tniy"], "unknown experiment"),
        (["cll/tiny", "--minutes", "1", "--epochs", "1"], "--minutes or --epochs, not both"),
        (["cll/tiny", "--minutes", "0"], "--minutes must be above 0, got 0"),
        (["cll/tiny", "--seeds", "0"], "seeds and images must be at least 1"),
        (["cll/tiny", "--images", "0"], "seeds and images must be at least 1"),
        (
            ["cll/tiny", "--norm", "l3"],
            "--norm must be l2 or linf, got 'l3'; leave it out to keep every radius",
        ),
        (["cll/tiny", "--out", "t.txt"], "--out must end in .json, got 't.txt'"),
        (["cll/tiny", "--figure", "no/such/f.svg"], "--figure: the folder"),
        (["cll/tiny", "--eps", "36"], "eps"),
    ],
)
def test_a_wrong_command_is_one_line(words: list[str], message: str, call: Call) -> None:
    code, _, error = call("compare", *words)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
