"""The Lipschitz constant from below: pairs of points that the map drives apart as far as can be found."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lipnext.core.bound import Estimate, norm_label
from lipnext.core.errors import ConfigError, DataError
from lipnext.core.seed import generator

NEAR = (1e-3, 1e-1, 1.0)
"""Lengths of the near pairs, in pixel units."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SteepestPair:
    """The pair with the largest ratio `||f(x) - f(x')|| / ||x - x'||` that a search has found.

    Attributes:
        estimate: that ratio, a lower bound of the Lipschitz constant up to rounding.
        first: float64 (...), x.
        last: float64 (...), x'.
    """

    estimate: Estimate
    first: Tensor
    last: Tensor


def estimate_lipschitz(
    features: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    steps: int = 60,
    seed: int = 0,
    norm: float = 2.0,
    progress: Callable[[int], None] | None = None,
) -> Estimate:
    """Estimate the Lipschitz constant from below by the ratio of `steepest_pair`; arguments and errors as there."""
    return steepest_pair(features, images, steps=steps, seed=seed, norm=norm, progress=progress).estimate


def steepest_pair(
    features: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    steps: int = 60,
    seed: int = 0,
    norm: float = 2.0,
    progress: Callable[[int], None] | None = None,
) -> SteepestPair:
    """Search for the pair with the largest `||f(x) - f(x')|| / ||x - x'||`.

    The starts are each image with a random neighbour at every length of `NEAR` and, where there are two
    images, with another image. One end of a pair then moves on the sphere around the other along the gradient
    of `||f(x) - f(x')||`, with a step for each pair that grows while it helps (for a linear map a large step
    is power iteration). Now and then the ends change roles and the pair shrinks to its steeper half: by the
    triangle inequality one half is at least as steep as the whole.

    Args:
        features: the map, (n, ...) to (n, ...), each sample on its own, differentiable, in float64.
        images: float64 (n, ...), n >= 1.
        steps: moves of each pair.
        seed: of the random neighbours.
        norm: 2.0 or inf, on both sides.
        progress: called with 1 after each step.

    Returns:
        The pair with the largest ratio seen, which is no certificate.

    Raises:
        DataError: where there is no image or it is not float64 (differences of near pairs would be noise).
        ConfigError: where steps is below 1 or the map has no gradient in the image.
        UnsoundError: for another norm.
    """
    norm_label(norm)
    if images.dtype != torch.float64 or images.dim() < 2 or len(images) == 0:
        raise DataError(
            f"an estimate needs float64 images (n, ...), n >= 1, got {images.dtype} of {tuple(images.shape)}"
        )
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    fixed, moving = _pairs(images, seed, norm)
    best = _climb(features, fixed, moving, steps, norm, progress)
    winner = int(best.ratio.argmax())
    return SteepestPair(
        estimate=Estimate(
            value=best.ratio[winner].item(), method=f"pair ascent, {len(fixed)} pairs, {steps} steps"
        ),
        first=best.first[winner],
        last=best.last[winner],
    )


class _Best:
    """The steepest pair so far, for each start."""

    def __init__(self, ratio: Tensor, first: Tensor, last: Tensor) -> None:
        self.ratio, self.first, self.last = ratio, first, last

    def offer(self, ratio: Tensor, first: Tensor, last: Tensor) -> None:
        better = ratio > self.ratio
        column = better.reshape(-1, *[1] * (first.dim() - 1))
        self.ratio = torch.where(better, ratio, self.ratio)
        self.first, self.last = torch.where(column, first, self.first), torch.where(column, last, self.last)


