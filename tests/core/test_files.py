"""A file is whole or absent; hashes see every bit."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lipnext.core.files import atomic_write, sha256_file, sha256_tensors


def test_text_and_bytes_arrive_as_written(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("ü\r\n\n")
    with atomic_write(str(tmp_path / "b"), "wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == "ü\r\n\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt(), ValueError()])
def test_errors_leave_the_old_file_and_no_litter(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_last_step_leaves_the_old_file(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "f"
    path.write_text("old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as file:
        file.write("new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "f"):
        pass


def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "atomic"):
        pass
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b": torch.arange(6.0).reshape(2, 3),
        "a": torch.tensor(1.5, dtype=torch.float32),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }


def test_tensor_hash_ignores_order_strides_and_gradients() -> None:
    plain = tensors()
    reordered = dict(reversed(plain.items()))
    strided = plain | {"b": plain["b"].t().contiguous().t().requires_grad_()}
    assert sha256_tensors(plain) == sha256_tensors(reordered) == sha256_tensors(strided)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"b": t["b"].reshape(3, 2)},
        lambda t: t | {"b": t["b"].float()},
        lambda t: t | {"b": t["b"].view(torch.int64)},
        lambda t: t | {"b": torch.from_numpy(np.nextafter(t["b"].numpy(), np.inf))},
        lambda t: t | {"b": -0.0 * t["b"]},
        lambda t: {("c" if name == "b" else name): value for name, value in t.items()},
        lambda t: {name: value for name, value in t.items() if name != "empty"},
        lambda t: t | {"empty": torch.zeros(4, 0)},
    ],
)
def test_tensor_hash_sees_every_change(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> None:
    assert sha256_tensors(change(tensors())) != sha256_tensors(tensors())


def test_tensor_hash_is_stable_across_versions() -> None:
    # sha256 of the header line and eight zero bytes, written out; a change would orphan every published hash.
    expected = hashlib.sha256(b'["w", "torch.float64", [1]]\n' + bytes(8)).hexdigest()
    assert sha256_tensors({"w": torch.zeros(1)}) == expected
