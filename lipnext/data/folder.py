"""A folder of class folders: pictures of any size, in the user's own classes."""

from pathlib import Path

import torch

from lipnext.core.errors import DataError
from lipnext.core.experiment import DataSpec
from lipnext.core.seed import generator
from lipnext.data.dataset import Dataset, hold_out, named, require_folder
from lipnext.data.pictures import stack

HINT = "a folder with one folder of pictures per class, or with such folders in train/ and test/"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_NAMES = ("test", "val", "valid", "validation")


def read(spec: DataSpec) -> tuple[Dataset, Dataset]:
    """Return (training part, test part) of the folder `spec.path`, whose class folders name the classes.

    With class folders in train/, the test part is test/, or else val/; without either, and in a flat folder,
    `spec.test` of each class is held out, chosen by `spec.seed`. Pictures may lie deeper below their class
    folder. They are resized to `spec.size` (short side, then the central square), which may be left out if
    all have one size. Channels are `spec.channels`, or else 3 if any training picture has colour. Hidden
    files, and files that do not have a picture's suffix, are passed over.

    Raises:
        ConfigError: without a path.
        DataError: for fewer than two classes, a class without pictures, a test class that is not trained, and
            a picture (named) that is unreadable, larger than 50 million pixels, or of another size without
            `spec.size`.
    """
    folder = require_folder(spec, HINT)
    if not _class_folders(
        folder / "train"
    ):  # a class may be called "train": then it holds pictures, not folders
        return hold_out(_read_part(folder, spec), spec.test, generator(spec.seed, "test"))
    train = _read_part(folder / "train", spec)
    for name in TEST_NAMES:
        if (folder / name).is_dir():
            return train, _read_part(folder / name, spec, train)
    return hold_out(train, spec.test, generator(spec.seed, "test"))


def _read_part(folder: Path, spec: DataSpec, train: Dataset | None = None) -> Dataset:
    """Read the class folders in `folder`; a test part takes classes and channels from `train`."""
    found = [path.name for path in _class_folders(folder)]
    if train is None and len(found) < 2:
        came = f"one class ('{found[0]}')" if found else "no class folder"
        raise DataError(f"{folder} has {came}; at least two are needed: {HINT}")
    classes = tuple(found) if train is None else train.classes
    if unknown := sorted(set(found) - set(classes)):
        raise DataError(f"{folder} has the class '{unknown[0]}', which is not among the training classes")
    files: list[Path] = []
    labels: list[int] = []
    for name in found:
        pictures = _pictures(folder / name)
        if not pictures:
            raise DataError(
                f"{folder / name} has no picture ({' '.join(SUFFIXES)}); add some or remove the folder"
            )
        files += pictures
        labels += [classes.index(name)] * len(pictures)
    channels = spec.channels if train is None else train.shape[0]
    images = stack(((path, path) for path in files), len(files), channels, spec.size)
    with named(folder if train is None else f"{folder}: test set"):
        return Dataset(images=images, labels=torch.tensor(labels, dtype=torch.int64), classes=classes)


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
