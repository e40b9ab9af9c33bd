"""A search for label flips at float resolution: what rounding alone can do just inside a certified sphere.

Jin, Ohrimenko and Rubinstein, "Getting a-Round Guarantees: Floating-Point Attacks on Certified Robustness" (2022), in their
strong model: whether a point lies in the ball is decided in exact arithmetic. A certificate with semantics `real` speaks of the
real-arithmetic network and may be broken here by a program that executes in float32; one with semantics `deployed` may not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lipnext.auditing.ascent import Logits, column, rescale, rival_margin
from lipnext.auditing.attack import minimal_norm
from lipnext.auditing.exact import exact_norm_up, exact_within
from lipnext.core.certificate import Certificate
from lipnext.core.errors import ConfigError, DataError
from lipnext.core.rounding import UNIT_ROUNDOFF
from lipnext.core.seed import generator

PROPOSALS = 8
"""Neighbours of each point that are evaluated in one round."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Flip:
    """A representable point inside the certified ball that the executed program labels otherwise.

    Attributes:
        index: of the image in the batch.
        image: the point, in the type of the images.
        norm: of the perturbation, exact and then rounded up.
        label: what the executed program says, by `torch.argmax`, in the batch of the search; `certificate.label[index]` was
            certified. A matrix product may sum in another order where the batch has another size, so that the point alone may
            get its old label back; `deployed` speaks of every order.
    """

    index: int
    image: Tensor
    norm: float
    label: int


def rounding_search(
    executed: Logits,
    images: Tensor,
    certificate: Certificate,
    *,
    boundary: Tensor | None = None,
    directions: int = 4,
    rounds: int = 20,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Flip]:
    """Search the representable points near each certified sphere for one with another executed label.

    Each image gets `directions` starts just inside its sphere, the first towards the boundary point and the others at random,
    and one start at the image itself. A start then moves to neighbouring representable points, all pixels or a single one by
    a unit in the last place, wherever the executed margin of the closest rival rises. The label that `torch.argmax` gives
    decides, ties included.

    Args:
        executed: the program: images in their own type to logits (n, K), each image on its own.
        images: (n, ...) float32 or float64, exactly those that were certified.
        certificate: of these images; where the radius is 0 nothing is claimed and nothing searched.
        boundary: (n, ...) points towards which the decision boundary is near, such as `AttackResult.images`; by default
            what `minimal_norm` finds for `executed`.
        directions: starts on each sphere, at least 1.
        rounds: moves of each start, at least 1.
        seed: of directions and neighbours.
        progress: called with 1 after each round.

    Returns:
        At most one flip for each image, none for a sound certificate of the executed program.

    Raises:
        DataError: where images, boundary and certificate do not fit.
        ConfigError: where directions or rounds are below 1.
    """
    _check(images, certificate, boundary, directions, rounds)
    noise = generator("rounding_search", seed)
    index = torch.nonzero(certificate.radius > 0).flatten().to(images.device)
    originals, labels = images[index], certificate.label.to(images.device)[index]
    radius = certificate.radius.to(images.device)[index]
    if boundary is None:
        boundary = minimal_norm(
            executed, images, certificate.label.to(images.device), norm=certificate.norm
        ).images
    starts = _starts(originals, boundary.to(images)[index], radius, certificate.norm, directions, noise)

    search = _Search(executed, originals, labels, radius, certificate.norm)
    repeats = len(starts)
    owner = torch.arange(len(originals), device=images.device).repeat(repeats)
    points = torch.cat(starts)
    height = search.evaluate(owner, points)
    for turn in range(rounds):
        going = torch.tensor(
            [k not in search.flips for k in owner.tolist()], dtype=torch.bool, device=images.device
        )
        owner, points, height = owner[going], points[going], height[going]
        if len(owner):
            points, height = search.move(owner, points, height, noise, single=turn % 2 == 1)
        if progress is not None:
            progress(1)
    return [
        Flip(
            index=int(index[k]),
            image=point,
            norm=exact_norm_up(originals[k], point, certificate.norm),
            label=label,
        )
        for k, (point, label) in sorted(search.flips.items())
    ]


@torch.no_grad()
def images_near_boundary(
    logits: Logits, first: Tensor, second: Tensor, *, dtype: torch.dtype, offset: float = 0.0
) -> Tensor:
    """Return images whose margin is about as small as the rounding of `dtype`, where rounding decides the label.

    The segment between two images is halved in float64 until no float64 lies between its ends; the end with the label of
    `first` is moved back by `offset` and cast.

    Args:
        logits: the network in float64.
        first: (n, ...) images.
        second: (n, ...) images, each of another label than its partner.
        dtype: float32 or float64, of the returned images.
        offset: how far before the boundary, along the segment in the l2 norm.

    Raises:
        DataError: where the pairs do not fit or share a label.
        ConfigError: for another dtype.
    """
    if dtype not in UNIT_ROUNDOFF:
        raise ConfigError(f"images are float32 or float64, got {dtype}")
    if first.shape != second.shape:
        raise DataError(f"the images must come in pairs, got {tuple(first.shape)} and {tuple(second.shape)}")
    first, second = first.double(), second.double()
    labels = logits(first).argmax(dim=1)
    if bool((logits(second).argmax(dim=1) == labels).any()):
        raise DataError("the images of a pair must have different labels; leave out those that agree")
    low = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    high = torch.ones_like(low)
    for _ in range(64):
        middle = (low + high) / 2
        same = logits(first + column(middle, first) * (second - first)).argmax(dim=1) == labels
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    segment = second - first
    length = torch.linalg.vector_norm(segment.flatten(1), dim=1)
    place = (low - offset / length).clamp_min(0)
    return (first + column(place, first) * segment).to(dtype)


