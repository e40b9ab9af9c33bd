"""Image sets in the parquet layout of the Hugging Face hub: encoded pictures in one column, labels in one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lipnext.core.errors import DataError
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import Dataset, named, require_folder, unnamed_classes
from lipnext.data.pictures import stack

HINT = "the folder with train-*.parquet and test-*.parquet, as downloaded from the hub"
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")  # CIFAR-100 on the hub has fine_label and coarse_label
ROWS_AT_ONCE = 512


def read(spec: DataSpec) -> tuple[Dataset, Dataset]:
    """Return (training part, test part) of the folder `spec.path`, searched with its subfolders.

    The split is told by the start of a file's name, or of its folder's: train, and test or else valid.
    Channels are `spec.channels`, or else 3 if any training picture has colour. Class names come from the
    hub's metadata in the schema, "0", "1", ... without it.

    Raises:
        ConfigError: without a path.
        DataError: for files that are missing, damaged, or lack the columns; for a picture that is unreadable
            or of another size than the first (both named); for labels out of range.
    """
    folder = require_folder(spec, HINT)
    files = split_files(folder, "train")
    images, labels = _read_files(files, spec.channels)
    with named(folder):
        classes = class_names(files[0]) or unnamed_classes(labels)
        train = Dataset(images=images, labels=labels, classes=classes)
    images, labels = _read_files(split_files(folder, "test", "valid"), train.shape[0])
    with named(f"{folder}: test set"):
        test = Dataset(images=images, labels=labels, classes=classes)
    return train, test


def split_files(folder: Path, *splits: str) -> list[Path]:
    """Return the files of the first of `splits` that has any; all must stand in one folder."""
    for split in splits:
        files = sorted(path for path in folder.rglob("*.parquet") if _belongs(path, folder, split))
        homes = sorted({path.parent for path in files})
        if len(homes) > 1:
            found = ", ".join(str(home) for home in homes)
            raise DataError(
                f"{folder} has {split} files in several folders ({found}); give one data set alone"
            )
        if files:
            return files
    raise DataError(f"{folder} has no {splits[0]}*.parquet; give {HINT}")


def _belongs(path: Path, folder: Path, split: str) -> bool:
    """Tell whether the file's name, or the name of its folder below `folder`, starts with `split`."""
    return path.name.startswith(split) or (path.parent != folder and path.parent.name.startswith(split))


def _read_files(files: list[Path], channels: int | None) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) and labels (N,)."""
    labels = labels_of(files)
    return stack(_pictures(files), len(labels), channels), labels


def labels_of(files: list[Path]) -> Tensor:
    """Return the label columns of all files, int64 (N,)."""
    parts = [torch.empty(0, dtype=torch.int64)]
    for path in files:
        file, _, column = open_file(path)
        for values in _batches(file, path, column):
            if values.null_count:
                raise DataError(f"{path}: {values.null_count} rows have no label; remove them")
            parts.append(torch.tensor(values.to_pylist(), dtype=torch.int64))
    return torch.cat(parts)


def _pictures(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield (file and row, encoded picture), reading a few hundred at a time."""
    for path in files:
        file, column, _ = open_file(path)
        row = 0
        for values in _batches(file, path, column):
            for content in pictures_in(values):
                if not content.is_valid:
                    raise DataError(f"{path}, row {row}: no picture; the file must hold pictures, not paths")
                yield f"{path}, row {row}", content.as_py()
                row += 1


def open_file(path: Path) -> tuple[pq.ParquetFile, str, str]:
    """Return the file and the names of its picture and its label column."""
    with named(path):
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"truncated or not a parquet file ({first_line(error)})") from error
        return file, *_columns(file.schema_arrow)


def _batches(file: pq.ParquetFile, path: Path, column: str) -> Iterator[pa.Array]:
    """Yield one column, piece by piece."""
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column], use_threads=False):
            yield batch.column(column)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged, download it again ({first_line(error)})") from error


def pictures_in(values: pa.Array) -> pa.Array:
    """Return the encoded pictures of a picture column, which may be a struct of them and their paths."""
    return values.field("bytes") if pa.types.is_struct(values.type) else values


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _columns(schema: pa.Schema) -> tuple[str, str]:
    """Return the names of the picture and the label column, after checking their types."""
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise DataError(f"needs columns 'img' or 'image', and 'label'; has {', '.join(schema.names)}")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"column '{image}' must hold encoded pictures (binary), has type {kind}")
    if not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"column '{label}' must hold integers, has type {schema.field(label).type}")
    return image, label


def class_names(path: Path) -> tuple[str, ...] | None:
    """Return the names in the hub's ClassLabel metadata, None where there are none."""
    file, _, label = open_file(path)
    try:
        names = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names)
