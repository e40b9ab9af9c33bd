"""Checkpoints that all processes write in the background: the same training, whoever goes on, whatever happens to the disk."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from processes import together, values
from tiny_runs import (
    SAME,
    SHAPE,
    assert_same_run,
    difference,
    experiment,
    nested_state,
    newest_state,
    pictures,
    read_checkpoint,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from lipnext.core.errors import BundleError, ConfigError, TrainingError
from lipnext.core.experiment import Experiment
from lipnext.core.world import World
from lipnext.optim.owner import Owners
from lipnext.systems import build_network
from lipnext.training import distributed_checkpoint
from lipnext.training.checkpoint import list_checkpoints
from lipnext.training.distributed_checkpoint import BackgroundSave, open_checkpoint
from lipnext.training.loop import Interrupted, train
from lipnext.training.progress import Silent

PER_EPOCH, STEPS = 3, 9
DIGEST = "d" * 64


def background(*changes: str) -> Experiment:
    return experiment("train.checkpoints=distributed", *changes)


WHAT = background("optim.clip=0.5", "train.precision=float64")


class At(Silent):
    """Does something to this process after the steps of these numbers, counted from where it starts."""

    def __init__(self, acts: dict[int, Callable[[], Any]]) -> None:
        self.acts, self.steps = acts, 0
        self.lines: list[str] = []

    def advance(self, count: int, note: str = "") -> None:
        self.steps += count
        self.acts.get(self.steps, lambda: None)()

    def line(self, text: str) -> None:
        self.lines.append(text)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def run(world: World, folder: Path, what: Experiment, reporter: Silent | None = None) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    network, _ = train(
        build_network(what, SHAPE, 3),
        what,
        pictures(),
        pictures(7, seed=1),
        folder,
        reporter=reporter,
        world=world,
    )
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def stop(world: World, folder: Path, what: Experiment, step: int) -> int:
    """The last process gets a signal after `step` steps."""
    reporter = At({step: kill(signal.SIGTERM)}) if world.rank == world.size - 1 else None
    with pytest.raises(Interrupted) as error:
        run(world, folder, what, reporter)
    return int(str(error.value.code))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---- the same training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["muon", "adam"])
def test_interrupting_at_every_step_changes_no_bit(name: str, tmp_path: Path) -> None:
    whole = experiment(f"optim.name={name}")
    (reference,) = together(1, run, tmp_path / "whole", whole)
    what = background(f"optim.name={name}")
    for step in range(1, STEPS + 1):
        assert together(1, stop, tmp_path / "run", what, 1) == [143]
        assert newest_state(tmp_path / "run", what)["progress"]["step"] == step
    (weights,) = together(1, run, tmp_path / "run", what)
    assert difference(reference, weights) == 0
    assert difference(newest_state(tmp_path / "whole", whole), newest_state(tmp_path / "run", what)) == 0
    assert names(tmp_path / "run") == ["step-000000008", "step-000000009"]


@pytest.mark.dist
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_as_if_nothing_had_happened(
    before: int, after: int, tmp_path: Path
) -> None:
    (reference,) = values(together(1, run, tmp_path / "whole", WHAT))
    for size in (before, after):
        assert values(together(size, stop, tmp_path / "run", WHAT, 2)) == [143] * size
    assert newest_state(tmp_path / "run", WHAT)["progress"]["step"] == 4
    for weights in values(together(before, run, tmp_path / "run", WHAT)):
        assert difference(reference, weights) < SAME
    assert_same_run(tmp_path / "whole", tmp_path / "run", WHAT)


def test_a_run_without_averaging_and_lookahead_resumes_too(tmp_path: Path) -> None:
    what = background("train.ema=0", "optim.lookahead=0", "optim.euclidean=sgd")
    (reference,) = together(1, run, tmp_path / "whole", what)
    assert together(1, stop, tmp_path / "run", what, 5) == [143]
    assert difference(reference, together(1, run, tmp_path / "run", what)[0]) == 0


# ---- who writes what --------------------------------------------------------------------------------------


def owned(world: World, folder: Path) -> list[str]:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("nothing is gathered")

    Owners.gather = refuse  # type: ignore[method-assign]
    run(world, folder, WHAT)
    return Owners(build_network(WHAT, SHAPE, 3), world).mine(
        dict(build_network(WHAT, SHAPE, 3).named_parameters())
    )


@pytest.mark.dist
def test_each_process_writes_what_it_owns_and_no_file_is_a_pickle(tmp_path: Path) -> None:
    mine = values(together(2, owned, tmp_path / "run"))
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    files = [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert sorted(file.name for file in path.iterdir()) == [*files, "state.json"]
    held = [safetensors.torch.load((path / file).read_bytes()) for file in files]
    assert not held[0].keys() & held[1].keys()
    for rank in (0, 1):
        assert mine[rank]
        for part in ("network/held", "average/average"):
            found = {name.removeprefix(f"/{part}/") for name in held[rank] if name.startswith(f"/{part}/")}
            assert found & {*mine[0], *mine[1]} == set(mine[rank]), part
    json.loads((path / "state.json").read_text())
    # what torch itself reads back
    everything = held[0] | held[1]
    read_back = {name: torch.zeros_like(tensor) for name, tensor in everything.items()}
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.load(read_back, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    assert difference(read_back, everything) == 0


# ---- while training goes on -------------------------------------------------------------------------------


def slow_writer(world: World, folder: Path, steps: int) -> list[str]:
    """The first checkpoint is not written before `steps` more steps are done; return what was there at that moment."""
    done, seen = threading.Event(), []
    write = distributed_checkpoint._Writer.write_data

    def wait(self: Any, *arguments: Any) -> Any:
        assert done.wait(20), "training waits for the checkpoint"
        return write(self, *arguments)

    def act() -> None:
        if (folder / "checkpoints").is_dir():  # the writer may not have got as far
            seen.extend(names(folder))
        distributed_checkpoint._Writer.write_data = write  # type: ignore[method-assign]
        done.set()

    distributed_checkpoint._Writer.write_data = wait  # type: ignore[method-assign]
    try:
        run(world, folder, WHAT.override(["train.keep=9"]), At({PER_EPOCH + steps: act}))
    finally:
        distributed_checkpoint._Writer.write_data = write  # type: ignore[method-assign]
    return seen


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2])
def test_training_goes_on_and_the_checkpoint_is_of_the_moment_it_was_begun(size: int, tmp_path: Path) -> None:
    for seen in values(together(size, slow_writer, tmp_path / "run", 2)):
        assert seen in ([], ["step-000000003.draft"])
    assert names(tmp_path / "run") == [f"step-00000000{step}" for step in (3, 6, 9)]
    what = experiment("optim.clip=0.5", "train.precision=float64", "train.keep=9")
    together(1, run, tmp_path / "whole", what)
    paths = [list_checkpoints(tmp_path / name / "checkpoints") for name in ("run", "whole")]
    for path, other in zip(*paths, strict=True):
        state, reference = (
            read_checkpoint(path, WHAT.override(["train.keep=9"]).digest()),
            read_checkpoint(other, what.digest()),
        )
        del state["progress"]["seconds"], reference["progress"]["seconds"]
        assert difference(state, reference) < SAME


def test_one_is_under_way_at_a_time_and_a_signal_waits_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = [0], [0]
    finish = distributed_checkpoint._Writer.finish

    def slow(self: Any, metadata: Any, results: Any) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.3)
        finish(self, metadata, results)
        running[0] -= 1

    monkeypatch.setattr(distributed_checkpoint._Writer, "finish", slow)
    reporter = At({4: kill(signal.SIGTERM)})  # the checkpoint of step 3 is under way
    with pytest.raises(Interrupted):
        run(World(), tmp_path / "run", WHAT, reporter)
    assert names(tmp_path / "run") == ["step-000000003", "step-000000004"]
    assert reporter.lines[-1].startswith("interrupted; saved at step 4;")
    assert most == [1]
    run(World(), tmp_path / "run", WHAT)
    assert names(tmp_path / "run") == ["step-000000006", "step-000000009"]


def test_a_loss_that_is_not_finite_names_the_checkpoint_that_was_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = distributed_checkpoint._Writer.finish

    def slow(self: Any, metadata: Any, results: Any) -> None:
        time.sleep(0.5)
        finish(self, metadata, results)

    monkeypatch.setattr(distributed_checkpoint._Writer, "finish", slow)
    network = build_network(WHAT, SHAPE, 3)

    def spoil() -> None:
        with torch.no_grad():
            next(network.parameters()).fill_(torch.nan)

    (tmp_path / "run").mkdir()
    kept = tmp_path / "run" / "checkpoints" / "step-000000003"
    with pytest.raises(TrainingError, match=rf"the last good checkpoint is {kept};"):
        train(network, WHAT, pictures(), pictures(7), tmp_path / "run", reporter=At({PER_EPOCH + 1: spoil}))


# ---- what can happen to it --------------------------------------------------------------------------------


def die_before_the_end(world: World, folder: Path) -> None:
    """The first process is killed when the second checkpoint is written and not yet renamed."""
    rename, renames = os.rename, [0]

    def dead(*arguments: Any) -> None:
        renames[0] += 1
        if renames[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*arguments)

    os.rename = dead
    run(world, folder, WHAT)


@pytest.mark.dist
def test_a_kill_before_the_rename_leaves_the_older_one_and_the_draft_goes(tmp_path: Path) -> None:
    first, second = together(2, die_before_the_end, tmp_path / "run")
    assert first == -signal.SIGKILL
    assert isinstance(second, TrainingError)
    assert "another process of this job has ended" in str(second)
    assert names(tmp_path / "run") == ["step-000000003", "step-000000006.draft"]
    assert (tmp_path / "run" / "checkpoints" / "step-000000006.draft" / "state.json").is_file()
    assert newest_state(tmp_path / "run", WHAT)["progress"]["step"] == 3
    assert together(1, stop, tmp_path / "run", WHAT, 1) == [143]
    assert names(tmp_path / "run") == ["step-000000003", "step-000000004"]
    (reference,) = together(1, run, tmp_path / "whole", WHAT)
    assert difference(reference, together(1, run, tmp_path / "run", WHAT)[0]) < SAME


def full(world: World, folder: Path, rank: int, place: str) -> None:
    """One process meets a full disk when it writes its part of the second checkpoint."""
    before = getattr(os, place)

    def fail(*arguments: Any) -> Any:
        writing = threading.current_thread() is not threading.main_thread()
        if writing and world.rank == rank and "step-000000003" in names(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return before(*arguments)

    setattr(os, place, fail)
    try:
        run(world, folder, WHAT)
    finally:
        setattr(os, place, before)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("size", "rank", "place"), [(1, 0, "fsync"), (2, 1, "fsync"), (2, 0, "fsync"), (1, 0, "rename")]
)
def test_a_disk_that_is_full_ends_all_with_the_reason(
    size: int, rank: int, place: str, tmp_path: Path
) -> None:
    if size == 1:
        with pytest.raises(TrainingError) as error:
            full(World(), tmp_path / "run", rank, place)
        outcomes: list[Any] = [error.value]
    else:
        outcomes = together(size, full, tmp_path / "run", rank, place)
    for outcome in outcomes:
        assert isinstance(outcome, TrainingError)
        assert str(outcome) == (
            f"cannot write checkpoint {tmp_path}/run/checkpoints/step-000000006: No space left on device; free some "
            "space or choose another --out, then run the same command again (older checkpoints are intact)"
        )
    assert names(tmp_path / "run") == ["step-000000003"]
    assert newest_state(tmp_path / "run", WHAT)["progress"]["step"] == 3


def test_a_checkpoint_that_cannot_be_written_at_a_signal_is_no_saved_one(tmp_path: Path) -> None:
    def block() -> None:
        (tmp_path / "run" / "checkpoints").write_text("a file where the folder should be")
        os.kill(os.getpid(), signal.SIGTERM)

    reporter = At({2: block})
    with pytest.raises(TrainingError, match=r"cannot write checkpoint .*step-000000002: "):
        run(World(), tmp_path / "run", WHAT, reporter)
    assert not any("saved" in line for line in reporter.lines)


def test_the_last_checkpoint_of_a_run_must_be_written_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, metadata: Any, results: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(distributed_checkpoint._Writer, "finish", fail)
    with pytest.raises(TrainingError, match="step-000000003: Permission denied"):
        run(World(), tmp_path / "run", WHAT.override(["train.epochs=1"]))
    assert names(tmp_path / "run") == []


def written(folder: Path, keep: int = 2, *steps: int) -> Path:
    saving = BackgroundSave(folder, DIGEST, keep, World())
    for step in steps or (7,):
        saving.begin(step, nested_state())
    saving.wait()
    saving.close()
    return list_checkpoints(folder)[-1]


def test_a_state_reads_back_exactly(tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "step-000000007"
    again = read_checkpoint(path, DIGEST)
    assert difference(again, nested_state()) == 0
    assert list(again["a"]) == [0, 1]
    assert again["tiny"] == 5e-324


def test_a_part_is_read_from_its_file_alone(tmp_path: Path) -> None:
    path = written(tmp_path)
    stored, fetch = open_checkpoint(path, DIGEST)
    (path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    assert fetch({"b": stored["b"]}) == {"b": nested_state()["b"]}
    with pytest.raises(BundleError, match="is damaged or no checkpoint"):
        fetch({"c": stored["c"]})


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay_and_other_files_are_not_touched(keep: int, tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    written(tmp_path, keep, 1, 20, 3, 100)
    kept = ["step-000000003", "step-000000020", "step-000000100"][-keep:]
    assert [path.name for path in list_checkpoints(tmp_path)] == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "step-1"])


def test_a_step_that_is_saved_again_takes_the_place_of_the_former(tmp_path: Path) -> None:
    path = written(tmp_path)
    (path / "state.json").unlink()
    assert difference(read_checkpoint(written(tmp_path), DIGEST), nested_state()) == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path)
    for file in path.iterdir():
        whole = file.read_bytes()
        for length in range(0, len(whole), 11):
            file.write_bytes(whole[:length])
            with pytest.raises(BundleError, match=r"is damaged or no checkpoint|has format") as error:
                read_checkpoint(path, DIGEST)
            assert "\n" not in str(error.value)
        for place in range(len(whole)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            try:
                same = read_checkpoint(path, DIGEST)
            except BundleError as error:
                assert "\n" not in str(error)  # noqa: PT017
            else:  # a remark of torch in the header, or 4e-324, which reads as 5e-324
                assert difference(same, nested_state()) == 0
        file.write_bytes(whole)
    assert difference(read_checkpoint(path, DIGEST), nested_state()) == 0


def test_files_of_another_kind_and_other_experiments_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(
        BundleError, match=r"belongs to another experiment \(digest dddddddddddd, asked for eeee"
    ):
        read_checkpoint(path, "e" * 64)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("checkpoint-1", "checkpoint-9"))
    with pytest.raises(
        BundleError, match="has format 'lipnext-distributed-checkpoint-9', this version reads"
    ):
        read_checkpoint(path, DIGEST)
    for other in ("[]", "{}", "7", ""):
        (path / "state.json").write_text(other)
        with pytest.raises(BundleError):
            read_checkpoint(path, DIGEST)
    (path / "state.json").unlink()
    with pytest.raises(BundleError, match="is damaged or no checkpoint"):
        read_checkpoint(path, DIGEST)


@pytest.mark.dist
@pytest.mark.slow
def test_damage_that_one_process_meets_ends_all(tmp_path: Path) -> None:
    values(together(2, stop, tmp_path / "run", WHAT, 2))
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    file = path / "shard-00002-model-00001-of-00001.safetensors"  # the first process needs nothing of it
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    first, second = together(2, run, tmp_path / "run", WHAT)
    assert isinstance(first, BundleError)
    assert isinstance(second, BundleError)
    assert str(first) == str(second)
    assert f"{path} is damaged or no checkpoint (the sha256 of /" in str(first)
    shutil.rmtree(path)
    values(together(2, run, tmp_path / "run", WHAT))


# ---- what is refused --------------------------------------------------------------------------------------


def test_an_old_torch_and_files_of_a_largest_size_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"train.checkpoint_part: only whole .* files of 16 MB; set it to"):
        run(World(), tmp_path, WHAT.override(["train.checkpoint_part=16"]))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0"))
    with pytest.raises(
        ConfigError, match=r"'distributed' needs torch 2.9 or later .*, this is torch 2.6.0; set"
    ):
        run(World(), tmp_path, WHAT)
    assert list(tmp_path.iterdir()) == []


# ---- under torchrun ---------------------------------------------------------------------------------------

PROGRAM = """
import os, pathlib, sys
from lipnext.core.errors import LipnextError
from lipnext.core.world import join
sys.path.insert(0, sys.argv[1])
from test_distributed_checkpoint import WHAT, run
if sys.argv[2] == "full":
    pathlib.Path("run").mkdir(exist_ok=True)
    pathlib.Path("run/checkpoints").write_text("")
try:
    with join("cpu") as world:
        run(world, pathlib.Path("run"), WHAT)
except LipnextError as error:
    assert sys.argv[2] == "full", error
pathlib.Path(f"threads{world.rank}").write_text(
    " ".join(sorted((task / "comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()))
)
"""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds threads by /proc")
@pytest.mark.parametrize("disk", ["empty", "full"])
def test_no_thread_of_a_group_outlives_it_and_nothing_is_said(disk: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    tests = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "program.py", str(tests / "training"), disk],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}:{tests}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    for rank in (0, 1):
        assert "gloo" not in (tmp_path / f"threads{rank}").read_text()
