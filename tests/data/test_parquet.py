import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lipnext.core.errors import DataError
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import Splits, load
from lipnext.data.parquet import _pictures, class_names, labels_of
from lipnext.data.pictures import stack

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int, side: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, labels: list[int], names: list[str] | None = None, raw: bool = False) -> None:
    """Picture i is filled with the value i."""
    contents = [png(number) for number in range(len(labels))]
    if raw:
        pictures = pa.array(contents, pa.binary())
    else:
        pictures = pa.array([{"bytes": content, "path": None} for content in contents], PICTURE)
    table = pa.table({"image" if raw else "img": pictures, "label": pa.array(labels, pa.int64())})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=5)


def read(folder: Path, **settings: object) -> Splits:
    return load(DataSpec(name="parquet", path=str(folder), **settings))


def write_set(folder: Path, **options: object) -> None:
    write(folder / "train-00000-of-00002.parquet", [0, 1] * 6, **options)
    write(folder / "train-00001-of-00002.parquet", [2, 1] * 3, **options)
    write(folder / "test-00000-of-00001.parquet", [2, 0, 1], **options)


@pytest.mark.parametrize("raw", [True, False])
def test_pictures_and_labels_stay_together(tmp_path: Path, raw: bool) -> None:
    write_set(tmp_path, raw=raw)
    splits = read(tmp_path)
    found = [
        (int(image.unique()), int(label))
        for part in (splits.train, splits.validation)
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    assert sorted(found) == sorted([*enumerate([0, 1] * 6), *enumerate([2, 1] * 3)])
    assert splits.test.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert splits.test.labels.tolist() == [2, 0, 1]
    assert splits.train.classes == ("0", "1", "2")


def test_class_names_from_the_hub(tmp_path: Path) -> None:
    write_set(tmp_path, names=["cat", "dog", "eel", "fox"])
    assert read(tmp_path).test.classes == ("cat", "dog", "eel", "fox")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("plain_text/train-0.parquet", "plain_text/test-0.parquet"),
        ("data/train.parquet", "data/valid-0.parquet"),
        ("default/train/0000.parquet", "default/validation/0000.parquet"),
    ],
)
def test_layouts_of_the_hub(tmp_path: Path, train: str, test: str) -> None:
    write(tmp_path / train, [0, 1] * 5)
    write(tmp_path / test, [1, 0, 1])
    assert read(tmp_path).test.labels.tolist() == [1, 0, 1]


def test_test_files_go_before_validation_files(tmp_path: Path) -> None:
    write_set(tmp_path)
    write(tmp_path / "validation-0.parquet", [0])
    assert len(read(tmp_path).test) == 3


def test_channels_one_converts(tmp_path: Path) -> None:
    write_set(tmp_path)
    splits = read(tmp_path, channels=1)
    assert splits.train.shape == splits.test.shape == (1, 4, 4)
    assert splits.test.images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_cifar10_test_file(cifar10: Path) -> None:
    files = sorted(cifar10.glob("test*.parquet"))
    assert labels_of(files).bincount().tolist() == [1000] * 10
    assert labels_of(files)[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert class_names(files[0])[:3] == ("airplane", "automobile", "bird")
    images = stack(islice(_pictures(files), 500), 500)
    # Channel means of all test images: 0.494, 0.485, 0.450. Blue is the darkest, so the order shows.
    means = images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.494, 0.485, 0.450]), atol=0.015, rtol=0)


@pytest.mark.slow  # 60,000 pictures take about six seconds
def test_cifar10(cifar10: Path) -> None:
    splits = read(cifar10)
    assert splits.train.shape == (3, 32, 32)
    assert splits.train.labels.bincount().tolist() == [4500] * 10
    assert splits.validation.labels.bincount().tolist() == [500] * 10
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    assert splits.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert splits.train.classes[0] == "airplane"
    means = splits.test.images.float().mean((0, 2, 3))  # of the original archive: 126.03, 123.71, 114.85
    torch.testing.assert_close(means, torch.tensor([126.03, 123.71, 114.85]).float(), atol=0.01, rtol=0)
    # The published means of the 50,000 training images are 0.4914, 0.4822, 0.4465; JPEG moves them a little.
    means = splits.train.float_images().mean((0, 2, 3))
    torch.testing.assert_close(
        means, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float32), atol=2e-3, rtol=0
    )


def test_two_data_sets_in_one_folder(tmp_path: Path) -> None:
    write_set(tmp_path / "one")
    write_set(tmp_path / "two")
    with pytest.raises(
        DataError, match=r"has train files in several folders \(.*one, .*two\); give one data set alone"
    ):
        read(tmp_path)
    assert len(read(tmp_path / "two").test) == 3


@pytest.mark.parametrize(("part", "pattern"), [("train", "train*.parquet"), ("test", "test*.parquet")])
def test_missing_part(tmp_path: Path, part: str, pattern: str) -> None:
    write_set(tmp_path)
    for path in tmp_path.glob(pattern):
        path.unlink()
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path} has no {pattern}; give the folder with train-*.parquet")


@pytest.mark.parametrize("cut", [0, 3, 200, -1])
def test_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    write_set(tmp_path)
    path = tmp_path / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: truncated or not a parquet file"):
        read(tmp_path)


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    path = tmp_path / "train-00001-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)  # the first page; the directory at the end of the file is whole
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"train-00001-of-00002.parquet.*: (damaged, download it again|unreadable)"
    ):
        read(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1], "label": [0]}, "needs columns 'img' or 'image', and 'label'; has x, label"),
        ({"img": [b""], "y": [0]}, "needs columns 'img' or 'image', and 'label'; has img, y"),
        (
            {"img": ["a.png"], "label": [0]},
            "column 'img' must hold encoded pictures (binary), has type string",
        ),
        (
            {"img": [{"path": "a"}], "label": [0]},
            "column 'img' must hold encoded pictures (binary), has type struct",
        ),
        ({"img": [b""], "label": ["cat"]}, "column 'label' must hold integers, has type string"),
        ({"img": [b""], "label": [0.5]}, "column 'label' must hold integers, has type double"),
    ],
)
def test_wrong_columns(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("pictures", "labels", "message"),
    [
        (
            [png(0), b"no picture"],
            [0, 1],
            r"train.parquet, row 1: unreadable picture \(.*\); replace or remove it",
        ),
        ([png(0), png(1, side=5)], [0, 1], r"row 1: the picture has 5 x 5 pixels, the first one 4 x 4"),
        ([png(0), None], [0, 1], r"train.parquet, row 1: no picture; the file must hold pictures, not paths"),
        ([png(0), png(1)], [0, None], r"train.parquet: 1 rows have no label; remove them"),
        ([png(0), png(1)], [0, -1], r"labels must be 0 or above, got -1"),
        ([png(0), png(1)], [0, 7], r"got label 7 in a set with 2 different labels"),
        ([], [], r": no image; at least one is needed"),
    ],
)
def test_bad_rows(tmp_path: Path, pictures: list[bytes], labels: list[int], message: str) -> None:
    table = pa.table({"img": pa.array(pictures, pa.binary()), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_labels_beyond_the_named_classes(tmp_path: Path) -> None:
    write_set(tmp_path, names=["cat", "dog"])
    with pytest.raises(DataError, match=r"labels must be in 0\.\.1 \(2 classes\), got 2 at image 12"):
        read(tmp_path)


def test_empty_test_set(tmp_path: Path) -> None:
    write_set(tmp_path)
    write(tmp_path / "test-00000-of-00001.parquet", [])
    with pytest.raises(DataError, match=r": test set: no image; at least one is needed"):
        read(tmp_path)
