"""Nothing is tuned on the test part: what trains and what chooses cannot see it."""

import ast
import hashlib
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_runs import DIGITS

import lipnext
from lipnext import runs
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import Dataset, Splits, load
from lipnext.training.checkpoint import list_checkpoints, load_checkpoint

ROOT = Path(lipnext.__file__).parent
BENCHMARKS = ROOT.parent / "benchmarks"
TRAINED = ("model.safetensors", "config.json", "certificate.json", "experiment.yaml")
CHANGES = [*DIGITS, "train.ema=0.9", "optim.lookahead=2", "train.checkpoint_every=1"]


class Locked:
    """A test part that shows its shape and classes, and nothing else before `key` exists."""

    def __init__(self, test: Dataset, key: Path) -> None:
        self._test, self._key = test, key
        self.shape, self.classes = test.shape, test.classes
        self.looked = 0

    def _open(self) -> Dataset:
        assert self._key.is_file(), "the test part was looked at before the weights were final"
        self.looked += 1
        return self._test

    @property
    def labels(self) -> torch.Tensor:
        return self._open().labels

    @property
    def images(self) -> torch.Tensor:
        return self._open().images

    def __len__(self) -> int:
        return len(self._open())

    def subset(self, indices: torch.Tensor) -> Dataset:
        return self._open().subset(indices)

    def order(self, rng: torch.Generator) -> torch.Tensor:
        return self._open().order(rng)

    def float_images(self, indices: Any = slice(None)) -> torch.Tensor:
        return self._open().float_images(indices)

    def sha256(self) -> str:
        return self._open().sha256()


def garbage(test: Dataset) -> Dataset:
    rng = torch.Generator().manual_seed(9)
    return Dataset(
        images=torch.randint(256, (7, *test.shape), generator=rng, dtype=torch.uint8),
        labels=torch.zeros(7, dtype=torch.int64),
        classes=test.classes,
    )


def with_test(change: Any) -> Any:
    """`load`, but for what it says about the test part."""

    def changed(spec: DataSpec) -> Splits:
        splits = load(spec)
        return Splits(train=splits.train, validation=splits.validation, test=change(splits.test))

    return changed


def trained(folder: Path) -> dict[str, Any]:
    """Everything that a training leaves, without the times it took."""
    found: dict[str, Any] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in TRAINED
    }
    digest = runs.load_experiment(folder).digest()
    for path in list_checkpoints(folder / "checkpoints"):
        state = load_checkpoint(path, digest)
        del state["progress"]["seconds"]
        found[path.name] = repr(_hashed(state))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found["log"] = [{key: value for key, value in line.items() if key != "seconds"} for line in log]
    return found


def _hashed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest()
    if isinstance(value, dict):
        return {key: _hashed(item) for key, item in value.items()}
    return [_hashed(item) for item in value] if isinstance(value, list | tuple) else value


def test_another_test_part_gives_the_same_weights_logs_and_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    results = {}
    for name, change in (("true", lambda test: test), ("garbage", garbage)):
        monkeypatch.setattr(runs, "load_data", with_test(change))
        results[name] = runs.train("digits", tmp_path / name, overrides=CHANGES)
    assert results["true"]["clean"] != results["garbage"]["clean"]
    assert trained(tmp_path / "true") == trained(tmp_path / "garbage")
    assert len(list_checkpoints(tmp_path / "true" / "checkpoints")) == 2


def test_the_test_part_is_closed_until_the_weights_are_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    locks: list[Locked] = []

    def lock(test: Dataset) -> Locked:
        locks.append(Locked(test, tmp_path / "run" / "model.safetensors"))
        return locks[-1]

    monkeypatch.setattr(runs, "load_data", with_test(lock))
    result = runs.train("digits", tmp_path / "run", overrides=CHANGES)
    assert len(locks) == 1
    assert locks[0].looked > 0
    assert 0 <= result["clean"] <= 1


def test_nothing_that_trains_or_chooses_names_a_test_part() -> None:
    """Only a `Splits` has one, and only `runs`, the comparison and tools for finished runs ask it for its own."""
    for package in ("training", "optim", "nn", "systems", "losses.py", "manifold"):
        place = ROOT / package
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = isinstance(node, ast.Attribute) and node.attr == "test"
                assert not named, (
                    f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} asks for a test part"
                )


# ---- benchmarks that choose settings


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are in the repository, not in an installed package")
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def get(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return get


def test_an_ablation_trains_without_the_test_part_and_ranks_by_validation(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    ablations = benchmark("ablations")
    never = tmp_path / "never"
    monkeypatch.setattr("lipnext.data.dataset.load", with_test(lambda test: Locked(test, never)))
    monkeypatch.setattr(runs, "resolve", lambda base, data, options: _resolved(base, options))
    options = dict(change.split("=") for change in DIGITS)
    threads = torch.get_num_threads()
    ablations.train("digits", "unused", str(tmp_path), options)
    torch.set_num_threads(threads)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {key for line in log for key in line} == {
        "step", "event", "epoch", "loss", "drift", "rate", "radius", "temperature", "seconds",
        "validation_estimate",
    }  # fmt: skip
    line = ablations.summary("base", log)
    last = log[-1]["validation_estimate"]
    assert f"clean {last['clean']:.4f}" in line
    assert f"ACR {last['acr']:.4f}" in line


_real_resolve = runs.resolve


def _resolved(base: str, options: list[str]) -> Any:
    return _real_resolve(base, None, options)


def test_the_optimisers_are_tuned_by_validation_alone(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizers = benchmark("optimizers")

    def found(test: float) -> Any:
        """Validation prefers small rates; the test figures, where they are given a sign, anything else."""

        def run(base: str, data: str, name: str, lr: float, seed: int, epochs: int, folder: Path) -> Any:
            figures = {"clean": test * lr, "cra": {"36/255": test * lr}, "acr": test * lr}
            return {"optimizer": name, "lr": lr, **figures, "validation": [{"acr": 9.0}, {"acr": 1 / lr}]}

        return run

    epochs = {"adam": 2, "muon": 1}
    documents = []
    for test in (1.0, -1.0):
        monkeypatch.setattr(optimizers, "run", found(test))
        with ThreadPoolExecutor(1) as pool:
            documents.append(optimizers.compare("digits", "unused", epochs, tmp_path, pool))
    assert documents[0]["chosen"] == documents[1]["chosen"]
    assert documents[0]["chosen"] == {name: min(rates) for name, rates in optimizers.GRID.items()}
    assert documents[0]["tuning"] == documents[1]["tuning"]
    assert all(not {"clean", "cra", "acr"} & trial.keys() for trial in documents[0]["tuning"])


def test_the_dial_of_temperature_and_ramp_keeps_no_test_figure(benchmark: Any) -> None:
    trials = benchmark("trials")
    kept = trials.without_test({"clean": 1, "cra": {}, "acr": 2, "validation": [], "seed": 0})
    assert kept == {"validation": [], "seed": 0}
    source = (BENCHMARKS / "temperature.py").read_text(encoding="utf-8")
    assert "**without_test(found)" in source
    assert source.count("found") == 2  # what a trial found goes nowhere else
