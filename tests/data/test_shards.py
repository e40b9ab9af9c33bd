"""Shards: the same images as in memory, nothing decoded that was not asked for, an order that goes on, damage named."""

import io
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from processes import together, values

from lipnext import runs
from lipnext.core.errors import ConfigError, DataError
from lipnext.core.experiment import AugmentSpec, DataSpec, Experiment
from lipnext.core.seed import generator
from lipnext.core.world import World
from lipnext.data import shards
from lipnext.data.augment import Augment
from lipnext.data.batches import batches
from lipnext.data.dataset import Dataset, Splits, load
from lipnext.data.shards import RowGroups, Shards, decoding_threads

FILES, ROWS, GROUP = 4, 30, 5
AUGMENT = Augment(AugmentSpec(flip=True, crop=1, randaugment=0.7, cutout=2))


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write(path: Path, pictures: list[bytes | None], labels: list[int], raw: bool = False) -> None:
    column = (
        pa.array(pictures, pa.binary())
        if raw
        else pa.array(
            [{"bytes": picture, "path": "x.png"} for picture in pictures],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    )
    table = pa.table({"image": column, "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=GROUP)


def noise(count: int, seed: int, sides: tuple[int, int] = (8, 8)) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *sides, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(FILES):
        pictures = [encoded(pixels) for pixels in noise(ROWS, number)]
        write(tmp_path / f"train-{number}.parquet", pictures, [row % 3 for row in range(ROWS)])
    write(tmp_path / "test-0.parquet", [encoded(p) for p in noise(23, 99)], [row % 3 for row in range(23)])
    return tmp_path


def read(folder: Path, name: str = "shards", **settings: object) -> Splits:
    return load(DataSpec(name=name, path=str(folder), **settings))


def windowed(part: object, window: int) -> Shards:
    assert isinstance(part, Shards)
    return replace(part, window=window)


def numbers(part: object, **settings: int) -> list[int]:
    """The rows of an epoch, in its order."""
    assert isinstance(part, Shards)
    order = part.order(generator(settings.get("seed", 0), "order", settings.get("epoch", 0)))
    return part.rows[order].tolist()


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_images_are_those_of_the_reader_in_memory(folder: Path, part: str, threads: int) -> None:
    memory, disk = (getattr(read(folder, name), part) for name in ("parquet", "shards"))
    disk = replace(disk, threads=threads)
    assert isinstance(memory, Dataset)
    assert isinstance(disk, Shards)
    assert (len(disk), disk.shape, disk.classes) == (len(memory), memory.shape, memory.classes)
    assert torch.equal(disk.labels, memory.labels)
    assert torch.equal(disk.float_images(), memory.float_images())
    index = torch.randperm(len(disk))[:7]
    assert torch.equal(disk.float_images(index), memory.float_images(index))
    assert torch.equal(disk.subset(index).float_images(slice(2, 5)), memory.float_images(index[2:5]))
    assert disk.float_images(slice(0, 0)).shape == (0, 3, 8, 8)


def test_pictures_are_resized_and_cropped_as_those_of_a_folder(tmp_path: Path) -> None:
    pictures = [noise(1, k, sides)[0] for k, sides in enumerate([(20, 30), (9, 8), (8, 8), (31, 16)] * 3)]
    labels = [k % 2 for k in range(12)]
    home = tmp_path / "shards"
    home.mkdir()
    for part in ("train", "test"):
        write(home / f"{part}.parquet", [encoded(p) for p in pictures], labels, raw=True)
        for k, pixels in enumerate(pictures):
            file = tmp_path / "folder" / part / str(labels[k]) / f"{k:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(pixels))
    found = read(home, size=8).test
    wanted = read(tmp_path / "folder", "folder", size=8).test
    assert found.shape == (3, 8, 8)
    by_class = found.labels.argsort(stable=True)
    assert torch.equal(found.float_images(by_class), wanted.float_images())
    assert read(home, size=8, channels=1).test.shape == (1, 8, 8)


@pytest.mark.parametrize("window", [1, 3_000, 10**9])
def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide(folder: Path, window: int) -> None:
    part = windowed(read(folder).train, window)
    orders = [numbers(part, seed=s, epoch=e) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(order) == part.rows.tolist()


def test_the_images_of_a_window_stand_together(folder: Path) -> None:
    """So every row group is read once in an epoch, and those of a window are mixed with each other."""
    part = windowed(read(folder).train, 3_000)
    size = max(group.bytes for group in part.groups.groups)
    order = part.groups.number_of(torch.tensor(numbers(part))).tolist()
    open_, seen, widest = set(), set(), 0
    for position, group in enumerate(order):
        assert group not in seen
        open_.add(group)
        widest = max(widest, len(open_))
        for other in [g for g in open_ if g not in order[position + 1 :]]:
            open_.remove(other)
            seen.add(other)
    assert 2 <= widest <= 3_000 // min(group.bytes for group in part.groups.groups) + 1
    assert sorted(seen) == list(range(FILES * ROWS // GROUP))
    assert size < 3_000
    assert order != sorted(order)


def count_reads(part: Shards, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    reads: list[int] = []
    real = RowGroups._from_file

    def noted(self: RowGroups, group: object) -> object:
        reads.append(self.groups.index(group))
        return real(self, group)

    monkeypatch.setattr(RowGroups, "_from_file", noted)
    return reads


def test_every_row_group_is_read_once_in_an_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = windowed(read(folder, size=8).train, 3_000)
    part.groups.keep = 2 * 4_500  # row groups of 1,000 bytes make windows of up to 4,000
    reads = count_reads(part, monkeypatch)
    for _ in batches(part, 4, seed=0, epoch=0, drop_last=False, workers=2):
        assert part.groups.bytes_kept() <= part.groups.keep
    assert len(reads) <= FILES * ROWS // GROUP + 2  # two batches at once may lie on both sides of an edge
    assert set(reads) == set(range(FILES * ROWS // GROUP))


def test_threads_that_want_one_row_group_read_it_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = read(folder, size=8).train
    reads = count_reads(part, monkeypatch)
    threads = [threading.Thread(target=part.groups.picture, args=(row % GROUP,)) for row in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == [0]


def test_only_what_is_asked_for_is_decoded_and_it_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    real = shards.decode

    def noted(source: bytes, *settings: object) -> np.ndarray:
        decoded.append(source)
        return real(source, *settings)

    monkeypatch.setattr(shards, "decode", noted)
    splits = read(folder, size=8)
    assert decoded == []
    splits.train.float_images(slice(0, 12))
    assert len(decoded) == 12
    splits.train.float_images(slice(0, 12))
    assert len(decoded) == 24  # again: nothing decoded was kept
    read(folder)
    assert len(decoded) == 25  # the first, whose size is everyone's


def test_memory_does_not_grow_with_the_number_of_images(folder: Path) -> None:
    part = read(folder).train
    part.groups.keep = 4_000
    for rows in torch.arange(len(part)).split(10):
        part.float_images(rows)
        assert 0 < part.groups.bytes_kept() <= 4_000
    part.groups.keep = 1  # the newest one stays, whatever its size
    part.float_images(slice(0, 30))
    assert len(part.groups._kept) == 1


@pytest.mark.parametrize("start", [0, 1, 5, 13])
def test_an_epoch_goes_on_in_its_middle_exactly(folder: Path, start: int) -> None:
    settings = {"seed": 3, "epoch": 1, "augment": AUGMENT}
    whole = list(batches(windowed(read(folder).train, 3_000), 8, **settings))
    rest = list(batches(windowed(read(folder).train, 3_000), 8, start=start, workers=2, **settings))
    assert len(rest) == len(whole) - start
    for (images, labels), (other_images, other_labels) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["shards", "parquet"])
def test_processes_read_disjoint_shares_of_the_same_batches(folder: Path, size: int, name: str) -> None:
    part = read(folder, name).train
    settings = {"seed": 3, "epoch": 1, "augment": AUGMENT}
    whole = list(batches(part, 7, **settings))
    shares = [list(batches(part, 7, share=World(rank, size).share, **settings)) for rank in range(size)]
    for number, (images, labels) in enumerate(whole):
        read_by = torch.zeros(len(labels), dtype=torch.int64)
        for rank in range(size):
            mine = World(rank, size).share(len(labels))
            own, own_labels = shares[rank][number]
            assert torch.equal(own[mine], images[mine])
            assert torch.equal(own_labels, labels)
            read_by[mine] += 1
        assert read_by.tolist() == [1] * len(labels)


def test_a_process_decodes_its_share_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = read(folder).train
    seen = []
    monkeypatch.setattr(
        Shards, "_decode", lambda self, row: seen.append(row) or np.zeros((3, 8, 8), np.uint8)
    )
    rows = []
    for rank in range(2):
        list(batches(part, 8, seed=0, epoch=0, share=World(rank, 2).share))
        rows.append(set(seen))
        seen.clear()
    assert len(rows[0]) == len(rows[1]) == len(part) // 8 * 4
    assert not rows[0] & rows[1]


def test_decoding_threads_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = decoding_threads()
    assert alone >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(alone))
    assert decoding_threads() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10 * alone))
    assert decoding_threads() == 1


def test_the_hash_follows_the_content(folder: Path) -> None:
    test = read(folder).test
    assert test.sha256() == read(folder).test.sha256()
    different = [
        test.subset(torch.arange(22)),
        test.subset(torch.arange(23).flip(0)),
        replace(test, labels=test.labels.flip(0)),
        replace(test, size=8),
        replace(test, classes=("a", "b", "c")),
    ]
    assert len({part.sha256() for part in (test, *different)}) == 6


# ---- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 200, -1])
def test_a_truncated_shard_is_named(folder: Path, cut: int) -> None:
    path = folder / "train-2.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-2.parquet: truncated or not a parquet file") as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_damage_inside_a_shard_is_named_when_it_is_met(folder: Path) -> None:
    path = folder / "test-0.parquet"
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    test = read(folder, size=8).test
    test.float_images(slice(0, 10))  # the rows before are whole
    with pytest.raises(
        DataError, match=r"test-0.parquet, rows 10 to 14: damaged, download the file again \(.*\)"
    ) as error:
        test.float_images(slice(8, 20))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="rows 10 to 14"):  # no answer of a failed read is kept
        test.float_images(slice(11, 12))


def test_a_shard_that_vanished_is_named(folder: Path) -> None:
    train = read(folder).train
    (folder / "train-1.parquet").unlink()
    with pytest.raises(
        DataError, match=r"train-1.parquet, rows \d+ to \d+: damaged, download the file again"
    ):
        train.float_images()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (
            encoded(noise(1, 0, (64, 64))[0], "JPEG")[:-400],
            r"unreadable picture \(.*truncated.*\); replace or",
        ),
        (b"no picture", r"unreadable picture \(.*\); replace or remove it"),
        (None, "no picture; the file must hold pictures, not paths"),
        (encoded(noise(1, 0, (9, 7))[0]), "the picture has 7 x 9 pixels, the first one 8 x 8; set data.size"),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_a_bad_picture_is_named_by_file_and_row(
    tmp_path: Path, folder: Path, picture: bytes | None, message: str, raw: bool
) -> None:
    pictures: list[bytes | None] = [encoded(p) for p in noise(23, 99)]
    pictures[13] = picture
    write(folder / "test-0.parquet", pictures, [0, 1, 2] * 7 + [0, 1], raw=raw)
    test = read(folder).test
    with pytest.raises(DataError, match=rf"test-0.parquet, row 13: {message}") as error:
        list(batches(test, 23, seed=0, epoch=0))
    assert "\n" not in str(error.value)


def test_wrong_labels_and_empty_parts_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.path is missing; give the folder with train-\*.parquet"):
        load(DataSpec(name="shards"))
    write(folder / "test-0.parquet", [encoded(noise(1, 0)[0])], [3])
    with pytest.raises(
        DataError, match=r": test set: labels must be in 0\.\.2 \(3 classes\), got 3 at image 0"
    ):
        read(folder)
    write(folder / "test-0.parquet", [], [])
    with pytest.raises(DataError, match=r": test set: no image; at least one is needed"):
        read(folder)


# ---- whole runs ----------------------------------------------------------------------------------------------

MODEL = ["model.width=16", "model.depth=1", "model.patch=2", "model.shift=0.125", "data.validation=0.1"]
RUN = [*MODEL, "train.epochs=2", "train.batch_size=16", "certify.batch_size=8", "augment.crop=1"]


def tiny(*changes: str) -> Experiment:
    return Experiment(system="lipnext").override([*RUN, *changes])


def test_a_run_on_shards_is_that_in_memory_where_the_order_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shards, "order", Dataset.order)
    monkeypatch.setattr(runs, "DECODED", 8 * 4 * 3 * 64)  # one batch in memory at a time
    results = [
        runs.train(tiny(f"data.name={name}"), tmp_path / "runs" / name, data=str(folder))
        for name in ("shards", "parquet")
    ]
    assert results[0]["n"] == 23
    for key in ("clean", "cra", "acr", "model_sha256"):
        assert results[0][key] == results[1][key]
    # the run remembers how it read: certified again from the same folder, nothing is loaded whole
    certificate, test = runs.certify_run(tmp_path / "runs" / "shards", str(folder))
    assert isinstance(test, Shards)
    assert certificate.summary(test.labels, {})["model_sha256"] == results[0]["model_sha256"]


def test_a_run_with_its_own_order_trains_and_certifies(folder: Path, tmp_path: Path) -> None:
    result = runs.train(tiny("data.name=shards", "data.size=6"), tmp_path / "run", data=str(folder))
    assert result["n"] == 23
    assert 0 <= result["cra"]["36/255"] <= result["clean"] <= 1


def epoch_of(world: World, folder: Path) -> dict[str, object]:
    """One epoch of a process: the rows it read."""
    part = read(folder).train
    assert isinstance(part, Shards)
    rows: list[int] = []
    order = part.rows[part.order(generator(0, "order", 0))]
    for number, (images, _) in enumerate(batches(part, 16, seed=0, epoch=0, share=world.share)):
        rows += order[number * 16 : number * 16 + len(images)][world.share(len(images))].tolist()
    return {"rows": rows, "count": world.add(len(rows))}


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_share_an_epoch(folder: Path) -> None:
    first, second = values(together(2, epoch_of, folder))
    assert not set(first["rows"]) & set(second["rows"])
    assert first["count"] == len(set(first["rows"]) | set(second["rows"])) == 108 // 16 * 16
