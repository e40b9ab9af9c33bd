"""Schedules: pure functions of the step."""

import math


def warmup_cosine(step: int, total: int, warmup: float, final: float) -> float:
    """Return the factor on the peak learning rate: linear warm-up, then a cosine down to `final`.

    Args:
        step: 0 <= step < total.
        total: number of steps.
        warmup: share of the steps, 0 <= warmup < 1.
        final: factor at the end.
    """
    ramp = warmup * total
    if step < ramp:
        return (step + 1) / (ramp + 1)
    progress = (step - ramp) / max(total - ramp, 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def linear_ramp(progress: float, start: float, end: float, share: float) -> float:
    """Go from `start` to `end` linearly while `progress` goes from 0 to `share`, then stay.

    LiResNet ramps the training radius from 0.1 to 3 times 36/255 over the first half.
    """
    return start + (end - start) * (min(progress / share, 1.0) if share > 0 else 1.0)


def share_of(progress: float, first: float, last: float) -> float:
    """Return how much of the stretch from `first` to `last` is over at `progress`, in [0, 1]."""
    return min(max((progress - first) / (last - first), 0.0), 1.0)


def geometric(share: float, start: float, end: float) -> float:
    """Go from `start` to `end`, both above 0, by equal factors while `share` goes from 0 to 1."""
    return start * (end / start) ** share


def growing_exponent(share: float, start: float, end: float) -> float:
    """The exponent of an lp norm: from `start` to `end` by equal factors, and infinite where `share` reaches 1."""
    return math.inf if share >= 1 else geometric(share, start, end)


def smooth_ramp(progress: float, bend: float = 0.4) -> float:
    """Go from 0 to 1: as the fourth power of `progress` up to `bend`, then straight with the same slope."""
    k = 1 / ((4 - 3 * bend) * bend**3)
    if progress < bend:
        return k * progress**4
    return (1 - k * bend**4) / (1 - bend) * (progress - 1) + 1
