import gzip
import struct
from pathlib import Path

import pytest
import torch

from lipnext.core.errors import DataError
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import load
from lipnext.data.idx import read_idx


def idx_bytes(array: torch.Tensor, kind: int = 8) -> bytes:
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, kind, array.ndim]) + shape + bytes(array.flatten().tolist())


def write_set(
    folder: Path, train: int = 12, test: int = 4, separator: str = "-", packed: bool = True
) -> None:
    for part, count in (("train", train), ("t10k", test)):
        images = torch.randint(256, (count, 5, 4))
        labels = torch.arange(count) % 3
        for what, array in ((f"images{separator}idx3", images), (f"labels{separator}idx1", labels)):
            content = idx_bytes(array)
            name = f"{part}-{what}-ubyte"
            (folder / (name + ".gz" if packed else name)).write_bytes(
                gzip.compress(content) if packed else content
            )


def spec(folder: Path) -> DataSpec:
    return DataSpec(name="idx", path=str(folder))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_read_idx_gives_back_the_array(tmp_path: Path, suffix: str) -> None:
    array = torch.randint(256, (3, 4, 2))
    path = tmp_path / f"array{suffix}"
    path.write_bytes(gzip.compress(idx_bytes(array)) if suffix else idx_bytes(array))
    assert torch.equal(read_idx(path), array.to(torch.uint8))


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_names_in_use(tmp_path: Path, separator: str, packed: bool) -> None:
    write_set(tmp_path, separator=separator, packed=packed)
    splits = load(spec(tmp_path))
    assert splits.train.shape == (1, 5, 4)
    assert splits.train.classes == ("0", "1", "2")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9, 3, 4)


def test_fashion_mnist(fashion_mnist: Path) -> None:
    splits = load(spec(fashion_mnist))
    assert splits.train.labels.bincount().tolist() == [5400] * 10
    assert splits.validation.labels.bincount().tolist() == [600] * 10
    assert splits.test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    # Mean brightness of the 60,000 training images, as commonly published for normalisation: 0.2860.
    total = splits.train.images.long().sum() + splits.validation.images.long().sum()
    assert abs(float(total) / (60000 * 784 * 255) - 0.2860) < 5e-5


HEADER = bytes([0, 0, 8, 2]) + struct.pack(">2I", 2, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + bytes(5), "truncated: 6 bytes promised, 5 found; download it again"),
        (HEADER + bytes(7), "damaged: more bytes follow the 6 promised; download it again"),
        (HEADER[:9], "truncated: the file ends inside its header; download it again"),
        (b"", "not an IDX file: it starts with b''"),
        (b"<html>", "not an IDX file: it starts with b'<htm'"),
        (bytes([0, 0, 13, 2]) + HEADER[4:] + bytes(24), "unsigned bytes (type 8) are read, got type 13"),
        (
            bytes([0, 0, 8, 4]) + b"\xff" * 16 + bytes(9),
            f"truncated: {(2**32 - 1) ** 4} bytes promised, the file has ",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_files(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError) as caught:
        read_idx(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("keep", [5, 30, -9, -1])
def test_truncated_gzip(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(idx_bytes(torch.randint(256, (50,))))[:keep])
    with pytest.raises(DataError, match=r"cut.gz: truncated or damaged gzip file \(.*\); download it again"):
        read_idx(path)


def test_gzip_that_is_none_or_flipped(tmp_path: Path) -> None:
    path = tmp_path / "plain.gz"
    path.write_bytes(idx_bytes(torch.arange(9)))
    with pytest.raises(DataError, match="truncated or damaged gzip file"):
        read_idx(path)
    packed = bytearray(gzip.compress(idx_bytes(torch.randint(256, (50,)))))
    packed[-6] ^= 1  # in the checksum
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"truncated or damaged gzip file \(CRC check failed"):
        read_idx(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        DataError, match=r"has no file t10k-labels-idx1-ubyte, plain or \.gz; give the folder"
    ):
        load(spec(tmp_path))


def test_truncated_member_of_a_set_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: truncated or damaged gzip file"):
        load(spec(tmp_path))


def test_empty_test_set(tmp_path: Path) -> None:
    write_set(tmp_path, test=0)
    with pytest.raises(DataError, match=r": test set: no image; at least one is needed"):
        load(spec(tmp_path))


def test_empty_training_set(tmp_path: Path) -> None:
    write_set(tmp_path, train=0)
    with pytest.raises(DataError, match=r": no image; at least one is needed"):
        load(spec(tmp_path))


def test_labels_out_of_range(tmp_path: Path) -> None:
    write_set(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(torch.tensor([0, 1, 3, 2]))))
    with pytest.raises(
        DataError, match=r"test set: labels must be in 0\.\.2 \(3 classes\), got 3 at image 2"
    ):
        load(spec(tmp_path))
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(torch.tensor([0, 1, 2] * 3 + [0, 1, 255]))))
    with pytest.raises(DataError, match="got label 255 in a set with 4 different labels"):
        load(spec(tmp_path))


def test_fewer_labels_than_images_and_wrong_ranks(tmp_path: Path) -> None:
    write_set(tmp_path, packed=False)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(torch.arange(3)))
    with pytest.raises(DataError, match="12 images but 3 labels"):
        load(spec(tmp_path))
    path.write_bytes(idx_bytes(torch.zeros(12, 1, dtype=torch.int64)))
    with pytest.raises(DataError, match=r"labels need one dimension, got \(12, 1\)"):
        load(spec(tmp_path))
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(torch.zeros(12, 4, dtype=torch.int64)))
    with pytest.raises(DataError, match=r"images need three dimensions \(N, H, W\), got \(12, 4\)"):
        load(spec(tmp_path))
