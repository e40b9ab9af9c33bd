"""Experiments are validated in one line, round-trip through YAML and have a stable digest."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lipnext.core.errors import ConfigError
from lipnext.core.experiment import (
    AugmentSpec,
    CertifySpec,
    DataSpec,
    Experiment,
    LossSpec,
    OptimSpec,
    TrainSpec,
)

PLAIN = Experiment(system="lipnext")


def rich() -> Experiment:
    return Experiment(
        system="lipnext",
        preset="digits",
        summary="1 minute, 2 cores: ü",
        seed=3,
        model={"width": 64, "beta": 0.5, "shared": True, "stem": "1e-3"},
        data=DataSpec(name="folder", path="a: b", size=32, channels=3),
        augment=AugmentSpec(flip=True, crop=4),
        train=TrainSpec(epochs=3, threads=2),
        optim=OptimSpec(lr=1e-5, betas=(0.5, 0.75)),
        loss=LossSpec(radius="0.10", temperature_end=0.25),
        certify=CertifySpec(eps=("0.10", "36/255")),
    )


def test_yaml_round_trip_keeps_values_types_and_digest(tmp_path: Path) -> None:
    for experiment in (PLAIN, rich()):
        experiment.to_yaml(tmp_path / "e.yaml")
        read = Experiment.from_yaml(tmp_path / "e.yaml")
        assert read == experiment
        assert read.digest() == experiment.digest()
        assert [type(v) for v in read.model.values()] == [type(v) for v in experiment.model.values()]


@given(st.floats(min_value=1e-300, max_value=1e300), st.integers(0, 2**32 - 1))
def test_round_trip_of_numbers(lr: float, seed: int) -> None:
    experiment = PLAIN.override([f"optim.lr={lr!r}", f"seed={seed}"])
    assert experiment.optim.lr == lr
    assert experiment.seed == seed


@pytest.mark.slow
def test_digest_is_the_same_in_another_process_and_sees_every_change() -> None:
    code = "from lipnext.core.experiment import Experiment as E; print(E(system='lipnext').digest())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == PLAIN.digest()
    changes = [
        "seed=1",
        "train.epochs=11",
        "model.width=1",
        "model.width=1.0",
        "loss.radius=0.5",
        "data.path=x",
    ]
    assert (
        len({PLAIN.override([change]).digest() for change in changes} | {PLAIN.digest()}) == len(changes) + 1
    )


def test_every_default_is_valid_when_written_out() -> None:
    assert Experiment.model_validate(PLAIN.model_dump()) == PLAIN


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("train.epochs=2", lambda e: e.train.epochs, 2),
        ("optim.lr=1e-3", lambda e: e.optim.lr, 1e-3),
        ("optim.lr=1", lambda e: e.optim.lr, 1.0),
        ("optim.betas=[0.8, 0.9]", lambda e: e.optim.betas, (0.8, 0.9)),
        ("certify.eps=36/255, 0.5", lambda e: e.certify.eps, ("36/255", "0.5")),
        ("certify.eps=0.5", lambda e: e.certify.eps, ("0.5",)),
        ("loss.radius=0.10", lambda e: e.loss.radius, "0.10"),
        ("loss.temperature_end=null", lambda e: e.loss.temperature_end, None),
        ("data.path=007", lambda e: e.data.path, "007"),
        ("data.path=a=b", lambda e: e.data.path, "a=b"),
        ("data.path=null", lambda e: e.data.path, None),
        ("data.channels=3", lambda e: e.data.channels, 3),
        ("augment.flip=true", lambda e: e.augment.flip, True),
        ("train.precision=auto", lambda e: e.train.precision, "auto"),
        ("model.lr=1e-3", lambda e: e.model["lr"], 1e-3),
        ("model.width=64", lambda e: e.model["width"], 64),
        (" seed = 5 ", lambda e: e.seed, 5),
    ],
)
def test_overrides_are_typed(assignment: str, read: Callable[[Experiment], object], value: object) -> None:
    result = read(PLAIN.override([assignment]))
    assert result == value
    assert type(result) is type(value)


def test_override_leaves_the_original_and_applies_in_order() -> None:
    assert PLAIN.override(["train.epochs=2", "train.epochs=3"]).train.epochs == 3
    assert PLAIN.train.epochs == 10
    base = rich()
    base.override(["model.width=1"])
    assert base.model["width"] == 64


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epochs=0", "train.epochs: must be at least 1, got 0"),
        ("train.epochs=abc", "train.epochs: must be a whole number, got 'abc'"),
        ("train.epochs=1.5", "train.epochs: must be a whole number, got 1.5"),
        ("train.epochs=true", "train.epochs: must be a whole number, got True"),
        ("augment.flip=1", "augment.flip: must be true or false, got 1"),
        ("train.ema=1", "train.ema: must be below 1.0, got 1"),
        ("optim.lr=0", "optim.lr: must be above 0.0, got 0"),
        ("optim.lr=.inf", "optim.lr: must be a finite number, got inf"),
        ("optim.warmup=2", "optim.warmup: must be at most 1.0, got 2"),
        ("optim.betas=[0.9, 1.5]", "optim.betas: must be below 1.0, got 1.5"),
        ("optim.name=sgd", "optim.name: must be one of 'adam' or 'muon', got 'sgd'"),
        ("data.validation=0", "data.validation: must be above 0.0, got 0"),
        ("data.channels=2", "data.channels: must be one of 1 or 3, got 2"),
        ("augment.randaugment_magnitude=31", "augment.randaugment_magnitude: must be at most 30, got 31"),
        ("seed=-1", "seed: must be at least 0, got -1"),
        ("model.x=[1]", "model.x: must be true or false, a number or text, got [1]"),
        (
            "loss.radius=36",
            "loss.radius: eps is in pixel units of images in [0, 1], at most 10; 36 looks like",
        ),
        ("certify.eps=abc", "certify.eps: eps must be a number such as 36/255 or 0.5, got 'abc'"),
        ("certify.eps=0", "certify.eps: eps must be above 0, got '0'"),
        (
            "train.epoch=2",
            "train.epoch: unknown key; did you mean 'epochs'? known: accumulate, activations",
        ),
        ("epochs=2", "epochs: unknown key; did you mean 'train.epochs'?"),
        ("sede=2", "sede: unknown key; did you mean 'seed'? known: augment, certify, data"),
        ("trian.epochs=2", "trian.epochs: there is no section 'trian'; did you mean 'train'? known: augment"),
        ("train=2", "train is a section; write train.KEY=value"),
        ("model.=2", "model: name the key to set, such as model.width=64"),
        ("train.epochs", "'train.epochs' sets nothing; write key=value, such as train.epochs=2"),
    ],
)
def test_bad_overrides_say_what_is_wrong(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PLAIN.override([assignment])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainSpec(epochs=0), "train.epochs: must be at least 1, got 0"),
        (lambda: TrainSpec(epoch=1), "train.epoch: unknown key; did you mean 'epochs'?"),
        (lambda: LossSpec(radius="0"), "loss.radius: eps must be above 0, got '0'"),
        (lambda: Experiment(), "system: is required"),
        (lambda: Experiment(system=3), "system: must be text, got 3"),
        (lambda: Experiment(system="x", train=3), "train: must be a section of 'key: value' lines, got 3"),
    ],
)
def test_constructors_raise_the_same_errors(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"system: [", "e.yaml is not YAML: "),
        (b"- 1", "e.yaml must hold lines such as 'system: lipnext', got [1]"),
        (b"", "e.yaml must hold lines such as 'system: lipnext', got None"),
        (b"\xff\xfe", "e.yaml: it is not UTF-8 text"),
        (b"system: x\ntrain: {epocs: 2}", "train.epocs: unknown key; did you mean 'epochs'?"),
        (b"system: x\ntrain:", "train: must be a section of 'key: value' lines, got None"),
        (
            b"system: !!python/object/apply:os.getcwd []",
            "e.yaml is not YAML: could not determine a constructor",
        ),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "e.yaml").write_bytes(text)
    with pytest.raises(ConfigError) as error:
        Experiment.from_yaml(tmp_path / "e.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the experiment .*none\.yaml: No such file"):
        Experiment.from_yaml(tmp_path / "none.yaml")


def test_numbers_in_files_are_read_as_meant(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(
        "system: x\noptim: {lr: 1e-3}\nloss: {radius: 0.5}\ncertify: {eps: [36/255, 1]}\nmodel: {a: 2E4}\n"
    )
    read = Experiment.from_yaml(tmp_path / "e.yaml")
    assert (read.optim.lr, read.loss.radius, read.certify.eps, read.model["a"]) == (
        1e-3,
        "0.5",
        ("36/255", "1"),
        2e4,
    )


def test_experiments_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PLAIN.train.epochs = 3  # type: ignore[misc]
