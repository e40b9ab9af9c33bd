import dataclasses
import errno
import gzip
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Call
from PIL import Image
from tiny_runs import DIGITS, log_lines

from lipnext import doctor, runs, systems
from lipnext._version import __version__
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.classifier import Classifier
from lipnext.core.errors import TrainingError, UnsoundError
from lipnext.core.files import sha256_file

KEYS = [
    "n",
    "clean",
    "cra",
    "acr",
    "lipschitz",
    "norm",
    "kind",
    "confidence",
    "abstained",
    "semantics",
    "arithmetic",
    "margin",
    "float_error",
    "model_sha256",
]
SETS = [word for change in DIGITS for word in ("--set", change)]
TRAIN_SETS = [
    "--set",
    "model.width=64",
    "--set",
    "model.patch=8",
    "--set",
    "model.depth=1",
    "--set",
    "train.epochs=1",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    runs.train("digits", folder, overrides=DIGITS)
    return folder


def refused(result: tuple[int, str, str], *words: str, code: int = 2) -> None:
    """One line that names what came, nothing on standard output."""
    got, out, err = result
    assert got == code, err
    assert out == ""
    assert err.startswith("lipnext: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


# ---- what is printed


def test_systems(call: Call) -> None:
    code, out, err = call("systems", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["system"] for row in rows] == systems.list_systems()
    assert rows[0].keys() == {"system", "summary", "reference", "norm", "experiments"}
    code, out, err = call("systems")
    assert (code, err) == (0, "")
    for row in rows:
        assert row["summary"] in out
        for title in row["experiments"]:
            assert f"{row['system']}/{title}: " in out


def test_train_and_certify_print_one_json_document(call: Call, tmp_path: Path) -> None:
    code, out, err = call("train", "digits", "--out", tmp_path / "run", "--json", *SETS)
    assert code == 0
    result = json.loads(out)
    assert list(result)[: len(KEYS)] == KEYS
    assert err.splitlines()[0].startswith("epoch 1/2  loss ")

    code, out, err = call("certify", tmp_path / "run", "--json")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert list(summary) == KEYS
    assert summary == {key: result[key] for key in KEYS}
    assert list(summary["lipschitz"]) == ["bound", "proof"]
    assert all(0 <= share <= 1 for share in [summary["clean"], *summary["cra"].values()])
    assert (summary["norm"], summary["kind"], summary["semantics"]) == ("l2", "deterministic", "real")

    code, out, err = call("certify", tmp_path / "run", "--eps", "1/255, 0.5", "--json")
    assert list(json.loads(out)["cra"]) == ["1/255", "0.5"]


def test_tables_for_people_round_down_what_is_good_and_up_what_is_bad(
    call: Call, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call("certify", finished)
    assert code == 0
    for word in (
        "clean",
        "CRA 36/255",
        "CRA 72/255",
        "CRA 108/255",
        "ACR",
        "l2 deterministic",
        "proved: product",
    ):
        assert word in out
    result = {
        "n": 10000, "clean": 0.8841, "cra": {"1/255": 0.6666}, "acr": 0.12349, "norm": "l2",
        "kind": "deterministic", "semantics": "real", "arithmetic": "float64", "model_sha256": "a" * 64,
        "margin": 0.5, "float_error": 1e-12,
        "lipschitz": {"bound": 1.0000000001, "proof": "product"},
    }  # fmt: skip

    stub_part = types.SimpleNamespace(labels=None)

    class Stub:
        summary = staticmethod(lambda labels, eps: result)
        arithmetic = "float64"

    monkeypatch.setattr(runs, "certify_run", lambda run, data, semantics, arithmetic: (Stub, stub_part))
    _, out, _ = call("certify", finished)
    for word in ("0.8841", "0.6666", "0.1234", "median margin 0.5000, float error 1.0e-12", "1.000000001 "):
        assert word in out
    assert "exceeds most margins" not in out
    result["float_error"] = 0.6
    assert "exceeds most margins; certify with --arithmetic float64" in call("certify", finished)[1]


def test_deployed_certificates(call: Call, finished: Path) -> None:
    real = json.loads(call("certify", finished, "--json")[1])
    found = {}
    for arithmetic in ("float64", "float32"):
        code, out, err = call(
            "certify", finished, "--semantics", "deployed", "--arithmetic", arithmetic, "--json"
        )
        assert (code, err) == (0, "")
        found[arithmetic] = json.loads(out)
        assert (found[arithmetic]["semantics"], found[arithmetic]["arithmetic"]) == ("deployed", arithmetic)
    assert real["acr"] * (1 - 1e-6) < found["float64"]["acr"] < real["acr"]
    assert 0 < found["float32"]["acr"] < found["float64"]["acr"]
    _, out, _ = call("certify", finished, "--semantics", "deployed", "--arithmetic", "float32")
    assert "semantics deployed in float32" in out


def test_a_semantics_that_is_not_known(call: Call, finished: Path) -> None:
    refused(call("certify", finished, "--semantics", "float"), "--semantics must be real or deployed, got")
    refused(call("certify", finished, "--arithmetic", "float32"), "add --semantics deployed")
    refused(
        call("certify", finished, "--semantics", "deployed", "--arithmetic", "bfloat16"),
        "--arithmetic must be float64 or float32, got 'bfloat16'",
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_records_hold_every_sample(call: Call, finished: Path, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"records{suffix}"
    code, out, _ = call("certify", finished, "--records", path, "--json")
    assert code == 0
    lines = path.read_text().splitlines()
    assert len(lines) == json.loads(out)["n"] + (suffix == ".csv")


def test_verify_re_proves_what_certify_wrote(call: Call, finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("flint", reason="python-flint is not installed (extra: verify)")
    images, records = tmp_path / "images.npy", tmp_path / "records.jsonl"
    code, _, _ = call("certify", finished, "--records", records, "--images", images, "--json")
    assert code == 0
    code, out, err = call("verify", finished, "--records", records, "--images", images, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["holds"]
    assert report["radii"]["proved"] == 100
    first, _, rest = records.read_text().partition("\n")
    record = json.loads(first)
    raised = json.dumps({**record, "radius": record["radius"] * 1.01 + 1e-6})
    records.write_text(raised + "\n" + rest)
    code, _, err = call("verify", finished, "--records", records, "--images", images, "--samples", "1000")
    assert code == 1
    assert "is not proved" in err


@pytest.mark.parametrize("healthy", [True, False])
def test_doctor(call: Call, healthy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [doctor.Check("environment", True, "fine"), doctor.Check("train", healthy, "0.9 right")]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    code, out, err = call("doctor", "--json")
    assert (code, err) == (0 if healthy else 1, "")
    assert json.loads(out) == {
        "healthy": healthy,
        "checks": [
            {"name": "environment", "passed": True, "detail": "fine"},
            {"name": "train", "passed": healthy, "detail": "0.9 right"},
        ],
    }
    code, out, err = call("doctor")
    assert (code, err) == (0 if healthy else 1, "")
    assert ("FAILED" in out) is not healthy


def test_the_doctor_finds_this_machine_healthy() -> None:
    torch.set_default_dtype(torch.float32)  # as in a process of its own
    checks = doctor.examine()
    assert [check.name for check in checks] == [
        "environment",
        "train",
        "certify",
        "attack",
        "bound",
        "reload",
    ]
    assert [check for check in checks if not check.passed] == []
    assert all(check.detail for check in checks)


def test_the_doctor_finds_radii_that_are_too_large() -> None:
    network = systems.build_network(systems.experiment("digits"), (1, 8, 8), 10)
    model = Classifier(network.eval(), MarginCertifier, (1, 8, 8), 10, "lipnext")
    images = torch.rand(8, 1, 8, 8)
    honest = model.certify(images)
    assert doctor._attack(model, images, honest)[0]
    unsound = dataclasses.replace(honest, radius=honest.radius + 10)
    passed, detail = doctor._attack(model, images, unsound)
    assert not passed
    assert detail.startswith("8 successes inside a radius; the closest attack needed 0.")


def test_a_check_that_raises_has_failed() -> None:
    def broken() -> tuple[bool, str]:
        raise UnsoundError("TF32 is on")

    assert doctor._check("environment", broken) == doctor.Check("environment", False, "TF32 is on")


def test_the_version_comes_at_once_from_a_real_process() -> None:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lipnext", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"lipnext {__version__}\n"
    assert " torch\n" not in done.stderr, "--version imports torch"
    assert time.perf_counter() - started < 10


# ---- signals, on real processes


def epochs(count: int) -> list[str]:
    """Many short epochs: a signal is to come in the middle, however busy the machine is."""
    sets = [f"train.epochs={count}", "train.evaluate_every=30", "train.checkpoint_every=30"]
    return [*SETS, *(word for change in sets for word in ("--set", change))]


def signalled(folder: Path, number: int, count: int) -> subprocess.Popen[str]:
    """Start a run and send it a signal once the first epoch is in its log."""
    command = [sys.executable, "-m", "lipnext", "train", "digits", "--out", str(folder), *epochs(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    limit = time.monotonic() + 60
    log = folder / "log.jsonl"
    while not (log.is_file() and log.stat().st_size) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(number)
    return process


@pytest.mark.parametrize(
    ("number", "count"),
    [(signal.SIGTERM, 40), pytest.param(signal.SIGINT, 10_000, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    number: int, count: int, call: Call, tmp_path: Path
) -> None:
    process = signalled(tmp_path / "run", number, count)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("interrupted; saved at step ")
    assert 1 <= len(log_lines(tmp_path / "run")) < count
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "model.safetensors").exists()
    if number == signal.SIGINT:
        return  # one of the two is enough to go on with
    torch.set_default_dtype(torch.float32)  # as in a process of its own
    code, _, err = call("train", "digits", "--out", tmp_path / "run", *epochs(count))
    assert code == 0
    assert err.startswith("resumed from step-")
    assert call("train", "digits", "--out", tmp_path / "whole", *epochs(count))[0] == 0
    for name in ("model.safetensors", "config.json", "certificate.json"):
        assert sha256_file(tmp_path / "run" / name) == sha256_file(tmp_path / "whole" / name), name
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "whole")


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 4, "out of memory; lower train.batch_size or certify.batch_size"),
        (OSError(28, "No space left on device"), 4, "No space left on device"),
        (OSError(28, "No space left on device", "x/y"), 4, "x/y: No space left on device"),
        (PermissionError(13, "Permission denied", "z"), 4, "z: Permission denied"),
        (OSError("odd"), 4, "odd"),
        (TrainingError("the disk is full"), 4, "the disk is full"),
        (UnsoundError("not proved"), 3, "not proved"),
    ],
)
def test_every_end_has_its_code_and_its_line(
    error: BaseException, code: int, line: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "train", raising(error))
    assert call("train", "digits", "--out", tmp_path / "run") == (code, "", f"lipnext: {line}\n")


def test_control_c_while_the_data_is_read(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "load_data", raising(KeyboardInterrupt()))
    assert call("train", "digits", "--out", tmp_path / "run") == (130, "", "lipnext: interrupted\n")


def test_a_reader_that_goes_away_is_no_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `lipnext systems | head -1`."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # typer replaces both
    monkeypatch.setattr(sys, "stdout", Closed())
    assert call("systems")[::2] == (1, "")


# ---- bad input: one line, a code, no traceback


def write_idx(folder: Path, train: int = 40, test: int = 10, classes: int = 2) -> Path:
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        pixels = bytes((17 * k) % 256 for k in range(count * 64))
        images = struct.pack(">I3I", 0x803, count, 8, 8) + pixels
        labels = struct.pack(">II", 0x801, count) + bytes(k % classes for k in range(count))
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return folder


def write_pictures(folder: Path, classes: tuple[str, ...]) -> Path:
    for shade, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            Image.new("L", (8, 8), 40 * shade + number).save(folder / name / f"{number}.png")
    return folder


def test_the_helpers_write_data_that_trains(call: Call, tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    for number, data in enumerate(
        (write_idx(tmp_path / "idx"), write_pictures(tmp_path / "pictures", ("cat", "dog")))
    ):
        out = tmp_path / f"run{number}"
        code, text, err = call("train", "digits", "--data", data, "--out", out, "--json", *TRAIN_SETS)
        assert code == 0, err
        assert json.loads(call("certify", out, "--data", data, "--json")[1])["acr"] == json.loads(text)["acr"]


def missing_file(folder: Path) -> Path:
    (write_idx(folder) / "t10k-labels-idx1-ubyte.gz").unlink()
    return folder


def truncated_file(folder: Path) -> Path:
    path = write_idx(folder) / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-5]))
    return folder


def truncated_gzip(folder: Path) -> Path:
    path = write_idx(folder) / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    return folder


def label_out_of_range(folder: Path) -> Path:
    path = write_idx(folder) / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + b"\x07"))
    return folder


def empty_test_set(folder: Path) -> Path:
    return write_idx(folder, test=0)


def one_class(folder: Path) -> Path:
    return write_pictures(folder, ("cat",))


def unreadable_picture(folder: Path) -> Path:
    (write_pictures(folder, ("cat", "dog")) / "dog" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return folder


def nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing_file, ["has no file t10k-labels-idx1-ubyte, plain or .gz; give"]),
        (truncated_file, ["train-images-idx3-ubyte.gz", "truncated", "download it again"]),
        (truncated_gzip, ["train-images-idx3-ubyte.gz", "truncated or damaged", "download it again"]),
        (label_out_of_range, ["test set", "labels must be in 0..1 (2 classes), got 7 at image 9"]),
        (empty_test_set, ["test set", "no image; at least one is needed"]),
        (one_class, ["has one class ('cat'); at least two are needed"]),
        (unreadable_picture, ["dog/3.png", "unreadable picture"]),
        (nothing, ["holds no data set; expected parquet files, IDX files"]),
        (lambda folder: folder, ["does not exist; give a folder with parquet files"]),
    ],
)
def test_bad_data(
    make: Callable[[Path], Path], words: list[str], call: Call, finished: Path, tmp_path: Path
) -> None:
    data, out = make(tmp_path / "data"), tmp_path / "run"
    refused(call("train", "digits", "--data", data, "--out", out, *TRAIN_SETS), *words)
    assert not out.exists(), "a command that failed has taken the folder"
    refused(call("certify", finished, "--data", data), *words)


@pytest.mark.parametrize(
    ("eps", "words"),
    [
        ("0", ["eps must be above 0, got '0'"]),
        ("-1/255", ["eps must be above 0, got '-1/255'"]),
        ("abc", ["eps must be a number such as 36/255 or 0.5, got 'abc'"]),
        ("nan", ["eps must be"]),
        ("1/0", ["eps must be a number such as"]),
        ("", ["eps must be a number such as"]),
        ("36/255,", ["eps must be a number such as"]),
        ("36", ["36 looks like 8-bit units, write 36/255"]),
        ("0.5,1/2", ["eps 1/2 is given twice (0.5); leave one out"]),
    ],
)
def test_bad_eps(eps: str, words: list[str], call: Call, finished: Path) -> None:
    refused(call("certify", finished, "--eps", eps, "--json"), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digitz"], ["unknown experiment 'digitz'; did you mean 'lipnext/digits'?"]),
        (["lipnexd/digits"], ["unknown system 'lipnexd'; did you mean 'lipnext'?"]),
        (["missing.yaml"], ["cannot read the experiment missing.yaml: No such file or directory"]),
        (["digits", "--set", "train.epoch=1"], ["train.epoch: unknown key; did you mean 'epochs'?"]),
        (["digits", "--set", "trian.epochs=1"], ["there is no section 'trian'; did you mean 'train'?"]),
        (["digits", "--set", "model.widht=8"], ["model.widht: unknown key; did you mean 'width'?"]),
        (["digits", "--set", "model.width=1.5"], ["model.width: must be a whole number, got 1.5"]),
        (["digits", "--set", "model.width=wide"], ["model.width: must be a whole number, got 'wide'"]),
        (["digits", "--set", "model.shift=true"], ["model.shift: must be a number, got True"]),
        (
            ["digits", "--set", "model.width=3", "--set", "model.patch=2"],
            ["model.width: 3 channels cannot hold"],
        ),
        (["digits", "--set", "train.epochs=many"], ["train.epochs: must be a whole number, got 'many'"]),
        (["digits", "--set", "certify.eps=36"], ["certify.eps", "36 looks like 8-bit units, write 36/255"]),
        (["digits", "--set", "train.device=tpu"], ["train.device: 'tpu' cannot be used here"]),
        (
            ["digits", "--set", "data.name=digit"],
            ["data.name: unknown source 'digit'; did you mean 'digits'?"],
        ),
        (["digits", "--set", "data.name=parquet"], ["data.path is missing"]),
        (["digits", "--set", "loss.smoothing=0.1", "--set", "loss.annealing=1"], ["cannot be combined"]),
    ],
)
def test_bad_settings(arguments: list[str], words: list[str], call: Call, tmp_path: Path) -> None:
    refused(call("train", *arguments, "--out", tmp_path / "run"), *words)


