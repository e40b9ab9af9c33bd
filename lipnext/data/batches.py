"""One epoch of training batches, functions of (seed, epoch, batch number) alone, prepared by threads."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lipnext.core.errors import ConfigError
from lipnext.core.seed import generator
from lipnext.data.dataset import ImageSet

Batch = tuple[Tensor, Tensor]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
CPU = torch.device("cpu")


def whole(count: int) -> slice:
    """Return the part of a batch of `count` images that one process alone looks at."""
    return slice(0, count)


def count_batches(size: int, batch_size: int, *, drop_last: bool = True) -> int:
    """Return the number of batches in an epoch over `size` images; a set smaller than one batch gives one."""
    if batch_size < 1:
        raise ConfigError(f"the batch size must be at least 1, got {batch_size}")
    whole, left = divmod(size, batch_size)
    return whole + 1 if left and (whole == 0 or not drop_last) else whole


def batches(
    dataset: ImageSet,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augment: Augmentation | None = None,
    start: int = 0,
    drop_last: bool = True,
    prefetch: int = 2,
    workers: int = 1,
    share: Callable[[int], slice] = whole,
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """Return an iterator over the shuffled batches `start`, `start + 1`, ... of one epoch.

    Batch b depends on `dataset`, `batch_size`, `seed`, `epoch` and b only: not on `start` (so a resumed epoch
    goes on exactly), nor on `prefetch` and `workers`.

    Args:
        dataset: what to draw from; each image at most once an epoch.
        batch_size: images in a batch.
        seed: of the run.
        epoch: number of the pass, from 0.
        augment: maps float32 images `(B, C, H, W)` and a generator to images of the same shape.
        start: number of the first batch to give.
        drop_last: leave out the last batch if it is not full; a set smaller than one batch still gives one.
        prefetch: batches prepared ahead in background threads; 0 prepares each when it is asked for.
        workers: number of those threads.
        share: the part of a batch of so many images that is looked at, such as `World.share`; the other images are not
            read and come black. What is looked at is the same, whoever reads it.
        device: where a batch is augmented and given. All random numbers are drawn on the CPU, so it is the same batch on
            every device, up to the rounding of float32 in the augmentations that compute.

    Yields:
        images float32 `(B, C, H, W)` in [0, 1] and labels int64 `(B,)`, both on `device`.

    Raises:
        ConfigError: for a batch size, number of threads or `start` out of range.
    """
    total = count_batches(len(dataset), batch_size, drop_last=drop_last)
    if not 0 <= start <= total:
        raise ConfigError(f"the first batch must be in 0..{total}, got {start}")
    if prefetch < 0 or workers < 1:
        raise ConfigError(f"prefetch must be 0 or more and workers 1 or more, got {prefetch} and {workers}")
    order = dataset.order(generator(seed, "order", epoch))

    def make(number: int) -> Batch:
        chosen = order[number * batch_size : (number + 1) * batch_size]
        mine = share(len(chosen))
        images = dataset.float_images(chosen[mine]).to(device, non_blocking=True)
        if len(images) < len(chosen):
            # Augmentation draws for the whole batch, so that a share is augmented as in it.
            own, images = images, torch.zeros(len(chosen), *dataset.shape, dtype=torch.float32, device=device)
            images[mine] = own
        if augment is not None:
            images = augment(images, generator(seed, "augment", epoch, number))
        labels = dataset.labels
        return images, labels[chosen.to(labels.device, non_blocking=True)].to(device, non_blocking=True)

    numbers = range(start, total)
    if not prefetch:
        return map(make, numbers)
    # Beside a training step on the same cores a second team of OpenMP threads costs both more than it brings.
    return _ahead(make, numbers, prefetch, workers, threads=1 if device.type == "cpu" else None)


def _ahead(
    make: Callable[[int], Batch], numbers: range, prefetch: int, workers: int, threads: int | None
) -> Iterator[Batch]:
    """Yield `make(number)` in order while workers prepare the next `prefetch`, whose errors rise here.

    `threads` is how many OpenMP threads each worker may use, None for as many as everyone.
    """
    waiting: deque[Future[Batch]] = deque()
    everyone = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers,
        thread_name_prefix="lipnext-batches",
        initializer=lambda: torch.set_num_threads(threads or everyone),
    )
    try:
        for number in numbers:
            waiting.append(pool.submit(make, number))
            if len(waiting) > prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # Each call sets the number of its own thread, and that of all threads to come.
        torch.set_num_threads(everyone)
