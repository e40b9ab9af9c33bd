"""Image sets that do not fit into memory: parquet shards of encoded pictures, decoded when a batch asks for them.

What stays in memory is the number of each picture's row and its label, and a bounded number of bytes of encoded pictures:
the row groups, read as a whole, that were used last.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lipnext.core.errors import DataError
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import check_labels, named, require_folder, unnamed_classes
from lipnext.data.parquet import HINT, class_names, first_line, labels_of, open_file, pictures_in, split_files
from lipnext.data.pictures import decode

WINDOW = 2**29
"""Bytes of encoded pictures that are shuffled with each other: 4,900 photographs of ImageNet."""
ROWS_AT_ONCE = 16
"""Pictures that a thread decodes before it takes the next ones."""


@dataclass(frozen=True)
class RowGroup:
    """Rows of a shard that are read together."""

    file: int
    number: int
    start: int
    """Row of the file at which it starts."""
    rows: int
    bytes: int
    """Of its pictures, encoded."""


class RowGroups:
    """Encoded pictures of shards: one row group after the other, the last used ones kept, safe to share by threads.

    Args:
        files: the shards.
        keep: bytes of row groups that stay in memory; the newest one always does.

    Raises:
        DataError: for a file that is damaged or lacks the columns.
    """

    def __init__(self, files: Sequence[Path], keep: int) -> None:
        self.files, self.keep = tuple(files), keep
        self.groups: list[RowGroup] = []
        self._columns: list[str] = []
        self._metadata: list[pq.FileMetaData] = []
        for file, path in enumerate(self.files):
            parquet, column, _ = open_file(path)
            self._columns.append(column)
            self._metadata.append(parquet.metadata)
            start = 0
            for number in range(parquet.metadata.num_row_groups):
                group = parquet.metadata.row_group(number)
                size = _picture_bytes(group, column)
                self.groups.append(RowGroup(file, number, start, group.num_rows, size))
                start += group.num_rows
            parquet.close()
        self.ends = list(accumulate(group.rows for group in self.groups))
        """Number of rows up to the end of each group, counted through all files."""
        self._kept: OrderedDict[int, Future[pa.ChunkedArray]] = OrderedDict()
        self._lock = Lock()

    def number_of(self, rows: Tensor) -> Tensor:
        """Return the number of each row's group; rows are counted through all files. int64 `(n,)` to the same."""
        return torch.searchsorted(torch.tensor(self.ends), rows, right=True)

    def name(self, row: int) -> str:
        """Return the file of a row, and its number there, for messages."""
        number, place = self._place(row)
        group = self.groups[number]
        return f"{self.files[group.file]}, row {group.start + place}"

    def picture(self, row: int) -> bytes:
        """Return the encoded picture of a row.

        Raises:
            DataError: naming the file, if it cannot be read or the row has no picture.
        """
        number, place = self._place(row)
        content = self._read(number)[place].as_py()
        if content is None:
            raise DataError(f"{self.name(row)}: no picture; the file must hold pictures, not paths")
        return bytes(content)

    def bytes_kept(self) -> int:
        """Return the size of what is in memory now."""
        with self._lock:
            return sum(self.groups[number].bytes for number in self._kept)

    def _place(self, row: int) -> tuple[int, int]:
        """Return the number of a row's group, and its place in it."""
        number = bisect_right(self.ends, row)
        return number, row - (self.ends[number] - self.groups[number].rows)

    def _read(self, number: int) -> pa.ChunkedArray:
        """Return the pictures of a row group. Whoever asks first reads; others that ask meanwhile wait for it."""
        with self._lock:
            found = self._kept.get(number)
            if found is not None:
                self._kept.move_to_end(number)
            else:
                mine = self._kept[number] = Future()
                size = sum(self.groups[n].bytes for n in self._kept)
                while size > self.keep and len(self._kept) > 1:
                    oldest, _ = self._kept.popitem(last=False)
                    size -= self.groups[oldest].bytes
        if found is None:
            try:
                mine.set_result(self._from_file(self.groups[number]))
            except BaseException as error:
                with self._lock:
                    self._kept.pop(number, None)
                mine.set_exception(error)
            found = mine
        return found.result()

    def _from_file(self, group: RowGroup) -> pa.ChunkedArray:
        path, column = self.files[group.file], self._columns[group.file]
        try:
            # Opened anew: a file of pyarrow must not be read by two threads, and thousands need not stay open.
            with pq.ParquetFile(path, metadata=self._metadata[group.file]) as file:
                table = file.read_row_group(group.number, columns=[column], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            rows = f"rows {group.start} to {group.start + group.rows - 1}"
            raise DataError(
                f"{path}, {rows}: damaged, download the file again ({first_line(error)})"
            ) from error
        return pa.chunked_array([pictures_in(chunk) for chunk in table.column(column).chunks])


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """Images with labels that stay in their files; the same to use as a `Dataset`.

    Attributes:
        groups: the files.
        rows: int64 `(N,)`, N > 0, counted through all files.
        labels: int64 `(N,)`, each in `0 .. len(classes) - 1`.
        classes: the name of each class.
        shape: channels, height and width of one decoded image.
        size: to which pictures are resized, as for `pictures.decode`; None: they must have that shape.
        window: bytes of encoded pictures that are shuffled with each other.
        threads: that decode a batch.

    Raises:
        DataError: if there is no image, or labels are out of range.
    """

    groups: RowGroups
    rows: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    size: int | None
    window: int
    threads: int

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise DataError("no image; at least one is needed")
        check_labels(self.labels, self.classes)

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: Tensor) -> "Shards":
        """Return the images numbered by `indices`, int64 `(n,)`, in that order, with the same classes."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def order(self, rng: torch.Generator) -> Tensor:
        """Return a random order of the images that reads every row group once, int64 `(N,)`.

        Row groups are shuffled and cut into windows of about `window` bytes; the images of a window are shuffled.
        """
        numbers, group = self.groups.number_of(self.rows).unique(return_inverse=True)
        sizes = torch.tensor([self.groups.groups[number].bytes for number in numbers.tolist()])
        shuffled = torch.randperm(len(numbers), generator=rng)
        window = torch.empty_like(shuffled)
        window[shuffled] = (sizes[shuffled].cumsum(0) - sizes[shuffled]) // self.window
        order = torch.randperm(len(self), generator=rng)
        return order[window[group[order]].argsort(stable=True)]

    def float_images(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """Decode the chosen images, float32 `(n, C, H, W)` in [0, 1]: each byte divided by 255 in float32.

        Raises:
            DataError: naming file and row, if a picture is missing, unreadable, or of another size without `size`.
        """
        rows = self.rows[indices]
        images = np.empty((len(rows), *self.shape), np.uint8)
        # sorted, so that pictures of one row group are decoded while it is in memory
        pieces = rows.argsort(stable=True).split(ROWS_AT_ONCE)

        def fill(piece: Tensor) -> None:
            for place in piece.tolist():
                images[place] = self._decode(int(rows[place]))

        if pieces:
            with ThreadPoolExecutor(self.threads, thread_name_prefix="lipnext-decode") as pool:
                list(pool.map(fill, pieces))  # the first error, if any, rises here
        return torch.from_numpy(images).to(torch.float32).div_(255)

    def sha256(self) -> str:
        """Return the hash of the encoded pictures, labels, class names and the shape, in hexadecimal. Reads everything."""
        digest = hashlib.sha256(json.dumps([self.shape, self.size, *self.classes]).encode())
        digest.update(self.labels.numpy().tobytes())
        for row in self.rows.tolist():
            digest.update(hashlib.sha256(self.groups.picture(row)).digest())
        return digest.hexdigest()

    def _decode(self, row: int) -> np.ndarray:
        content = self.groups.picture(row)
        with named(self.groups.name(row)):
            picture = decode(content, self.shape[0], self.size)
            if picture.shape != self.shape:
                came, first = (f"{width} x {height}" for _, height, width in (picture.shape, self.shape))
                raise DataError(
                    f"the picture has {came} pixels, the first one {first}; set data.size, to which all are resized"
                )
        return picture


def read(spec: DataSpec) -> tuple[Shards, Shards]:
    """Return (training part, test part) of the folder `spec.path`, in the layout of `parquet`, decoding nothing.

    Pictures are resized to `spec.size` (short side, then the central square), which may be left out if all have one
    size. Channels are `spec.channels`, or else 3. Class names are as in `parquet`.

    Raises:
        ConfigError: without a path.
        DataError: for files that are missing, damaged, or lack the columns; for labels out of range.
    """
    folder = require_folder(spec, HINT)
    files = split_files(folder, "train")
    train_labels = labels_of(files)
    with named(folder):
        classes = class_names(files[0]) or unnamed_classes(train_labels)
        train = _part(files, train_labels, classes, spec)
    files = split_files(folder, "test", "valid")
    with named(f"{folder}: test set"):
        return train, _part(files, labels_of(files), classes, spec, train.shape)


def decoding_threads() -> int:
    """Return the processors that this process may use, shared with the others of its machine under torchrun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _part(
    files: list[Path],
    labels: Tensor,
    classes: tuple[str, ...],
    spec: DataSpec,
    shape: tuple[int, int, int] | None = None,
) -> Shards:
    if len(labels) == 0:
        raise DataError("no image; at least one is needed")
    groups = RowGroups(files, 2 * WINDOW)  # while the last batches of a window are made, the next one is read
    if spec.size is not None:
        shape = (spec.channels or 3, spec.size, spec.size)
    elif shape is None:
        with named(groups.name(0)):
            channels, height, width = decode(groups.picture(0), spec.channels or 3).shape
        shape = (channels, height, width)
    return Shards(
        groups=groups,
        rows=torch.arange(len(labels)),
        labels=labels,
        classes=classes,
        shape=shape,
        size=spec.size,
        window=WINDOW,
        threads=decoding_threads(),
    )


def _picture_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    """Return the bytes of the columns that belong to the picture: itself, or the fields of a struct."""
    columns = (group.column(k) for k in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == column)
