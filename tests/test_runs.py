import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CLASSES, DIGITS, MODEL, SHAPE, log_lines, pictures

from lipnext import runs, systems
from lipnext.core.errors import BundleError, ConfigError, DataError, TrainingError
from lipnext.core.experiment import Experiment
from lipnext.core.files import sha256_file
from lipnext.data.dataset import Dataset, Splits
from lipnext.training.loop import Interrupted

FILES = [
    "certificate.json",
    "config.json",
    "experiment.yaml",
    "log.jsonl",
    "model.safetensors",
    "result.json",
]


def digits(*changes: str) -> Experiment:
    return systems.experiment("digits").override([*DIGITS, *changes])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    runs.train(digits(), folder)
    return folder


def splits() -> Splits:
    return Splits(train=pictures(48), validation=pictures(9, seed=1), test=pictures(12, seed=2))


def use(monkeypatch: pytest.MonkeyPatch, data: Splits) -> Experiment:
    monkeypatch.setattr(runs, "load_data", lambda spec: data)
    small = Experiment(system="lipnext", model=MODEL)
    return small.override(["train.epochs=2", "train.batch_size=16"])


# ---- resolving


def test_an_experiment_is_a_name_a_file_or_itself(tmp_path: Path) -> None:
    wanted = systems.experiment("digits").override(["seed=3"])
    wanted.to_yaml(tmp_path / "mine.yaml")
    (tmp_path / "mine").write_text((tmp_path / "mine.yaml").read_text())
    for what in ("lipnext/digits", "digits", systems.experiment("digits")):
        assert runs.resolve(what, None, ["seed=3"]) == wanted
    for name in ("mine.yaml", "mine"):
        assert runs.resolve(str(tmp_path / name)) == wanted


