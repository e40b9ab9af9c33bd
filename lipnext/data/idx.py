"""IDX files, the format of MNIST and of the sets that copy it (Fashion-MNIST, KMNIST, EMNIST).

Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", section "file formats".
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from lipnext.core.errors import DataError
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import Dataset, named, require_folder, unnamed_classes

HINT = (
    "the folder with train-images-idx3-ubyte.gz and its three companions (Fashion-MNIST: Debian's package "
    "dataset-fashion-mnist installs it as /usr/share/datasets/fashion-mnist)"
)

# Deflate cannot shrink data more than this; a header that promises more bytes is damaged.
LARGEST_RATIO = 1032


def read(spec: DataSpec) -> tuple[Dataset, Dataset]:
    """Return (training part, test part) of the folder `spec.path`, classes named "0", "1", ...

    Raises:
        ConfigError: without a path.
        DataError: for a file that is missing, truncated, or not of unsigned bytes; for labels out of range.
    """
    folder = require_folder(spec, HINT)
    images, labels = _read_pair(folder, "train")
    with named(folder):
        classes = unnamed_classes(labels)
        train = Dataset(images=images, labels=labels, classes=classes)
    images, labels = _read_pair(folder, "t10k")
    with named(f"{folder}: test set"):
        test = Dataset(images=images, labels=labels, classes=classes)
    return train, test


def read_idx(path: Path) -> Tensor:
    """Return the array in one IDX file, plain or gzipped, as a uint8 tensor of the stored shape.

    Raises:
        DataError: naming the file, if it is truncated, damaged, or of another type than unsigned bytes.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with named(path):
        try:
            with opener(path, "rb") as file:
                return _parse(cast(IO[bytes], file), path.stat().st_size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"truncated or damaged gzip file ({error}); download it again") from error
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}") from error


def _parse(file: IO[bytes], stored: int) -> Tensor:
    """Read header and array; `stored` is the number of bytes on disk, possibly compressed."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or not 1 <= magic[3] <= 4:
        raise DataError(f"not an IDX file: it starts with {magic!r}, not with two zero bytes, type and rank")
    if magic[2] != 0x08:
        raise DataError(f"IDX files of unsigned bytes (type 8) are read, got type {magic[2]}")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError("truncated: the file ends inside its header; download it again")
    shape = struct.unpack(f">{magic[3]}I", header)
    promised = math.prod(shape)
    if promised > LARGEST_RATIO * stored:
        raise DataError(f"truncated: {promised} bytes promised, the file has {stored}; download it again")
    content = bytearray(promised)
    found = _fill(file, content)
    if found < promised:
        raise DataError(f"truncated: {promised} bytes promised, {found} found; download it again")
    if file.read(1):
        raise DataError(f"damaged: more bytes follow the {promised} promised; download it again")
    if promised == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)


def _fill(file: IO[bytes], content: bytearray) -> int:
    """Read into `content` until it is full or the file ends; return the number of bytes read."""
    view = memoryview(content)
    found = 0
    while found < len(content):
        step = file.readinto(view[found:])  # type: ignore[attr-defined]  # every binary file has it
        if step == 0:
            break
        found += step
    return found


def _read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, H, W) and labels (N,) of `part`, "train" or "t10k"."""
    path = _find(folder, part, "images", 3)
    images = read_idx(path)
    if images.ndim != 3:
        raise DataError(f"{path}: images need three dimensions (N, H, W), got {tuple(images.shape)}")
    path = _find(folder, part, "labels", 1)
    labels = read_idx(path)
    if labels.ndim != 1:
        raise DataError(f"{path}: labels need one dimension, got {tuple(labels.shape)}")
    return images.unsqueeze(1), labels.to(torch.int64)


def _find(folder: Path, part: str, what: str, rank: int) -> Path:
    """Return the file under one of the names in use: dash or dot before "idx", gzipped or plain."""
    for separator in ("-", "."):
        for suffix in (".gz", ""):
            path = folder / f"{part}-{what}{separator}idx{rank}-ubyte{suffix}"
            if path.is_file():
                return path
    raise DataError(f"{folder} has no file {part}-{what}-idx{rank}-ubyte, plain or .gz; give {HINT}")
