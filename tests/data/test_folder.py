from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipnext.core.errors import DataError
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import Splits, load


def read(folder: Path, **settings: object) -> Splits:
    return load(DataSpec(name="folder", path=str(folder), **settings))


def write(
    folder: Path, values: range, size: tuple[int, int] = (4, 4), grey: bool = True, suffix: str = ".png"
) -> None:
    """Write one picture per value, filled with it."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        shape = size if grey else (*size, 3)
        Image.fromarray(np.full(shape, value, np.uint8)).save(folder / f"{value:03}{suffix}")


def values(part: object) -> list[tuple[int, int]]:
    return [(int(image[0, 0, 0]), int(y)) for image, y in zip(part.images, part.labels, strict=True)]


def test_flat_folder_is_split(tmp_path: Path) -> None:
    write(tmp_path / "dog", range(100, 110))
    write(tmp_path / "cat", range(20))
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "cat" / "._001.png").write_bytes(b"x")
    splits = read(tmp_path, test=0.3, validation=0.5)
    assert splits.train.classes == ("cat", "dog")
    found = values(splits.train) + values(splits.validation) + values(splits.test)
    assert sorted(found) == [(i, 0) for i in range(20)] + [(i, 1) for i in range(100, 110)]
    assert splits.test.labels.bincount().tolist() == [6, 3]
    assert splits.validation.labels.bincount().tolist() == [7, 4]
    assert values(splits.test) == values(read(tmp_path, test=0.3).test)
    assert values(splits.test) != values(read(tmp_path, test=0.3, seed=1).test)


@pytest.mark.parametrize("name", ["test", "val"])
def test_split_folders(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train" / "a", range(5))
    write(tmp_path / "train" / "b", range(10, 15))
    write(tmp_path / name / "b", range(200, 203))  # a test part need not have every class
    splits = read(tmp_path)
    assert values(splits.test) == [(200, 1), (201, 1), (202, 1)]
    assert sorted(values(splits.train) + values(splits.validation)) == [
        *((i, 0) for i in range(5)),
        *((i, 1) for i in range(10, 15)),
    ]


def test_test_goes_before_val(tmp_path: Path) -> None:
    for part, value in (("train", 0), ("test", 100), ("val", 200)):
        write(tmp_path / part / "a", range(value, value + 3))
        write(tmp_path / part / "b", range(value + 10, value + 13))
    assert values(read(tmp_path).test)[0] == (100, 0)


def test_train_without_test_is_split(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a", range(10))
    write(tmp_path / "train" / "b", range(10, 20))
    splits = read(tmp_path, test=0.2)
    assert splits.test.labels.bincount().tolist() == [2, 2]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write(tmp_path / "bus", range(4))
    write(tmp_path / "train", range(10, 14))
    assert read(tmp_path).train.classes == ("bus", "train")


def test_pictures_may_lie_deeper(tmp_path: Path) -> None:
    write(tmp_path / "a" / "images", range(3))
    write(tmp_path / "b", range(10, 13))
    assert read(tmp_path).train.classes == ("a", "b")


def test_any_size_and_mode_with_size(tmp_path: Path) -> None:
    write(tmp_path / "a", range(0, 3), size=(30, 20))
    write(tmp_path / "b", range(100, 103), size=(9, 50), grey=False, suffix=".bmp")
    splits = read(tmp_path, size=8)
    assert splits.train.shape == (3, 8, 8)  # one colour picture makes all of them RGB
    assert sorted(values(splits.train) + values(splits.validation) + values(splits.test)) == [
        *((i, 0) for i in range(3)),
        *((i, 1) for i in range(100, 103)),
    ]
    assert read(tmp_path, size=8, channels=1).train.shape == (1, 8, 8)


def test_the_test_part_takes_the_channels_of_training(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / "train" / name, range(3), grey=False)
        write(tmp_path / "test" / name, range(3))
    assert read(tmp_path).test.shape == (3, 4, 4)


def test_different_sizes_without_size(tmp_path: Path) -> None:
    write(tmp_path / "a", range(3))
    write(tmp_path / "b", range(3), size=(4, 5))
    with pytest.raises(DataError, match=r"b/000.png: the picture has 5 x 4 pixels, the first one 4 x 4; "):
        read(tmp_path)


def test_one_class(tmp_path: Path) -> None:
    write(tmp_path / "cat", range(3))
    with pytest.raises(
        DataError, match=r"has one class \('cat'\); at least two are needed: a folder with one"
    ):
        read(tmp_path)


def test_no_class(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    with pytest.raises(DataError, match=r"has no class folder; at least two are needed"):
        read(tmp_path)


def test_class_without_picture(tmp_path: Path) -> None:
    write(tmp_path / "cat", range(3))
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match=r"dog has no picture \(\.png .*\); add some or remove the folder"):
        read(tmp_path)


def test_unreadable_picture_is_named(tmp_path: Path) -> None:
    write(tmp_path / "cat", range(3))
    write(tmp_path / "dog", range(3))
    (tmp_path / "dog" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"/dog/001.png: unreadable picture \(.*\); replace or remove it"):
        read(tmp_path)


def test_bomb_is_named(tmp_path: Path) -> None:
    write(tmp_path / "cat", range(3))
    write(tmp_path / "dog", range(3))
    (tmp_path / "dog" / "bomb.ppm").write_bytes(b"P6 9000 9000 255\n")
    with pytest.raises(DataError, match=r"/dog/bomb.ppm: 9000 x 9000 pixels, at most 50,000,000 are read"):
        read(tmp_path, size=4)


def test_test_class_that_is_not_trained(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / "train" / name, range(3))
    write(tmp_path / "test" / "c", range(3))
    with pytest.raises(DataError, match=r"test has the class 'c', which is not among the training classes"):
        read(tmp_path)


def test_empty_test_set(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / "train" / name, range(3))
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"test: test set: no image; at least one is needed"):
        read(tmp_path)


def test_too_few_to_split(tmp_path: Path) -> None:
    write(tmp_path / "a", range(1))
    write(tmp_path / "b", range(1))
    with pytest.raises(DataError, match=r"2 images are too few to hold a part out; give two of some class"):
        read(tmp_path)
