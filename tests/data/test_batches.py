import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lipnext.core.errors import ConfigError
from lipnext.core.experiment import AugmentSpec
from lipnext.data.augment import Augment
from lipnext.data.batches import Batch, batches, count_batches
from lipnext.data.dataset import Dataset

AUGMENT = Augment(AugmentSpec(flip=True, crop=1, randaugment=0.5, cutout=2))


def numbered(count: int = 23) -> Dataset:
    """Each image is filled with its own number, and labelled with it."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).clone()
    return Dataset(images=images, labels=torch.arange(count), classes=tuple(str(i) for i in range(count)))


def labels(stream: Iterator[Batch]) -> list[int]:
    return [int(label) for _, batch in stream for label in batch]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_shows_each_image_at_most_once(drop_last: bool) -> None:
    stream = list(batches(numbered(), 5, seed=0, epoch=0, drop_last=drop_last))
    assert [len(batch) for _, batch in stream] == ([5] * 4 if drop_last else [5] * 4 + [3])
    assert len(stream) == count_batches(23, 5, drop_last=drop_last)
    seen = labels(iter(stream))
    assert len(set(seen)) == len(seen)
    assert seen != sorted(seen)
    for images, batch in stream:
        assert images.dtype == torch.float32
        assert torch.equal(images * 255, batch.float()[:, None, None, None].expand_as(images))


def test_a_small_set_gives_one_smaller_batch() -> None:
    stream = list(batches(numbered(3), 256, seed=0, epoch=0))
    assert [len(batch) for _, batch in stream] == [3]
    assert count_batches(3, 256) == 1


def test_seed_and_epoch_decide_the_order() -> None:
    orders = [labels(batches(numbered(), 5, seed=s, epoch=e)) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_batches_of_one_epoch_are_augmented_differently() -> None:
    dataset = Dataset(
        images=torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8).expand(40, -1, -1, -1).clone(),
        labels=torch.zeros(40, dtype=torch.int64),
        classes=("a", "b"),
    )
    first, second = batches(dataset, 20, seed=0, epoch=0, augment=AUGMENT)
    assert not torch.equal(first[0], second[0])
    other, _ = batches(dataset, 20, seed=0, epoch=1, augment=AUGMENT)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("prefetch", "workers"), [(1, 1), (2, 1), (3, 4), (100, 3)])
def test_threads_change_nothing(prefetch: int, workers: int) -> None:
    plain = list(batches(numbered(), 2, seed=3, epoch=1, augment=AUGMENT, prefetch=0))
    ahead = list(batches(numbered(), 2, seed=3, epoch=1, augment=AUGMENT, prefetch=prefetch, workers=workers))
    assert_same(plain, ahead)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("start", range(12))
def test_start_goes_on_exactly(start: int, prefetch: int) -> None:
    settings = {"seed": 3, "epoch": 1, "augment": AUGMENT, "drop_last": False}
    whole = list(batches(numbered(), 2, **settings))
    rest = list(batches(numbered(), 2, start=start, prefetch=prefetch, **settings))
    assert_same(whole[start:], rest)


def test_start_at_the_end_gives_nothing() -> None:
    assert list(batches(numbered(), 5, seed=0, epoch=0, start=4)) == []


def test_an_error_in_a_thread_comes_out() -> None:
    def fail(images: Tensor, generator: torch.Generator) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        next(batches(numbered(), 5, seed=0, epoch=0, augment=fail))


def test_leaving_early_ends_the_threads() -> None:
    stream = batches(numbered(), 2, seed=0, epoch=0, workers=3)
    next(stream)
    assert any(thread.name.startswith("lipnext-batches") for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name.startswith("lipnext-batches") for thread in threading.enumerate())


def test_workers_on_a_cpu_take_one_thread_and_leave_the_others_theirs() -> None:
    before, seen = torch.get_num_threads(), []

    def note(images: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(torch.get_num_threads())
        return images

    torch.set_num_threads(3)
    try:
        list(batches(numbered(), 2, seed=0, epoch=0, augment=note, prefetch=2))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 3
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen[-1] == 3
    finally:
        torch.set_num_threads(before)


def test_at_most_prefetch_batches_wait() -> None:
    made = []

    def note(images: Tensor, generator: torch.Generator) -> Tensor:
        made.append(len(images))
        return images

    stream = batches(numbered(), 1, seed=0, epoch=0, augment=note, prefetch=2)
    next(stream)
    stream.close()
    assert 1 <= len(made) <= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "the batch size must be at least 1, got 0"),
        ({"start": 5}, r"the first batch must be in 0\.\.4, got 5"),
        ({"start": -1}, r"the first batch must be in 0\.\.4, got -1"),
        ({"prefetch": -1}, "prefetch must be 0 or more and workers 1 or more, got -1 and 1"),
        ({"workers": 0}, "prefetch must be 0 or more and workers 1 or more, got 2 and 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        batches(numbered(), **({"batch_size": 5, "seed": 0, "epoch": 0} | settings))
