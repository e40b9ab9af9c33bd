"""Branch and bound over the signs of ReLU units: a local constant that tightens for as long as one wants to wait.

Wherever z is not 0 its ReLU has slope 0 or 1, and almost everywhere where z is 0, so is its gradient and with it the share of
that slope in J_1. So almost everywhere in the box the gradient belongs to one of the two halves in which a unit's slope is 0,
or 1; the largest bound of the halves holds for both, and the Lipschitz constant is the largest gradient almost everywhere.

A half keeps the boxes of activations of the whole, which hold there, too; patterns that no image has are not removed. Parts and
order are those of Shi et al. (2022): the part with the largest bound, and in it the unit with the largest score.
"""

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lipnext.certificates.clarke.jacobian import jacobian_bounds
from lipnext.certificates.clarke.layers import Layer
from lipnext.certificates.clarke.relaxation import Box

BATCH = 16
"""Parts that are split at once."""


@dataclass(frozen=True)
class Refined:
    """A bound on `||J_1||_1` over one box.

    Attributes:
        bound: the best that was proved.
        history: the proved bounds in order, none above the one before; the first is without a branch.
        parts: into which the box was split in the end.
        finished: whether no part can be split further.
    """

    bound: float
    history: tuple[float, ...]
    parts: int
    finished: bool


@dataclass(order=True)
class _Part:
    """Slopes fixed so far, `(width,)` pairs by layer; the part with the largest bound comes first."""

    negative: float
    number: int
    slopes: list[Box] = field(compare=False)
    unstable: list[Tensor] = field(compare=False)


def refine(
    layers: Sequence[Layer],
    known_slopes: Sequence[Box],
    difference: Tensor,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Refined:
    """Split ReLU units, the part with the largest bound first, until time is up or nothing is left to split.

    Args:
        layers: the network.
        known_slopes: intervals of the slopes over the box, (1, width) each.
        difference: c, (1, classes).
        seconds: time to spend; a batch of parts that has been started is finished.
        clock: to read the time from.
    """
    end = clock() + seconds
    whole = jacobian_bounds(layers, known_slopes, difference, "joint")
    known = [(low[0], high[0]) for low, high in known_slopes]
    queue = [_Part(-whole.norm.item(), 0, known, [score[0] for score in whole.unstable])]
    done = -math.inf  # the largest bound of parts that cannot be split
    history, count = [whole.norm.item()], 1
    while queue and -queue[0].negative > done and clock() < end:
        taken = [heapq.heappop(queue) for _ in range(min(BATCH, len(queue)))]
        children: list[tuple[float, list[Box]]] = []
        for part in taken:
            place = _most_unstable(layers, part)
            if place is None:
                done = max(done, -part.negative)
                continue
            children += [(-part.negative, _fixed(part.slopes, *place, slope)) for slope in (0.0, 1.0)]
        if children:
            stacked = [
                (
                    torch.stack([slopes[k][0] for _, slopes in children]),
                    torch.stack([slopes[k][1] for _, slopes in children]),
                )
                for k in range(len(known))
            ]
            found = jacobian_bounds(layers, stacked, difference.expand(len(children), -1), "joint")
            for i, ((parent, slopes), bound) in enumerate(zip(children, found.norm.tolist(), strict=True)):
                part = _Part(-min(parent, bound), count + i, slopes, [score[i] for score in found.unstable])
                heapq.heappush(queue, part)
            count += len(children)
        history.append(min(history[-1], max(done, -queue[0].negative if queue else done)))
    parts = (count + 1) // 2
    return Refined(history[-1], tuple(history), parts, finished=not queue or -queue[0].negative <= done)


def _most_unstable(layers: Sequence[Layer], part: _Part) -> tuple[int, int] | None:
    """Layer and number of the ReLU unit to split, or None where all slopes are known."""
    best, place = -1.0, None
    for k, ((low, high), score) in enumerate(zip(part.slopes, part.unstable, strict=True)):
        if layers[k].activation != "relu":
            continue
        value, unit = torch.where(low < high, score, -1.0).max(dim=0)
        if value.item() > best:
            best, place = value.item(), (k, int(unit))
    return place


def _fixed(slopes: list[Box], layer: int, unit: int, slope: float) -> list[Box]:
    low, high = (side.clone() for side in slopes[layer])
    low[unit] = high[unit] = slope
    return [*slopes[:layer], (low, high), *slopes[layer + 1 :]]
