"""The attack behind "try to break it": budgets around the certified radius, then the closest change of the label."""

import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipnext.auditing.ascent import AttackResult
from lipnext.auditing.attack import minimal_norm, pgd
from lipnext.core.certificate import Certificate
from lipnext.core.network import LipschitzNetwork
from lipnext.serving.limits import Shed

BUDGETS = (0.5, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""In certified radii."""
WITHOUT_RADIUS = 0.1
"""Stands in for a radius that is 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Broken:
    """What was found against one image.

    Attributes:
        budgets: pairs of an eps and whether a picture with another label was found within it.
        distance: of the closest such picture, rounded up; None where there is none.
        image: that picture, float64 (C, H, W) in [0, 1].
        label: which class it has become.
        finished: whether the attack ran to its end in time.
    """

    budgets: list[tuple[float, bool]]
    distance: float | None
    image: Tensor | None
    label: int | None
    finished: bool


class Attacker:
    """Attacks one image after the other in a thread of its own, with a copy of the network of its own.

    Args:
        net: the classifier's network; what is attacked are its stored weights in float64.
        seconds: after which an attack is cut short.
        capacity: attacks that may wait for the one that runs.
    """

    def __init__(self, net: nn.Module, seconds: float, capacity: int) -> None:
        exact = net.materialise() if isinstance(net, LipschitzNetwork) else copy.deepcopy(net)
        self._network = exact.double().requires_grad_(False)
        self._seconds = seconds
        self._places = threading.BoundedSemaphore(1 + capacity)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="attack")

    def submit(self, image: Tensor, certificate: Certificate) -> "Future[Broken]":
        """Queue an attack on one image, float64 (C, H, W), with its certificate of one sample.

        Raises:
            Shed: where too many wait.
        """
        if not self._places.acquire(blocking=False):
            raise Shed("attacks", "other attacks are running")
        future = self._pool.submit(break_label, self._network, image, certificate, self._seconds)
        future.add_done_callback(lambda _: self._places.release())
        return future

    def close(self) -> None:
        """Let the attack that runs end and drop those that wait."""
        self._pool.shutdown(cancel_futures=True)


class _OutOfTime(Exception):
    pass


def break_label(
    network: Callable[[Tensor], Tensor], image: Tensor, certificate: Certificate, seconds: float
) -> Broken:
    """Search for pictures in [0, 1] with another label than the certified one, and for the closest of them.

    All budgets are attacked together by `auditing.attack.pgd`; then `minimal_norm` looks for the closest one.

    Args:
        network: images to logits, in float64.
        image: float64 (C, H, W).
        certificate: of this image alone.
        seconds: time allowed; what was found until then is returned.
    """
    deadline = time.monotonic() + seconds

    def logits(points: Tensor) -> Tensor:
        if time.monotonic() > deadline:
            raise _OutOfTime
        return network(points)

    radius, norm = certificate.radius.item(), certificate.norm
    unit = radius if radius > 0 else WITHOUT_RADIUS
    sizes = torch.tensor([unit * factor for factor in BUDGETS], dtype=torch.float64)
    copies = image.expand(len(BUDGETS), *image.shape)
    results: list[AttackResult] = []
    finished = True
    try:
        results.append(
            pgd(logits, copies, certificate.label.expand(len(BUDGETS)), sizes, norm=norm, box=True)
        )
        results.append(minimal_norm(logits, image[None], certificate.label, norm=norm, box=True))
    except _OutOfTime:
        finished = False
    found = [
        (distance, result.images[k])
        for result in results
        for k, distance in enumerate(result.distance.tolist())
        if result.success[k]
    ]
    distance, closest = min(found, key=lambda pair: pair[0], default=(None, None))
    becomes = None
    if closest is not None:
        with torch.no_grad():
            values = network(closest[None])
        becomes = int(values.scatter(1, certificate.label[:, None], -torch.inf).argmax())
    return Broken(
        budgets=[(size, distance is not None and distance <= size) for size in sizes.tolist()],
        distance=distance,
        image=closest,
        label=becomes,
        finished=finished,
    )