def test_a_data_folder_is_detected_for_every_kind_of_experiment(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    for what in ("digits", digits()):
        spec = runs.resolve(what, str(tmp_path / ".." / tmp_path.name), ["data.seed=2"]).data
        assert (spec.name, spec.path, spec.seed) == ("idx", str(tmp_path), 2)


@pytest.mark.parametrize(
    ("what", "overrides", "message"),
    [
        ("digit", [], r"unknown experiment 'digit'; did you mean 'lipnext/digits'\?"),
        ("lipnexd/digits", [], r"unknown system 'lipnexd'; did you mean 'lipnext'\?"),
        ("missing.yaml", [], r"cannot read the experiment missing.yaml: No such file"),
        ("digits", ["train.epoch=2"], r"train.epoch: unknown key; did you mean 'epochs'\?"),
        ("digits", ["epochs=2"], r"epochs: unknown key; did you mean 'train.epochs'\?"),
        ("digits", ["train.epochs"], r"'train.epochs' sets nothing; write key=value"),
        ("digits", ["train.epochs=0"], r"train.epochs: must be at least 1, got 0"),
        ("digits", ["certify.eps=0"], r"certify.eps: eps must be above 0, got '0'"),
        ("digits", ["train.device=gpu"], r"train.device: 'gpu' cannot be used here"),
    ],
)
def test_what_cannot_be_resolved_is_one_line(what: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        runs.resolve(what, None, overrides)
    assert "\n" not in str(error.value)


# ---- a whole run


def test_a_run_leaves_its_folder_and_its_result(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == sorted([*FILES, "checkpoints"])
    result = json.loads((finished / "result.json").read_text())
    assert list(result)[:14] == [
        "n", "clean", "cra", "acr", "lipschitz", "norm", "kind", "confidence", "abstained", "semantics",
        "arithmetic", "margin", "float_error", "model_sha256",
    ]  # fmt: skip
    assert result["n"] == 359
    assert list(result["cra"]) == ["36/255", "72/255", "108/255"]
    assert result["experiment_digest"] == digits().digest()
    assert Experiment.from_yaml(finished / "experiment.yaml") == digits()
    certificate, test = runs.certify_run(finished)
    assert certificate.clean_accuracy(test.labels) == result["clean"]
    assert certificate.acr(test.labels) == result["acr"]
    assert certificate.model_sha256 == result["model_sha256"]
    assert runs.load(finished).classes == tuple("0123456789")


def test_the_same_run_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    runs.train("digits", tmp_path / "again", overrides=DIGITS)
    for name in ("experiment.yaml", "config.json", "certificate.json", "model.safetensors"):
        assert sha256_file(finished / name) == sha256_file(tmp_path / "again" / name), name
    assert log_lines(finished) == log_lines(tmp_path / "again")


def test_an_interrupted_run_goes_on_under_the_same_call(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    train_network = runs.train_network

    def stopped(*args: Any, **kwargs: Any) -> Any:
        reporter = kwargs["reporter"]
        advance = reporter.advance
        reporter.advance = lambda *a: (advance(*a), os.kill(os.getpid(), signal.SIGTERM))
        return train_network(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "train_network", stopped)
        for _ in range(3):
            with pytest.raises(Interrupted):
                runs.train(digits(), tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    runs.train(digits(), tmp_path / "run")
    for name in ("config.json", "certificate.json", "model.safetensors"):
        assert sha256_file(finished / name) == sha256_file(tmp_path / "run" / name), name
    assert log_lines(finished) == log_lines(tmp_path / "run")


@pytest.mark.parametrize("target", ["model.safetensors", "certificate.json", "result.json"])
def test_a_disk_that_fills_up_at_the_end_costs_no_training(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = use(monkeypatch, splits())
    replace = os.replace

    def full(source: Path, path: Path) -> None:
        if Path(path).name == target:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises((TrainingError, OSError), match="No space left on device"):
            runs.train(experiment, tmp_path / "run")
    assert not (tmp_path / "run" / target).exists()
    before = log_lines(tmp_path / "run")
    assert runs.train(experiment, tmp_path / "run")["n"] == 12
    assert log_lines(tmp_path / "run") == before


# ---- folders that are not free


def test_a_finished_run_and_one_of_another_experiment_are_refused(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    with pytest.raises(
        BundleError, match=r"holds this run, finished; see it with lipnext certify .*digits, or"
    ):
        runs.train(digits(), finished)
    with pytest.raises(BundleError, match=r"holds a run of another experiment; choose another --out, or"):
        runs.train(digits("seed=1"), finished)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_files_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out .*file is a file; give a folder"):
        runs.train(digits(), tmp_path / "file")
    with pytest.raises(ConfigError, match=r"--out .* is not empty and holds no run; give a new folder"):
        runs.train(digits(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(
        TrainingError, match=r"cannot write .*experiment.yaml: Not a directory; choose another"
    ):
        runs.train(digits(), tmp_path / "file" / "run")


@pytest.mark.parametrize("wrong", ["data.name=idx", "model.widht=8", "model.width=8.5", "model.patch=99"])
def test_a_mistyped_setting_does_not_take_the_folder(wrong: str, tmp_path: Path) -> None:
    """Otherwise the corrected command would meet a run of another experiment."""
    with pytest.raises(ConfigError) as error:
        runs.train(digits(wrong), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_does_not_exist_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no loss 'ema'; did you mean 'emma'"):
        runs.train("tiny", tmp_path / "run", overrides=["loss.name=ema"])
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_cannot_be_written_so_are_refused_before_the_folder_is_made(tmp_path):
    cut = ["train.checkpoints=distributed", "train.checkpoint_part=16"]
    with pytest.raises(ConfigError, match="only whole checkpoints are cut into files"):
        runs.train("lipnext/tiny", tmp_path / "run", overrides=cut)
    assert not (tmp_path / "run").exists()


# ---- nothing is tuned on the test part


def test_the_test_part_cannot_change_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = splits()
    experiment = use(monkeypatch, clean)
    first = runs.train(experiment, tmp_path / "clean")
    noise = torch.randint(0, 256, clean.test.images.shape, dtype=torch.uint8)
    spoiled = Dataset(images=noise, labels=(clean.test.labels + 1) % 3, classes=CLASSES)
    use(monkeypatch, Splits(train=clean.train, validation=clean.validation, test=spoiled))
    second = runs.train(experiment, tmp_path / "spoiled")
    for name in ("model.safetensors", "config.json", "certificate.json"):
        assert sha256_file(tmp_path / "clean" / name) == sha256_file(tmp_path / "spoiled" / name), name
    assert log_lines(tmp_path / "clean") == log_lines(tmp_path / "spoiled")
    assert first["acr"] != second["acr"]


def test_the_test_part_is_looked_at_once_and_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = splits()
    seen: list[str] = []

    class Watched(Dataset):
        def float_images(self, indices: Any = slice(None)) -> torch.Tensor:
            seen.extend(p.name for p in (tmp_path / "run").glob("*.json"))
            seen.append("test")
            return super().float_images(indices)

    test = Watched(images=data.test.images, labels=data.test.labels, classes=CLASSES)
    runs.train(
        use(monkeypatch, Splits(train=data.train, validation=data.validation, test=test)), tmp_path / "run"
    )
    assert sorted(seen) == ["certificate.json", "config.json", "test"]


# ---- certifying other data


def certify_on(finished: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(runs, "detect", lambda *_: "idx")
    monkeypatch.setattr(runs, "load_data", lambda spec: Splits(train=data, validation=data, test=data))
    return runs.certify_run(finished, "somewhere")


def test_data_with_other_class_names_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(20) % 10
    named = Dataset(images=images, labels=labels, classes=tuple(f"class {k}" for k in range(10)))
    certificate, _ = certify_on(
        finished, named, monkeypatch
    )  # the model's classes are numbers: no names to differ
    assert len(certificate) == 20
    trained = runs.load_bundle(finished)
    trained.classes = tuple(f"kind {k}" for k in range(10))
    monkeypatch.setattr(runs, "load_bundle", lambda path: trained)
    with pytest.raises(ConfigError, match=r"the model's classes are kind 0, .* the same order"):
        certify_on(finished, named, monkeypatch)


def test_data_of_another_form_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"the model knows 10 classes, the data set has 3; certify on data"):
        certify_on(finished, pictures(), monkeypatch)
    classes = tuple("0123456789")
    small = pictures()
    data = Dataset(images=small.images, labels=small.labels, classes=classes)
    with pytest.raises(DataError, match=r"must have the shape \(n, 1, 8, 8\), got \(24, 1, 4, 4\)"):
        certify_on(finished, data, monkeypatch)
    assert small.shape == SHAPE


def test_data_of_the_same_form_is_certified(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    data = Dataset(images=images, labels=torch.arange(7), classes=tuple("0123456789"))
    certificate, test = certify_on(finished, data, monkeypatch)
    assert len(certificate) == 7
    assert torch.equal(test.labels, data.labels)
