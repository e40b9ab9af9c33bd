"""CIFAR-10 and CIFAR-100 in their binary version: records of one or two label bytes and 3,072 pixel bytes.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, and the data sets' page.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lipnext.core.errors import DataError
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import Dataset, named, require_folder

HINT = (
    "the folder unpacked from cifar-10-binary.tar.gz (data_batch_1.bin ... test_batch.bin) "
    "or from cifar-100-binary.tar.gz (train.bin, test.bin)"
)
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """What tells the two archives apart."""

    train: tuple[str, ...]
    test: str
    label_bytes: int  # the last one is the label; CIFAR-100 has the coarse label before it
    names: str
    classes: int


CIFAR10 = Layout(
    tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", 1, "batches.meta.txt", 10
)
CIFAR100 = Layout(("train.bin",), "test.bin", 2, "fine_label_names.txt", 100)


def read(spec: DataSpec) -> tuple[Dataset, Dataset]:
    """Return (training part, test part) of the folder `spec.path`; CIFAR-100 with its 100 fine labels.

    Class names come from batches.meta.txt or fine_label_names.txt, "0", "1", ... without it. The pickled
    Python version is refused: opening a pickle runs the code in it.

    Raises:
        ConfigError: without a path.
        DataError: for a file that is missing or truncated; for labels out of range.
    """
    folder = require_folder(spec, HINT)
    layout = _layout(folder)
    classes = _class_names(folder, layout)
    parts = [_read_file(folder / name, layout, classes) for name in layout.train]
    train = Dataset(
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        classes=classes,
    )
    with named("test set"):
        test = _read_file(folder / layout.test, layout, classes)
    return train, test


def _layout(folder: Path) -> Layout:
    for layout in (CIFAR10, CIFAR100):
        if (folder / layout.train[0]).is_file():
            return layout
    if (folder / "data_batch_1").is_file() or (folder / "train").is_file():
        raise DataError(f"{folder} is the pickled Python version, which is not read; give {HINT}")
    raise DataError(f"{folder} has no data_batch_1.bin or train.bin; give {HINT}")


def _class_names(folder: Path, layout: Layout) -> tuple[str, ...]:
    path = folder / layout.names
    if not path.is_file():
        return tuple(str(label) for label in range(layout.classes))
    names = tuple(path.read_text(encoding="utf-8", errors="replace").split())
    if len(names) != layout.classes:
        raise DataError(f"{path}: {layout.classes} class names are needed, found {len(names)}")
    return names


def _read_file(path: Path, layout: Layout, classes: tuple[str, ...]) -> Dataset:
    with named(path):
        try:
            content = np.fromfile(path, np.uint8)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}; give {HINT}") from error
        record = layout.label_bytes + PIXELS
        if len(content) % record:
            raise DataError(f"truncated: {len(content)} bytes are no multiple of {record}; download it again")
        records = content.reshape(-1, record)
        labels = records[:, layout.label_bytes - 1].astype(np.int64)
        images = records[:, layout.label_bytes :].reshape(-1, 3, 32, 32).copy()
        return Dataset(images=torch.from_numpy(images), labels=torch.from_numpy(labels), classes=classes)
