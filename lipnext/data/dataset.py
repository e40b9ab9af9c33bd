"""A labelled set of images, its three parts, and `load`, which finds a reader by name."""

import hashlib
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from lipnext.core.errors import ConfigError, DataError, nearest
from lipnext.core.experiment import DataSpec
from lipnext.core.files import sha256_tensors
from lipnext.core.seed import generator

# Each module has `read(spec) -> (training part, test part)`. Imported when asked for: pyarrow, Pillow and
# scikit-learn take a second to import and most runs need one of them at most.
SOURCES = {
    "digits": "lipnext.data.digits",
    "two-moons": "lipnext.data.two_moons",
    "idx": "lipnext.data.idx",
    "parquet": "lipnext.data.parquet",
    "cifar-binary": "lipnext.data.cifar_binary",
    "folder": "lipnext.data.folder",
    "shards": "lipnext.data.shards",
}


class ImageSet(Protocol):
    """What training and certification need of a labelled set of images, in memory (`Dataset`) or not (`shards.Shards`)."""

    @property
    def labels(self) -> Tensor:
        """int64 `(N,)`, each in `0 .. len(classes) - 1`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""

    def __len__(self) -> int: ...

    def subset(self, indices: Tensor) -> Self:
        """Return the images numbered by `indices`, int64 `(n,)`, in that order, with the same classes."""

    def order(self, rng: torch.Generator) -> Tensor:
        """Return the order of a pass over all images, int64 `(N,)`, a function of the set and `rng`."""

    def float_images(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """Return the chosen images, float32 `(n, C, H, W)` in [0, 1]: each byte divided by 255 in float32."""

    def sha256(self) -> str:
        """Return the hash of the content, in hexadecimal."""


Set = TypeVar("Set", bound=ImageSet)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images with labels, as they were stored: bytes.

    Attributes:
        images: uint8 `(N, C, H, W)` with C = 1 or 3, N > 0.
        labels: int64 `(N,)`, each in `0 .. len(classes) - 1`.
        classes: the name of each class.

    Raises:
        DataError: if there is no image, or types, shapes, lengths or labels do not fit together.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] not in (1, 3):
            came = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise DataError(f"images must be uint8 of shape (N, 1 or 3, H, W), got {came}")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            came = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise DataError(f"labels must be int64 of shape (N,), got {came}")
        if len(self.labels) != len(self.images):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels; each image needs one")
        if len(self.images) == 0:
            raise DataError("no image; at least one is needed")
        if self.images[0].numel() == 0:
            raise DataError(f"images without a pixel: shape {tuple(self.images.shape)}")
        check_labels(self.labels, self.classes)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, indices: Tensor) -> "Dataset":
        """Return the images numbered by `indices`, int64 `(n,)`, in that order, with the same classes."""
        return Dataset(images=self.images[indices], labels=self.labels[indices], classes=self.classes)

    def order(self, rng: torch.Generator) -> Tensor:
        """Return a uniformly random order of the images, int64 `(N,)`."""
        return torch.randperm(len(self), generator=rng)

    def float_images(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """Return the chosen images, float32 `(n, C, H, W)` in [0, 1]: each byte divided by 255 in float32."""
        if isinstance(indices, Tensor):
            indices = indices.to(self.images.device, non_blocking=True)
        images = self.images[indices].to(torch.float32)
        # A GPU multiplies by the reciprocal of a Python number, which differs in the last bit; it divides by a tensor.
        return images.div_(images.new_full((), 255))

    def to(self, device: torch.device) -> "Dataset":
        """Return the same set in the memory of a device; on the one where it is already, nothing is copied."""
        return Dataset(images=self.images.to(device), labels=self.labels.to(device), classes=self.classes)

    def sha256(self) -> str:
        """Return the hash of images, labels and class names, in hexadecimal."""
        tensors = sha256_tensors({"images": self.images, "labels": self.labels})
        return hashlib.sha256(json.dumps([tensors, *self.classes]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """The three parts of a source. Choices are made on `validation`; `test` is looked at once, at the end.

    Raises:
        DataError: if the parts differ in image shape or classes.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    def __post_init__(self) -> None:
        for name, part in (("validation", self.validation), ("test", self.test)):
            if part.shape != self.train.shape:
                raise DataError(f"{name} images have shape {part.shape}, training images {self.train.shape}")
            if part.classes != self.train.classes:
                raise DataError(f"the {name} part has other classes than the training part")


