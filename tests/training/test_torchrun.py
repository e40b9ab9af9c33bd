"""Under the real torchrun: a killed process, a restart, a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import apart, values
from tiny_runs import DIGITS

from lipnext import runs, systems
from lipnext.training.checkpoint import list_checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.dist,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes by /proc"),
]
SETTINGS = [*DIGITS, "train.epochs=12", "train.batch_size=128"]
SECONDS = 120


@contextmanager
def torchrun(out: Path, *options: str, settings: list[str] = SETTINGS) -> Iterator[subprocess.Popen[str]]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *options,
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    job = subprocess.Popen(
        [*launcher, "-m", "lipnext", "train", "digits", "--out", str(out), *words, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield job
    finally:
        job.kill()
        job.communicate()


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.01)


def processes(job: subprocess.Popen[str]) -> list[int]:
    """The training processes that a launcher has started, the first one first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            training = b"lipnext\0train" in (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if parent == job.pid and training:
            found.append(int(folder.name))
    return sorted(found)


def reference(out: Path) -> None:
    runs.train(systems.experiment("digits").override(SETTINGS), out)


def test_a_killed_process_is_noticed_and_torchrun_resumes_by_itself(tmp_path: Path) -> None:
    with torchrun(tmp_path / "killed", "--max-restarts", "1") as job:
        wait_for(lambda: len(list_checkpoints(tmp_path / "killed" / "checkpoints")) == 2, job)
        killed = time.monotonic()
        os.kill(processes(job)[1], signal.SIGKILL)
        wait_for(lambda: len(processes(job)) < 2, job)
        assert time.monotonic() - killed < 60
        out, err = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, err
    assert "lipnext: another process of this job has ended or cannot be reached" in err
    assert "resumed from step-" in err
    result = json.loads(out)
    assert result["processes"] == 2
    values(apart(2, reference, tmp_path / "whole"))
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    for volatile in ("minutes", "images_per_second"):
        result.pop(volatile, None)
        whole.pop(volatile, None)
    assert result == whole  # the weights' hash among others: nothing was lost


@pytest.mark.parametrize("kind", ["whole", "distributed"])
def test_a_signal_saves_and_one_process_goes_on(kind: str, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", [*SETTINGS, f"train.checkpoints={kind}"]
    with torchrun(out, settings=settings) as job:
        wait_for(lambda: bool(list_checkpoints(out / "checkpoints")), job)
        job.send_signal(signal.SIGTERM)
        _, err = job.communicate(timeout=SECONDS)
    (newest,) = list_checkpoints(out / "checkpoints")[-1:]
    step = int(newest.stem[5:])
    assert f"interrupted; saved at step {step}; run the same command again to go on" in err
    assert err.count("interrupted; saved") == 1
    result = runs.train(systems.experiment("digits").override(settings), out)
    assert result["processes"] == 1
    assert result["clean"] > 0.4


def test_no_thread_of_a_group_outlives_it(tmp_path: Path) -> None:
    program = """
import os, pathlib, torch
from lipnext.core.world import join
weight = torch.ones(2, requires_grad=True)
with join("cpu") as world:
    weight.sum().backward()
    torch.optim.AdamW([weight]).step()
    world.add(1.0)
pathlib.Path(f"threads{world.rank}").write_text(
    " ".join(sorted((task / "comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()))
)
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, "program.py"],
        cwd=tmp_path,
        check=True,
        timeout=SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert "gloo" not in (tmp_path / "threads0").read_text()
    assert "gloo" not in (tmp_path / "threads1").read_text()


def test_the_benchmark_prints_one_json_document() -> None:
    root = Path(__file__).resolve().parents[2]
    words = [
        "--json",
        "--width",
        "48",
        "--depth",
        "2",
        "--side",
        "8",
        "--batch",
        "8",
        "--steps",
        "2",
        "--repeats",
        "1",
    ]
    command = [sys.executable, "benchmarks/distributed.py", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=4 * SECONDS)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["speedup"] > 0
    assert document["state_share"]["1"] == 1
    assert 0.5 <= document["state_share"]["2"] <= 0.6
    assert 0.25 <= document["state_share"]["4"] <= 0.35
