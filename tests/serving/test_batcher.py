"""The queue: every request gets its own rows, once, in whichever batches they were evaluated."""

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.serving.batcher import Batcher
from lipnext.serving.limits import Shed


def echo(images: Tensor) -> Certificate:
    """A certificate whose radii are the images' first pixels."""
    first = images.flatten(1)[:, 0].double()
    return Certificate(
        label=torch.zeros(len(images), dtype=torch.int64),
        radius=first,
        margin=first,
        slack=torch.zeros_like(first),
        rival=torch.arange(len(images)),
        norm=2.0,
        kind="deterministic",
        confidence=1.0,
        semantics="real",
        lipschitz=LipschitzBound(value=1.0, norm=2.0, proof="isometry"),
        model_sha256="0" * 64,
    )


def request(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=20), st.integers(1, 9))
def test_every_request_gets_its_own_rows(sizes: list[int], batch_size: int) -> None:
    seen: list[int] = []

    def counted(images: Tensor) -> Certificate:
        seen.append(len(images))
        return echo(images)

    batcher = Batcher(counted, batch_size, wait_seconds=0.001)
    start, futures = 0, []
    for size in sizes:
        futures.append((start, size, batcher.submit(request(*range(start, start + size)))))
        start += size
    for begin, size, future in futures:
        assert future.result(10).radius.tolist() == list(range(begin, begin + size))
    batcher.close()
    assert sum(seen) == sum(sizes)
    assert all(count <= max(batch_size, *sizes) for count in seen)


def test_requests_that_come_together_are_evaluated_together() -> None:
    sizes: list[int] = []
    begin, first = threading.Event(), threading.Event()

    def slow(images: Tensor) -> Certificate:
        sizes.append(len(images))
        first.set()
        assert begin.wait(10)
        return echo(images)

    batcher = Batcher(slow, 8, wait_seconds=0)
    batcher.submit(request(0))
    assert first.wait(10)
    futures = [batcher.submit(request(k)) for k in range(1, 11)]
    assert batcher.waiting == 10
    begin.set()
    assert [future.result(10).radius.item() for future in futures] == list(range(1, 11))
    batcher.close()
    assert sizes == [1, 8, 2]


def test_what_does_not_fit_is_shed_and_the_rest_is_answered() -> None:
    begin = threading.Event()

    def held(images: Tensor) -> Certificate:
        assert begin.wait(10)
        return echo(images)

    batcher = Batcher(held, 1, wait_seconds=0, capacity=3)
    running = batcher.submit(request(0))
    while batcher.waiting:
        time.sleep(0.001)
    waiting = batcher.submit(request(1, 2, 3))
    with pytest.raises(Shed, match="3 images wait already; try again") as shed:
        batcher.submit(request(4))
    assert (shed.value.status, shed.value.reason) == (429, "queue")
    begin.set()
    assert running.result(10).radius.tolist() == [0]
    assert waiting.result(10).radius.tolist() == [1, 2, 3]
    batcher.close()


def test_a_cancelled_request_is_dropped_and_disturbs_nobody() -> None:
    begin = threading.Event()

    def held(images: Tensor) -> Certificate:
        assert begin.wait(10)
        return echo(images)

    batcher = Batcher(held, 2, wait_seconds=0)
    batcher.submit(request(0))
    while batcher.waiting:
        time.sleep(0.001)
    gone, stays = batcher.submit(request(1)), batcher.submit(request(2))
    assert gone.cancel()
    begin.set()
    assert stays.result(10).radius.tolist() == [2]
    with pytest.raises(CancelledError):
        gone.result(0)
    batcher.close()


def test_an_error_reaches_those_it_concerns_and_the_thread_lives_on() -> None:
    def fussy(images: Tensor) -> Certificate:
        if bool((images == 13).any()):
            raise ValueError("thirteen")
        return echo(images)

    batcher = Batcher(fussy, 1, wait_seconds=0)
    bad, good = batcher.submit(request(13)), batcher.submit(request(1))
    with pytest.raises(ValueError, match="thirteen"):
        bad.result(10)
    assert good.result(10).radius.tolist() == [1]
    assert batcher.alive
    batcher.close()
    assert not batcher.alive


def test_closing_answers_what_waits_and_takes_no_more() -> None:
    batcher = Batcher(echo, 2, wait_seconds=0.05)
    futures = [batcher.submit(request(k)) for k in range(9)]
    batcher.close()
    assert [future.result(0).radius.item() for future in futures] == list(range(9))
    with pytest.raises(Shed, match="stopping"):
        batcher.submit(request(0))
