import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipnext.core.errors import ConfigError, DataError
from lipnext.core.experiment import DataSpec
from lipnext.core.seed import generator
from lipnext.data.dataset import Dataset, Splits, hold_out, load, unnamed_classes


def make(labels: list[int], classes: int = 3) -> Dataset:
    """Each image is filled with its own number, so that images can be told apart."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).clone()
    names = tuple("abcdefghij"[:classes])
    return Dataset(images=images, labels=torch.tensor(labels, dtype=torch.int64), classes=names)


def test_float_images_are_the_float32_quotients() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    dataset = Dataset(images=images, labels=torch.tensor([0]), classes=("a",))
    expected = np.arange(256, dtype=np.float32) / np.float32(255)
    assert dataset.float_images().dtype == torch.float32
    assert np.array_equal(dataset.float_images().flatten().numpy(), expected)


def test_float_images_leave_the_bytes_alone() -> None:
    dataset = make([0, 1, 2])
    first = dataset.float_images(slice(1, 3))
    assert torch.equal(first, dataset.float_images(torch.tensor([1, 2])))
    assert dataset.images.flatten().tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_subset_keeps_order_and_classes() -> None:
    subset = make([0, 1, 2, 0]).subset(torch.tensor([3, 1]))
    assert subset.labels.tolist() == [0, 1]
    assert subset.images[:, 0, 0, 0].tolist() == [3, 1]
    assert subset.classes == ("a", "b", "c")
    assert subset.shape == (1, 2, 2)


def test_sha256_sees_images_labels_and_names() -> None:
    dataset = make([0, 1, 2])
    hashes = {dataset.sha256(), make([0, 2, 1]).sha256(), make([0, 1, 2], classes=4).sha256()}
    hashes.add(Dataset(images=dataset.images + 1, labels=dataset.labels, classes=dataset.classes).sha256())
    assert len(hashes) == 4
    assert dataset.sha256() == make([0, 1, 2]).sha256()


IMAGES = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            IMAGES.float(),
            LABELS,
            "images must be uint8 of shape (N, 1 or 3, H, W), got torch.float32 (2, 1, 2, 2)",
        ),
        (IMAGES[:, 0], LABELS, "images must be uint8 of shape (N, 1 or 3, H, W), got torch.uint8 (2, 2, 2)"),
        (IMAGES.expand(2, 2, 2, 2), LABELS, "got torch.uint8 (2, 2, 2, 2)"),
        (IMAGES, LABELS.int(), "labels must be int64 of shape (N,), got torch.int32 (2,)"),
        (IMAGES, LABELS[:1], "2 images but 1 labels; each image needs one"),
        (IMAGES[:0], LABELS[:0], "no image; at least one is needed"),
        (IMAGES[..., :0], LABELS, "images without a pixel: shape (2, 1, 2, 0)"),
        (IMAGES, LABELS + 2, "labels must be in 0..1 (2 classes), got 2 at image 0 (2 such labels)"),
        (
            IMAGES,
            torch.tensor([0, -1]),
            "labels must be in 0..1 (2 classes), got -1 at image 1 (1 such labels)",
        ),
    ],
)
def test_bad_parts_are_refused(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError) as caught:
        Dataset(images=images, labels=labels, classes=("a", "b"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_splits_refuse_parts_of_different_kinds() -> None:
    a = make([0, 1, 2])
    wide = Dataset(
        images=torch.zeros(1, 1, 2, 3, dtype=torch.uint8), labels=torch.tensor([0]), classes=a.classes
    )
    with pytest.raises(DataError, match=r"test images have shape \(1, 2, 3\), training images \(1, 2, 2\)"):
        Splits(train=a, validation=a, test=wide)
    with pytest.raises(DataError, match="the validation part has other classes than the training part"):
        Splits(train=a, validation=make([0], classes=4), test=a)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_hold_out_is_a_stratified_partition(labels: list[int], share: float, seed: int) -> None:
    dataset = make(labels)
    counts = torch.tensor(labels).bincount(minlength=3).tolist()
    if max(counts) < 2:
        with pytest.raises(DataError, match="too few to hold a part out"):
            hold_out(dataset, share, generator(seed))
        return
    rest, held = hold_out(dataset, share, generator(seed))
    numbers = [part.images[:, 0, 0, 0].tolist() for part in (rest, held)]
    assert sorted(numbers[0] + numbers[1]) == list(range(len(labels)))
    assert all(part == sorted(part) for part in numbers)
    for label, count in enumerate(counts):
        expected = min(max(round(share * count), 1), count - 1) if count > 1 else 0
        assert (held.labels == label).sum() == expected


def test_hold_out_depends_on_the_generator_alone() -> None:
    dataset = make([0, 1, 2] * 20)
    first, again, other = (hold_out(dataset, 0.5, generator(seed))[1].sha256() for seed in (0, 0, 1))
    assert first == again != other


def test_unnamed_classes() -> None:
    assert unnamed_classes(torch.tensor([2, 0, 1, 1])) == ("0", "1", "2")
    with pytest.raises(DataError, match="got label 200 in a set with 3 different labels"):
        unnamed_classes(torch.tensor([0, 1, 200]))
    with pytest.raises(DataError, match="labels must be 0 or above, got -1"):
        unnamed_classes(torch.tensor([0, -1]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec(name="digit"), "data.name: unknown source 'digit'; did you mean 'digits'?"),
        (DataSpec(path="/x"), "data.path: the digits are built in, got '/x'; leave it out or set data.name"),
        (
            DataSpec(name="idx", path="x", size=8),
            "data.size: only 'folder' and 'shards' resize, not 'idx'; leave it out",
        ),
        (
            DataSpec(name="idx", path="x", channels=3),
            "data.channels: only 'folder', 'parquet' and 'shards' convert, not 'idx'; leave it out",
        ),
        (DataSpec(name="idx"), "data.path is missing; give the folder with train-images-idx3-ubyte.gz"),
        (DataSpec(name="parquet"), "data.path is missing; give the folder with train-*.parquet"),
        (
            DataSpec(name="cifar-binary"),
            "data.path is missing; give the folder unpacked from cifar-10-binary",
        ),
        (
            DataSpec(name="folder"),
            "data.path is missing; give a folder with one folder of pictures per class",
        ),
    ],
)
def test_settings_that_no_source_has(spec: DataSpec, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(spec)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["idx", "parquet", "cifar-binary", "folder"])
def test_missing_folder(name: str, tmp_path: object) -> None:
    with pytest.raises(DataError, match=r"/nowhere does not exist; give "):
        load(DataSpec(name=name, path=f"{tmp_path}/nowhere"))
    with pytest.raises(DataError, match=r"test_dataset.py is not a folder; give "):
        load(DataSpec(name=name, path=__file__))
