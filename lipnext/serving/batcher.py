"""Micro-batching: one thread owns the model and evaluates what has gathered in a queue."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from lipnext.core.certificate import Certificate
from lipnext.serving.limits import Shed


@dataclass
class _Job:
    images: Tensor
    answer: "Future[Certificate]"


class Batcher:
    """Gathers requests into batches and gives each the part of the certificate that is its own.

    Args:
        certify: evaluates images (n, C, H, W); called in one thread only.
        batch_size: at which a batch is evaluated without waiting for more; larger requests are evaluated alone.
        wait_seconds: how long the first request of a batch waits for others.
        capacity: images that may wait; a request beyond it is shed.
    """

    def __init__(
        self,
        certify: Callable[[Tensor], Certificate],
        batch_size: int = 32,
        wait_seconds: float = 0.002,
        capacity: int = 512,
    ) -> None:
        self._certify, self._batch_size, self._wait, self._capacity = (
            certify,
            batch_size,
            wait_seconds,
            capacity,
        )
        self._jobs: deque[_Job] = deque()
        self._waiting = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait."""
        return self._waiting

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, images: Tensor) -> "Future[Certificate]":
        """Queue the images of one request, float64 (n, C, H, W), n >= 1.

        Raises:
            Shed: where too many wait.
        """
        job = _Job(images, Future())
        with self._changed:
            if self._closed:
                raise Shed("stopping", "the server is stopping")
            if self._waiting + len(images) > self._capacity:
                raise Shed("queue", f"{self._waiting} images wait already")
            self._jobs.append(job)
            self._waiting += len(images)
            self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Evaluate what waits and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while gathered := self._gather():
            # A request whose client has gone is dropped here; one that has begun cannot be cancelled any more.
            jobs = [job for job in gathered if job.answer.set_running_or_notify_cancel()]
            if jobs:
                self._answer(jobs)

    def _answer(self, jobs: list[_Job]) -> None:
        try:
            certificate = self._certify(torch.cat([job.images for job in jobs]))
        except Exception as error:
            for job in jobs:
                job.answer.set_exception(error)
            return
        start = 0
        for job in jobs:
            stop = start + len(job.images)
            job.answer.set_result(certificate[start:stop])
            start = stop

    def _gather(self) -> list[_Job]:
        """Return the next jobs, in the order they came; none if the queue is closed and empty."""
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            deadline = time.monotonic() + self._wait
            while self._waiting < self._batch_size and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            jobs: list[_Job] = []
            count = 0
            while self._jobs and (not jobs or count + len(self._jobs[0].images) <= self._batch_size):
                jobs.append(self._jobs.popleft())
                count += len(jobs[-1].images)
            self._waiting -= count
            return jobs
