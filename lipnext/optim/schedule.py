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
