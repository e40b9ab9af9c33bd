from pathlib import Path

import numpy as np
import pytest

from lipnext.core.errors import DataError
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import Splits, load

RNG = np.random.default_rng(0)


def read(folder: Path) -> Splits:
    return load(DataSpec(name="cifar-binary", path=str(folder)))


def write(path: Path, labels: list[int], coarse: bool = False) -> np.ndarray:
    """Write one file and return its images."""
    images = RNG.integers(0, 256, (len(labels), 3, 32, 32), np.uint8)
    with path.open("wb") as file:
        for image, label in zip(images, labels, strict=True):
            file.write(bytes([label // 5, label] if coarse else [label]) + image.tobytes())
    return images


def write_cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    train = [write(folder / f"data_batch_{i}.bin", [0, 9, 0, 9]) for i in range(1, 6)]
    return np.concatenate(train), write(folder / "test_batch.bin", [3, 8, 8])


def test_cifar10_layout(tmp_path: Path) -> None:
    train, test = write_cifar10(tmp_path)
    splits = read(tmp_path)
    assert np.array_equal(splits.test.images.numpy(), test)
    assert splits.test.labels.tolist() == [3, 8, 8]
    assert splits.train.classes == tuple("0123456789")
    found = [image.numpy().tobytes() for part in (splits.train, splits.validation) for image in part.images]
    assert sorted(found) == sorted(image.tobytes() for image in train)


def test_cifar100_layout_has_the_fine_labels(tmp_path: Path) -> None:
    write(tmp_path / "train.bin", [0, 99, 0, 99, 50], coarse=True)
    test = write(tmp_path / "test.bin", [49, 33], coarse=True)
    splits = read(tmp_path)
    assert np.array_equal(splits.test.images.numpy(), test)
    assert splits.test.labels.tolist() == [49, 33]
    assert len(splits.test.classes) == 100


def test_class_names(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    assert read(tmp_path).train.classes == tuple("abcdefghij")
    (tmp_path / "batches.meta.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"batches.meta.txt: 10 class names are needed, found 2"):
        read(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(
        DataError, match=r"data_batch_4.bin: cannot be read: No such file or directory; give the"
    ):
        read(tmp_path)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    path = tmp_path / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=r"test_batch.bin: truncated: 9218 bytes are no multiple of 3073; download"
    ):
        read(tmp_path)


def test_labels_out_of_range(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    write(tmp_path / "data_batch_2.bin", [0, 10])
    with pytest.raises(
        DataError, match=r"data_batch_2.bin: labels must be in 0\.\.9 \(10 classes\), got 10 at image 1"
    ):
        read(tmp_path)


def test_empty_test_set(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"test set: .*test_batch.bin: no image; at least one is needed"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["data_batch_1", "train"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x03.")
    with pytest.raises(
        DataError, match="is the pickled Python version, which is not read; give the folder unpacked"
    ):
        read(tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has no data_batch_1.bin or train.bin; give the folder unpacked from"
    ):
        read(tmp_path)