def _climb(
    features: Callable[[Tensor], Tensor],
    fixed: Tensor,
    moving: Tensor,
    steps: int,
    norm: float,
    progress: Callable[[int], None] | None,
) -> _Best:
    """Move the pairs and return the steepest ones seen."""
    step = torch.ones(len(fixed), dtype=torch.float64, device=fixed.device)
    ratio, pull = _ratio(features, fixed, moving, norm)
    best = _Best(ratio, fixed, moving)
    for turn in range(steps):
        candidate = _move(fixed, moving, pull, step, norm)
        new_ratio, new_pull = _ratio(features, fixed, candidate, norm)
        better = new_ratio >= ratio
        step = torch.where(better, step * 4, step / 2).clamp(1e-6, 1e6)
        column = better.reshape(-1, *[1] * (fixed.dim() - 1))
        moving, pull = torch.where(column, candidate, moving), torch.where(column, new_pull, pull)
        ratio = torch.where(better, new_ratio, ratio)
        best.offer(ratio, fixed, moving)
        if turn % 4 == 3:
            moving, fixed = _steeper_half(features, fixed, moving, norm)
            ratio, pull = _ratio(features, fixed, moving, norm)
            best.offer(ratio, fixed, moving)
        if progress is not None:
            progress(1)
    return best


def _pairs(images: Tensor, seed: int, norm: float) -> tuple[Tensor, Tensor]:
    noise = generator("estimate_lipschitz", seed)
    neighbours = []
    for length in NEAR:
        random = torch.randn(images.shape, generator=noise, dtype=images.dtype).to(images.device)
        neighbours.append(images + length * random / _length(random, norm))
    others = images.roll(1, dims=0)
    distinct = _length(others - images, norm).flatten() > 0
    first = torch.cat([images] * len(NEAR) + [images[distinct]])
    return first, torch.cat([*neighbours, others[distinct]])


def _ratio(
    features: Callable[[Tensor], Tensor], fixed: Tensor, moving: Tensor, norm: float
) -> tuple[Tensor, Tensor]:
    """Return `||f(x) - f(x')|| / ||x - x'||`, (n,), and the gradient of the numerator in `moving`."""
    moving = moving.detach().requires_grad_(True)
    with torch.no_grad():
        anchor = features(fixed)
    with torch.enable_grad():
        image = features(moving)
        gap = torch.linalg.vector_norm((image - anchor).flatten(1), ord=norm, dim=1)
        if not gap.requires_grad:
            raise ConfigError("the map has no gradient in the image; pass one that torch can differentiate")
        (gradient,) = torch.autograd.grad(gap.sum(), moving)
    ratio = gap.detach() / _length(moving.detach() - fixed, norm).flatten()
    return ratio.nan_to_num(nan=0.0, posinf=math.inf), gradient.nan_to_num(0.0, 0.0, 0.0)


def _move(fixed: Tensor, moving: Tensor, pull: Tensor, step: Tensor, norm: float) -> Tensor:
    """Add the steepest direction to the unit vector of the pair and restore the length."""
    difference = moving - fixed
    length = _length(difference, norm)
    steepest = pull.sign() if norm == math.inf else pull / _length(pull, norm)
    direction = difference / length + step.reshape(length.shape) * steepest
    return fixed + length * direction / _length(direction, norm)


def _steeper_half(
    features: Callable[[Tensor], Tensor], first: Tensor, last: Tensor, norm: float
) -> tuple[Tensor, Tensor]:
    """Return the ends of the half of each segment with the larger ratio; the shortest pairs stay whole."""
    middle = (first + last) / 2
    gain = _ratio(features, middle, last, norm)[0] - _ratio(features, first, middle, norm)[0]
    column = gain.reshape(-1, *[1] * (first.dim() - 1))
    whole = _length(last - first, norm) < 2 * min(NEAR)
    return (
        torch.where(whole | (column <= 0), first, middle),
        torch.where(whole | (column > 0), last, middle),
    )


def _length(difference: Tensor, norm: float) -> Tensor:
    """Return the norms of (n, ...) with dimensions kept, never 0."""
    size = torch.linalg.vector_norm(difference.flatten(1), ord=norm, dim=1)
    return size.clamp_min(torch.finfo(difference.dtype).tiny).reshape(-1, *[1] * (difference.dim() - 1))
