import errno
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_runs import nested_state

from lipnext.core.errors import BundleError, TrainingError
from lipnext.training import checkpoint
from lipnext.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    weights_are_finite,
)

DIGEST = "d" * 64


def test_a_state_reads_back_exactly(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "new" / "folder", 7, nested_state(), DIGEST, 2)
    assert path == tmp_path / "new" / "folder" / "step-000000007.safetensors"
    again, wanted = load_checkpoint(path, DIGEST), nested_state()
    assert again.keys() == wanted.keys()
    assert list(again["a"]) == [0, 1]
    assert again["a"][0]["step"] == 3
    assert again["b"] == wanted["b"]
    assert [type(item) for item in again["b"]] == [type(item) for item in wanted["b"]]
    assert again["tiny"] == 5e-324
    for first, second in [
        (again["a"][0]["moment"], wanted["a"][0]["moment"]),
        *((again["c"][key], wanted["c"][key]) for key in wanted["c"]),
        (again["none"], wanted["none"]),
    ]:
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


def test_only_the_newest_stay_and_other_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "step-1.safetensors").write_text("mine")
    for step in (1, 20, 3, 100):
        save_checkpoint(tmp_path, step, {"step": step}, DIGEST, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-000000020.safetensors",
        "step-000000100.safetensors",
    ]
    assert (tmp_path / "step-1.safetensors").read_text() == "mine"
    assert list_checkpoints(tmp_path / "missing") == []


def test_something_that_cannot_be_held_is_our_own_bug(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold a set at /x/1"):
        save_checkpoint(tmp_path, 1, {"x": [1, {2}]}, DIGEST, 1)


@pytest.mark.parametrize("place", ["open", "fsync", "replace"])
def test_a_disk_that_is_full_leaves_the_older_checkpoint(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save_checkpoint(tmp_path, 1, nested_state(), DIGEST, 1)
    before = old.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "open":
        monkeypatch.setattr(checkpoint, "atomic_write", full)
    else:
        monkeypatch.setattr(os, place, full)
    with pytest.raises(TrainingError) as error:
        save_checkpoint(tmp_path, 2, nested_state(), DIGEST, 1)
    assert str(error.value) == (
        f"cannot write checkpoint {tmp_path}/step-000000002.safetensors: No space left on device; free some "
        "space or choose another --out, then run the same command again (older checkpoints are intact)"
    )
    assert error.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert old.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a limit on the size of files, as `ulimit -f` sets it")
def test_a_real_limit_of_the_system_is_met_in_the_same_way(tmp_path: Path) -> None:
    import resource

    old = save_checkpoint(tmp_path, 1, nested_state(), DIGEST, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(TrainingError, match="File too large; free some space"):
            save_checkpoint(tmp_path, 2, {"x": torch.zeros(1000)}, DIGEST, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [old]
    assert load_checkpoint(old, DIGEST).keys() == nested_state().keys()


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"x": torch.arange(4.0), "n": 1}, DIGEST, 1)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError, match="is damaged or no checkpoint") as error:
            load_checkpoint(path, DIGEST)
        assert "\n" not in str(error.value)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(BundleError):
            load_checkpoint(path, DIGEST)
    path.write_bytes(whole)
    assert load_checkpoint(path, DIGEST)["n"] == 1


def test_files_of_another_kind_and_other_experiments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(BundleError, match="has format None, this version reads 'lipnext-checkpoint-2'"):
        load_checkpoint(path, DIGEST)
    torch.save({"x": 1}, path)
    with pytest.raises(BundleError, match="is damaged or no checkpoint"):
        load_checkpoint(path, DIGEST)
    path = save_checkpoint(tmp_path, 1, nested_state(), DIGEST, 1)
    with pytest.raises(
        BundleError, match=r"belongs to another experiment \(digest dddddddddddd, asked for eeee"
    ):
        load_checkpoint(path, "e" * 64)
    with pytest.raises(BundleError, match="is damaged or no checkpoint"):
        load_checkpoint(tmp_path / "missing.safetensors", DIGEST)


def test_finite_means_every_floating_entry() -> None:
    assert weights_are_finite({"x": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)})
    for bad in (torch.inf, -torch.inf, torch.nan):
        assert not weights_are_finite({"x": torch.ones(2), "y": torch.tensor([1.0, bad])})