def load(spec: DataSpec) -> Splits:
    """Read the source that `spec` names; the validation part is carved from its training part alone.

    Raises:
        ConfigError: for an unknown name, or a setting which that source does not have.
        DataError: for files that are missing, damaged or of the wrong form.
    """
    if spec.name not in SOURCES:
        raise ConfigError(f"data.name: unknown source '{spec.name}'; {nearest(spec.name, SOURCES)}")
    _refuse_unused(spec)
    train, test = importlib.import_module(SOURCES[spec.name]).read(spec)
    train, validation = hold_out(train, spec.validation, generator(spec.seed, "validation"))
    return Splits(train=train, validation=validation, test=test)


def hold_out(dataset: Set, share: float, rng: torch.Generator) -> tuple[Set, Set]:
    """Split into (rest, held out part) at random, class by class, each part in the original order.

    From each class `share` of its images is held out, rounded, but at least one and never all of them; a
    class with a single image keeps it in the rest.

    Raises:
        DataError: if no class has two images.
    """
    held = torch.zeros(len(dataset), dtype=torch.bool)
    for label in range(len(dataset.classes)):
        members = (dataset.labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=rng)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held[members[order[: max(count, 0)]]] = True
    if not held.any():
        raise DataError(f"{len(dataset)} images are too few to hold a part out; give two of some class")
    return dataset.subset((~held).nonzero().flatten()), dataset.subset(held.nonzero().flatten())


def require_folder(spec: DataSpec, hint: str) -> Path:
    """Return `spec.path` as an existing folder; `hint` ends the message and says what the folder must hold.

    Raises:
        ConfigError: if no path is given.
        DataError: if it is not a folder.
    """
    if spec.path is None:
        raise ConfigError(f"data.path is missing; give {hint}")
    folder = Path(spec.path).expanduser()
    if not folder.is_dir():
        came = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {came}; give {hint}")
    return folder


def check_labels(labels: Tensor, classes: tuple[str, ...]) -> None:
    """Refuse labels, int64 `(N,)`, that are not in `0 .. len(classes) - 1`.

    Raises:
        DataError: with the first of them.
    """
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"labels must be in 0..{len(classes) - 1} ({len(classes)} classes), "
            f"got {int(labels[first])} at image {first} ({len(wrong)} such labels)"
        )


def unnamed_classes(labels: Tensor) -> tuple[str, ...]:
    """Return the names "0", "1", ... for a source that stores none.

    Args:
        labels: int64 `(N,)` of the training part.

    Raises:
        DataError: if a label below the largest never occurs, since then one of them is most likely damaged.
    """
    if len(labels) == 0:
        return ()  # refused as a set without images
    if int(labels.min()) < 0:
        raise DataError(f"labels must be 0 or above, got {int(labels.min())}")
    present = labels.unique()
    largest = int(present[-1])
    if largest >= len(present):
        raise DataError(
            f"labels must be 0..K-1 with an image of each class, got label {largest} in a set with "
            f"{len(present)} different labels"
        )
    return tuple(str(label) for label in range(largest + 1))


@contextmanager
def named(source: object) -> Iterator[None]:
    """Put `source` (a file, a folder) in front of the message of a DataError raised inside."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _refuse_unused(spec: DataSpec) -> None:
    """Refuse settings that the source would silently ignore."""
    if spec.name in ("digits", "two-moons") and spec.path is not None:
        raise ConfigError(
            f"data.path: the {spec.name} are built in, got '{spec.path}'; leave it out or set data.name"
        )
    if spec.size is not None and spec.name not in ("folder", "shards"):
        raise ConfigError(f"data.size: only 'folder' and 'shards' resize, not '{spec.name}'; leave it out")
    if spec.channels is not None and spec.name not in ("folder", "parquet", "shards"):
        raise ConfigError(
            f"data.channels: only 'folder', 'parquet' and 'shards' convert, not '{spec.name}'; leave it out"
        )