def test_folders_that_are_not_free(call: Call, finished: Path, tmp_path: Path) -> None:
    refused(
        call("train", "digits", "--out", finished, *SETS),
        "holds this run, finished; see it with lipnext cert",
    )
    refused(
        call("train", "digits", "--out", finished), "holds a run of another experiment; choose another --out"
    )
    (tmp_path / "file").write_text("mine")
    refused(call("train", "digits", "--out", tmp_path / "file"), "is a file; give a folder")
    refused(call("train", "digits", "--out", tmp_path), "is not empty and holds no run; give a new folder")


def test_a_full_disk(call: Call, tmp_path: Path) -> None:
    """A limit on the size of files, as `ulimit -f` sets it, below that of a checkpoint."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        code, out, err = call("train", "digits", "--out", tmp_path / "run", *SETS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (4, "")
    assert err.splitlines()[0].startswith("epoch 1/2 ")
    assert err.splitlines()[1].startswith("lipnext: cannot write checkpoint ")
    assert len(err.splitlines()) == 2
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert call("train", "digits", "--out", tmp_path / "run", *SETS)[0] == 0


def test_a_loss_that_is_not_finite(call: Call, tmp_path: Path) -> None:
    sets = [*SETS, "--set", "optim.euclidean_lr=1e38", "--set", "optim.warmup=0"]
    code, out, err = call("train", "digits", "--out", tmp_path / "run", *sets)
    assert (code, out) == (4, "")
    assert "lower optim.lr or optim.euclidean_lr" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("lipnext: ")


def test_things_that_cannot_be_certified(call: Call, finished: Path, tmp_path: Path) -> None:
    for arguments in ([], [finished, "--model", "model.py:build"]):
        refused(call("certify", *arguments), "give either a run folder or --model file.py:factory")
    refused(call("certify", tmp_path / "missing"), "missing is no folder; give a run folder")
    refused(call("certify", tmp_path), "has no model.safetensors: the run is not finished or no run at all")
    for name in ("records.txt", "records"):
        line = f"--records must end in .jsonl or .csv, got '{name}'"
        refused(call("certify", finished, "--records", name), line)
    refused(call("certify", finished, "--records", tmp_path / "no" / "r.csv"), "does not exist")


def test_data_that_does_not_fit_the_model(call: Call, finished: Path, tmp_path: Path) -> None:
    data = write_idx(tmp_path / "two")
    refused(
        call("certify", finished, "--data", data), "the model knows 10 classes, the data set has 2; certify"
    )
    data = write_pictures(tmp_path / "ten", tuple("0123456789"))
    assert call("certify", finished, "--data", data)[0] == 0
    for path in data.rglob("*.png"):
        Image.new("L", (9, 9)).save(path)
    refused(
        call("certify", finished, "--data", data),
        "images must have the shape (n, 1, 8, 8), got (10, 1, 9, 9)",
    )


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train"], ["verify"], ["train", "digits", "--ot", "x"], ["systems", "--data", "x"]],
)
def test_usage_errors_have_code_two(arguments: list[str], call: Call) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: lipnext" in err
    assert "Traceback" not in err


def test_help_for_every_verb(call: Call) -> None:
    for verb in ([], ["systems"], ["train"], ["certify"], ["doctor"]):
        code, out, err = call(*verb, "--help")
        assert (code, err) == (0, "")
        assert f"Usage: lipnext {' '.join(verb)}".strip() in out