class _Search:
    """The executed program, the balls, and the flips found so far (by row of `originals`)."""

    def __init__(
        self, executed: Logits, originals: Tensor, labels: Tensor, radius: Tensor, norm: float
    ) -> None:
        self.executed, self.originals, self.labels = executed, originals, labels
        self.radius, self.norm = radius, norm
        self.flips: dict[int, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def evaluate(self, owner: Tensor, points: Tensor) -> Tensor:
        """Record flips that are exactly inside, and return the rivals' margins (m,), -inf outside of the balls."""
        if len(owner) == 0:
            return torch.zeros(0, dtype=points.dtype, device=points.device)
        values = self.executed(points)
        inside = _distance(points, self.originals[owner], self.norm) <= self.radius[owner]
        changed = values.argmax(dim=1) != self.labels[owner]
        for row in torch.nonzero(changed & inside).flatten().tolist():
            k = int(owner[row])
            if k not in self.flips and self._exactly_inside(k, points[row]):
                self.flips[k] = (points[row].clone(), int(values[row].argmax()))
        margin = rival_margin(values, self.labels[owner]).nan_to_num(-math.inf)
        return torch.where(inside, margin, -math.inf)

    def move(
        self, owner: Tensor, points: Tensor, height: Tensor, noise: torch.Generator, single: bool
    ) -> tuple[Tensor, Tensor]:
        """Replace each point by the best of its neighbours where that is not worse."""
        neighbours = [_neighbours(points, noise, single) for _ in range(PROPOSALS)]
        heights = [self.evaluate(owner, candidates) for candidates in neighbours]
        for candidates, new in zip(neighbours, heights, strict=True):
            better = (new >= height) & (new > -math.inf)
            points = torch.where(column(better, points), candidates, points)
            height = torch.where(better, new, height)
        return points, height

    def _exactly_inside(self, k: int, point: Tensor) -> bool:
        return exact_within(self.originals[k], point, float(self.radius[k]), self.norm)


def _starts(
    originals: Tensor, boundary: Tensor, radius: Tensor, norm: float, directions: int, noise: torch.Generator
) -> list[Tensor]:
    """Return the images themselves, and points just inside the spheres: towards the boundary, then at random."""
    towards = [boundary.double() - originals.double()]
    for _ in range(directions - 1):
        random = torch.randn(originals.shape, generator=noise, dtype=torch.float64).to(originals.device)
        towards.append(random.sign() if norm == math.inf else random)
    return [originals] + [_just_inside(originals, direction, radius, norm) for direction in towards]


def _just_inside(originals: Tensor, direction: Tensor, radius: Tensor, norm: float) -> Tensor:
    """Return the last point, to float resolution, on the ray that lies in the ball after it is cast."""
    low, high = torch.zeros_like(radius), torch.full_like(radius, 1 + 1e-6)
    step = rescale(direction, column(radius, direction), norm)
    for _ in range(60):
        middle = (low + high) / 2
        points = (originals.double() + column(middle, step) * step).to(originals.dtype)
        inside = _distance(points, originals, norm) <= radius
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    points = (originals.double() + column(low, step) * step).to(originals.dtype)
    return _fill_cube(points, originals, step, radius) if norm == math.inf else points


def _fill_cube(points: Tensor, originals: Tensor, step: Tensor, radius: Tensor) -> Tensor:
    """Move each pixel outwards as far as it may go by itself: the ray stopped at the first that would leave."""
    outwards = torch.where(step > 0, math.inf, -math.inf).to(points.dtype)
    for _ in range(2):
        further = torch.nextafter(points, outwards)
        allowed = (further.double() - originals.double()).abs() <= column(radius, points)
        points = torch.where(allowed & (step != 0), further, points)
    return points


def _neighbours(points: Tensor, noise: torch.Generator, single: bool) -> Tensor:
    """Move every pixel by -1, 0 or 1 unit in the last place, or one pixel of each point by -1 or 1."""
    shape = (len(points), points[:1].numel())
    moves = torch.randint(-1, 2, shape, generator=noise)
    if single:
        pixel = torch.randint(0, shape[1], (shape[0], 1), generator=noise)
        sign = 2 * torch.randint(0, 2, (shape[0], 1), generator=noise) - 1
        moves = torch.zeros(shape, dtype=torch.int64).scatter_(1, pixel, sign)
    moves = moves.reshape(points.shape).to(points.device)
    moved = torch.nextafter(points, torch.where(moves > 0, math.inf, -math.inf).to(points.dtype))
    return torch.where(moves == 0, points, moved)


def _distance(points: Tensor, originals: Tensor, norm: float) -> Tensor:
    """The norm in float64, not rounded up: it only chooses candidates, `exact_within` decides."""
    difference = (points.double() - originals.double()).flatten(1)
    return torch.linalg.vector_norm(difference, ord=norm, dim=1)


def _check(
    images: Tensor, certificate: Certificate, boundary: Tensor | None, directions: int, rounds: int
) -> None:
    if images.dtype not in UNIT_ROUNDOFF or images.dim() < 2 or len(images) != len(certificate):
        raise DataError(
            f"the search needs the {len(certificate)} certified images in float32 or float64, got "
            f"{images.dtype} of {tuple(images.shape)}"
        )
    if boundary is not None and boundary.shape != images.shape:
        raise DataError(
            f"boundary must have the images' shape {tuple(images.shape)}, got {tuple(boundary.shape)}"
        )
    for name, value in (("directions", directions), ("rounds", rounds)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
