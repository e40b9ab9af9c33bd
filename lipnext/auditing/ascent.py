"""What all attacks share: the result, the closest point so far, gradients, balls and the check of the input."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lipnext.core.errors import ConfigError, DataError
from lipnext.core.rounding import UNIT_ROUNDOFF

Logits = Callable[[Tensor], Tensor]
"""Images (n, ...) to logits (n, K), each image on its own, differentiable in the image."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""Logits (m, K) and the indices (m,) of their images to what an attack drives up, (m,)."""

RIVALS = 9
"""Rivals whose boundaries are compared; the nearest one is often not the runner-up's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttackResult:
    """What an attack found for each of n images.

    Attributes:
        success: bool (n,), whether some rival's logit lies strictly above the label's at `images`.
        distance: float64 (n,), norm of the perturbation, rounded up; inf where none was found.
        images: (n, ...), the adversarial images; the original where none was found.
        label: int64 (n,), the labels that were attacked.
        norm: 2.0 or inf, the norm of `distance`.
    """

    success: Tensor
    distance: Tensor
    images: Tensor
    label: Tensor
    norm: float


def rival_margin(values: Tensor, labels: Tensor) -> Tensor:
    """Return (n,): the largest rival's logit less the label's; positive where the label has changed."""
    right = values.gather(1, labels[:, None]).squeeze(1)
    return values.scatter(1, labels[:, None], -math.inf).amax(dim=1) - right


def distances(images: Tensor, others: Tensor, norm: float) -> Tensor:
    """Return float64 (n,): the norms of the differences, computed in float64 and rounded up."""
    difference = (others.double() - images.double()).flatten(1)
    if difference.shape[1] == 0:
        return difference.new_zeros(len(difference))
    measured = torch.linalg.vector_norm(difference, ord=norm, dim=1)
    # Squares underflow below 1e-154; a difference that is there at all must not count as 0.
    measured = torch.where((difference != 0).any(dim=1), measured.clamp_min(1e-150), measured)
    # Every difference, square, sum and root is rounded once; to first order that is (d + 4) / 2 roundoffs.
    return measured * (1 + (difference.shape[1] + 4) * UNIT_ROUNDOFF[torch.float64])


class Best:
    """The closest adversarial image so far, for each image."""

    def __init__(self, originals: Tensor, labels: Tensor, norm: float, limit: Tensor) -> None:
        self.originals, self.labels, self.norm = originals, labels, norm
        self.limit = limit.to(originals.device, torch.float64)
        self.images = originals.clone()
        self.distance = torch.full_like(self.limit, math.inf)

    def offer(self, index: Tensor, points: Tensor, values: Tensor) -> Tensor:
        """Keep what is adversarial and closer, and say where a point is adversarial and within the limit.

        A tie is no success: a closed ball may end on the boundary.
        """
        distance = distances(self.originals[index], points, self.norm)
        wrong = (rival_margin(values, self.labels[index]) > 0) & (distance <= self.limit[index])
        better = wrong & (distance < self.distance[index])
        self.images[index[better]] = points[better]
        self.distance[index[better]] = distance[better]
        return wrong

    def open(self) -> Tensor:
        """Return the indices of images with an adversarial one that could still come closer."""
        return torch.nonzero(self.distance.isfinite() & (self.distance > 0)).flatten()

    def result(self) -> AttackResult:
        """Return what was found."""
        return AttackResult(
            success=self.distance.isfinite(),
            distance=self.distance,
            images=self.images,
            label=self.labels,
            norm=self.norm,
        )


def nearest_rivals(logits: Logits, best: Best) -> Tensor:
    """Return (n, R) of the R <= `RIVALS` largest rivals, those whose linearised boundary is nearest first."""
    images, labels = best.originals, best.labels
    everything = torch.arange(len(images), device=images.device)
    points = images.detach().requires_grad_(True)
    with torch.enable_grad():
        values = _evaluate(logits, points)
        count = min(RIVALS, values.shape[1] - 1)
        rivals = values.detach().scatter(1, labels[:, None], -math.inf).topk(count, dim=1).indices
        gaps = []
        for rival in rivals.unbind(1):
            margin = towards(rival, labels)(values, everything)
            # One forward pass serves all rivals.
            gradient = _gradient(margin, points, retain_graph=True)
            gaps.append(-margin.detach() / dual_norm(gradient, best.norm))
    return rivals.gather(1, torch.stack(gaps, dim=1).nan_to_num(math.inf).argsort(dim=1))


def towards(target: Tensor, labels: Tensor) -> Objective:
    """The logit of the image's target less that of its label."""

    def objective(values: Tensor, index: Tensor) -> Tensor:
        pair = torch.stack([target[index], labels[index]], dim=1)
        logit = values.gather(1, pair)
        return logit[:, 0] - logit[:, 1]

    return objective


def largest_rival(labels: Tensor) -> Objective:
    """The largest rival's logit less that of the label."""
    return lambda values, index: rival_margin(values, labels[index])


