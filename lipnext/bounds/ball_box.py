"""The largest value of a linear form on the intersection of a ball and a box around zero.

For `R >= 0` and `lo <= 0 <= hi`, `max {d v : ||v|| <= R, lo <= v <= hi}` is at most, for every `s > 0` (weak duality),

    sum_i (d_i v_i - v_i^2 / 2s) + R^2 / 2s        with    v_i = clip(s d_i, lo_i, hi_i),

and equal to it where `||v|| = R`, or in the limit of large s where the ball does not bind. Training loops of the literature
approach the same value by rescaling what is not clipped (Lee, Lee & Park, NeurIPS 2020).
"""

import torch
from torch import Tensor

from lipnext.core.rounding import UNIT_ROUNDOFF, gamma

_TINY = 1e-290  # covers every underflow
_OCTAVES = 60.0  # of s above where nothing is clipped; what the ball adds beyond is below 2^-60 of d's share


def ball_box_maximum(form: Tensor, radius: Tensor, lower: Tensor, upper: Tensor, steps: int = 10) -> Tensor:
    """Compute the maximum, differentiable in all arguments, *not* rounded upwards.

    By the envelope theorem s needs no gradient.

    Args:
        form: d, `(..., h)`.
        radius: R, of its batch dimensions.
        lower: lo, broadcasting with the form; at most 0.
        upper: hi, at least 0.
        steps: bisections for s.
    """
    s = _scale(form, radius, lower, upper, steps)[..., None]
    v = torch.clamp(s * form, lower, upper)
    return (form * v - v.square() / (2 * s)).sum(-1) + radius.square() / (2 * s.squeeze(-1))


@torch.no_grad()
def ball_box_bound(form: Tensor, radius: Tensor, lower: Tensor, upper: Tensor, steps: int = 30) -> Tensor:
    """Bound the maximum from above, rounding included; NaN or infinite where an argument is.

    The form may be the rounded difference of two exact rows. With `S = sum |d_i v_i| + sum v_i^2 / 2s + R^2 / 2s`, all
    operations, the rounding of d, and that v was rounded, lose at most `gamma_(h + 16) S`.

    Args:
        form: d, float64 `(..., h)`.
        radius: R, at least 0.
        lower: lo, at most 0.
        upper: hi, at least 0.
        steps: bisections for s; any number gives a bound.
    """
    s = _scale(form, radius, lower, upper, steps)
    v = torch.clamp(s[..., None] * form, lower, upper)
    gain, cost = form * v, v.square().sum(-1) / (2 * s)
    ball = radius.square() / (2 * s)
    size = gain.abs().sum(-1) + cost + ball
    error = gamma(2 * form.shape[-1] + 64, UNIT_ROUNDOFF[torch.float64])
    return gain.sum(-1) - cost + ball + (size * error + _TINY)


@torch.no_grad()
def _scale(form: Tensor, radius: Tensor, lower: Tensor, upper: Tensor, steps: int) -> Tensor:
    """Bisect for the s at which `||v|| = R`, on a logarithmic scale."""
    tiny = 1e-12  # keeps s finite in float32 as well
    smallest = radius.clamp_min(tiny) / torch.linalg.vector_norm(form, dim=-1).clamp_min(tiny)
    low, high = torch.zeros_like(smallest), torch.full_like(smallest, _OCTAVES)
    for _ in range(steps):
        middle = (low + high) / 2
        s = (smallest * torch.exp2(middle))[..., None]
        length = torch.linalg.vector_norm(torch.clamp(s * form, lower, upper), dim=-1)
        inside = length <= radius
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return smallest * torch.exp2(low)