def away_from(labels: Tensor) -> Objective:
    """The cross-entropy of the label."""
    return lambda values, index: functional.cross_entropy(values, labels[index], reduction="none")


def ascend(logits: Logits, points: Tensor, index: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the logits and the gradient of the objective in the images.

    Raises:
        DataError: where the logits are not those of two classes or more.
        ConfigError: where the network has no gradient in the image.
    """
    points = points.detach().requires_grad_(True)
    with torch.enable_grad():
        values = _evaluate(logits, points)
        gradient = _gradient(objective(values, index), points)
    return values.detach(), gradient


def _evaluate(logits: Logits, points: Tensor) -> Tensor:
    values = logits(points)
    if values.dim() != 2 or values.shape[1] < 2:
        raise DataError(f"an attack needs logits (n, K) of K >= 2 classes, got {tuple(values.shape)}")
    return values


def _gradient(objective: Tensor, points: Tensor, retain_graph: bool = False) -> Tensor:
    total = objective.sum()
    if not total.requires_grad:
        raise ConfigError("the network has no gradient in the image; pass one that torch can differentiate")
    (gradient,) = torch.autograd.grad(total, points, retain_graph=retain_graph)
    return gradient


def direction(gradient: Tensor, noise: torch.Generator, norm: float) -> Tensor:
    """Return the steepest direction of norm 1; a random one where the gradient vanishes or is not finite."""
    size = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    usable = column(size.isfinite() & (size > 0), gradient)
    gradient = torch.where(usable, gradient, random_like(gradient, noise))
    return rescale(gradient.sign() if norm == math.inf else gradient, 1.0, norm)


def dual_norm(gradient: Tensor, norm: float) -> Tensor:
    """Return (n,): how fast the objective rises along `direction`: the l1 norm for linf, the l2 norm for l2."""
    return torch.linalg.vector_norm(gradient.flatten(1), 1.0 if norm == math.inf else 2.0, dim=1)


def rescale(delta: Tensor, size: Tensor | float, norm: float) -> Tensor:
    """Stretch to norm `size`, shape (n, 1, ...); 0 stays 0."""
    length = torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1)
    return delta * (size / column(length.clamp_min(torch.finfo(delta.dtype).tiny), delta))


def project(delta: Tensor, size: Tensor, norm: float) -> Tensor:
    """Return the closest points in the balls of the given sizes, shape (n, 1, ...)."""
    if norm == math.inf:
        return delta.clamp(-size, size)
    length = column(torch.linalg.vector_norm(delta.flatten(1), dim=1), delta)
    return torch.where(length > size, delta * (size / length), delta)


def put(images: Tensor, delta: Tensor, box: bool) -> Tensor:
    """Add the perturbation and, where asked for, clip to [0, 1]."""
    points = images + delta
    return points.clamp(0, 1) if box else points


def random_like(like: Tensor, noise: torch.Generator) -> Tensor:
    """Draw normal numbers of the shape, type and device of `like`."""
    return torch.randn(like.shape, generator=noise, dtype=like.dtype).to(like.device)


def column(vector: Tensor, images: Tensor) -> Tensor:
    """View (n,) so that it broadcasts along images (n, ...)."""
    return vector.reshape(-1, *[1] * (images.dim() - 1))


def radii_of(radius: float | Tensor, images: Tensor) -> Tensor:
    """Return one radius for each image, float64 (n,).

    Raises:
        DataError: where there is neither one radius nor one for each, or one is negative or not finite.
    """
    radii = torch.as_tensor(radius, dtype=torch.float64, device=images.device)
    if radii.dim() > 1 or (radii.dim() == 1 and len(radii) != len(images)):
        raise DataError(
            f"radius must be one number or one for each of {len(images)} images, got {tuple(radii.shape)}"
        )
    radii = radii.expand(len(images))
    if not bool((radii.isfinite() & (radii >= 0)).all()):
        raise DataError("a radius must be finite and at least 0")
    return radii


def inner_radii(limit: Tensor, images: Tensor) -> Tensor:
    """Shrink the balls by what rounding the perturbed images can add, so that they stay within the limit."""
    pixels = images[:1].numel()
    rounding = math.sqrt(pixels) * torch.finfo(images.dtype).eps
    return (limit * (1 - 1e-9) - rounding).clamp_min(0).to(images.dtype)


def check_inputs(images: Tensor, labels: Tensor, steps: int, restarts: int = 1) -> None:
    """Refuse what no attack can start from.

    Raises:
        DataError: where images or labels do not fit.
        ConfigError: where steps or restarts are below 1.
    """
    if images.dtype not in UNIT_ROUNDOFF or images.dim() < 2:
        raise DataError(
            f"an attack needs float32 or float64 images (n, ...), got {images.dtype}, {images.dim()}-D"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise DataError(
            f"labels must be int64 of shape ({len(images)},), got {labels.dtype} of {tuple(labels.shape)}"
        )
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    if restarts < 1:
        raise ConfigError(f"restarts must be at least 1, got {restarts}")
