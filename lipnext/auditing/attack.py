"""Attacks that try to break a certificate: gradient ascent in a ball, and the smallest perturbation.

An attack gives an upper bound on the distance to the decision boundary, a certificate a lower one. Where
they cross, the library is wrong. Balls are not clipped to [0, 1] unless asked for: a certificate speaks of
the whole ball, so the unclipped attack is the stronger check. Attack what the certificate speaks of, the
stored weights in float64: `net.materialise().double()` on float64 images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lipnext.core.bound import norm_label
from lipnext.core.certificate import Certificate
from lipnext.core.errors import ConfigError, DataError, UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF
from lipnext.core.seed import generator

Logits = Callable[[Tensor], Tensor]
"""Images (n, ...) to logits (n, K), each image on its own, differentiable in the image."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""Logits (m, K) and the indices (m,) of their images to what an attack drives up, (m,)."""

RIVALS = 9
"""Rivals whose boundaries are compared; the nearest one is often not the runner-up's."""
BISECTIONS = 40
# How far behind the linearised boundary a new candidate is put; a curved boundary needs the larger ones.
OVERSHOOTS = (1.001, 1.02, 1.2)


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


def violations(certificate: Certificate, result: AttackResult) -> Tensor:
    """Return the indices, int64 (m,), of images whose label was changed within the certified radius.

    None for a sound library. A probabilistic certificate may be violated with probability `1 - confidence`.

    Raises:
        UnsoundError: where the norms differ.
        DataError: where the attack was not on the certified labels.
    """
    if certificate.norm != result.norm:
        raise UnsoundError(
            f"an attack in {norm_label(result.norm)} says nothing about a radius in "
            f"{norm_label(certificate.norm)}; attack with norm={certificate.norm}"
        )
    if not torch.equal(certificate.label.cpu(), result.label.cpu()):
        raise DataError(
            "the attack was not on the certified labels; attack certificate.label on the same images"
        )
    return torch.nonzero(result.success.cpu() & (result.distance.cpu() <= certificate.radius.cpu())).flatten()


def pgd(
    logits: Logits,
    images: Tensor,
    labels_predicted: Tensor,
    radius: float | Tensor,
    *,
    steps: int = 50,
    restarts: int = 2,
    seed: int = 0,
    norm: float = 2.0,
    box: bool = False,
) -> AttackResult:
    """Search for a changed label in the closed ball around each image by projected gradient ascent.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018), with steps
    normalised to the radius that shrink to nothing. Even restarts drive towards one rival each, the nearest
    by linearisation first, odd ones raise the cross-entropy; the first starts at the image, the others at
    random. An image is left alone once its label has changed.

    Args:
        logits: the network.
        images: (n, ...) float32 or float64; the attack runs in this precision.
        labels_predicted: int64 (n,), the labels that should change.
        radius: one for all or (n,), in pixel units of images in [0, 1], at least 0.
        steps: gradient steps per restart.
        restarts: at least 1.
        seed: of the random starts.
        norm: 2.0 or inf.
        box: keep the images in [0, 1].

    Returns:
        The first success for each image, at a measured distance of at most `radius`.

    Raises:
        DataError: where images, labels or radii do not fit.
        ConfigError: where steps or restarts are below 1 or the network has no gradient in the image.
        UnsoundError: for another norm.
    """
    norm_label(norm)
    _check_inputs(images, labels_predicted, steps)
    if restarts < 1:
        raise ConfigError(f"restarts must be at least 1, got {restarts}")
    best = _Best(images, labels_predicted, norm, _radii(radius, images))
    reach = _column(_reach(best.limit, images), images)
    rivals = _nearest_rivals(logits, best)
    for restart in range(restarts):
        target = rivals[:, restart // 2 % rivals.shape[1]]
        objective = _away_from(labels_predicted) if restart % 2 else _towards(target, labels_predicted)
        noise = generator("pgd", seed, restart)
        start = _rescale(_random_like(images, noise), reach, norm) if restart else torch.zeros_like(images)
        _climb(logits, best, start, reach, objective, steps, noise, box)
    return best.result()


def minimal_norm(
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 100,
    seed: int = 0,
    box: bool = False,
    progress: Callable[[int], None] | None = None,
) -> AttackResult:
    """Search for the smallest l2 perturbation that changes each label.

    Rony et al., "Decoupling Direction and Norm" (CVPR 2019): ascend on a sphere whose radius shrinks while
    the label is changed and grows while it is not; half of the steps drive towards the nearest rival by
    linearisation, half towards the largest one at each step. Where both fail, the nearest other image with
    another label is the start. What is found is drawn back to the boundary by bisection, then moved along it
    with the boundary's linearisation (Croce and Hein, "Minimally distorted Adversarial Examples", ICML 2020).

    Args:
        logits: the network.
        images: (n, ...) float32 or float64; the attack runs in this precision.
        labels: int64 (n,), the labels that should change.
        steps: gradient steps on the sphere.
        seed: of the random directions where a gradient vanishes.
        box: keep the images in [0, 1].
        progress: called with 1 after each of the `steps`.

    Returns:
        The smallest perturbation found for each image; distance 0 where the label was not predicted at all.

    Raises:
        DataError: where images or labels do not fit.
        ConfigError: where steps is below 1 or the network has no gradient in the image.
    """
    _check_inputs(images, labels, steps)
    best = _Best(images, labels, 2.0, torch.full((len(images),), math.inf))
    if len(images) == 0:
        return best.result()
    noise = generator("minimal_norm", seed)
    nearest = _towards(_nearest_rivals(logits, best)[:, 0], labels)
    _shrink_sphere(logits, best, nearest, (steps + 1) // 2, noise, box, progress)
    _shrink_sphere(logits, best, _largest_rival(labels), steps // 2, noise, box, progress)
    _start_from_others(logits, best)
    _bisect(logits, best, BISECTIONS)
    for _ in range(5):
        _walk(logits, best, box)
        _bisect(logits, best, BISECTIONS // 3)
    _bisect(logits, best, BISECTIONS)
    return best.result()


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
    # Every difference, square, sum and root is rounded once; to first order that is (d + 4) / 2 roundoffs.
    return measured * (1 + (difference.shape[1] + 4) * UNIT_ROUNDOFF[torch.float64])


class _Best:
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
        return AttackResult(
            success=self.distance.isfinite(),
            distance=self.distance,
            images=self.images,
            label=self.labels,
            norm=self.norm,
        )


def _climb(
    logits: Logits,
    best: _Best,
    delta: Tensor,
    reach: Tensor,
    objective: Objective,
    steps: int,
    noise: torch.Generator,
    box: bool,
) -> None:
    """Ascend inside the balls from `delta`, each image until it has a success."""
    active = torch.nonzero(best.distance.isinf()).flatten()
    delta, reach = delta[active], reach[active]
    for step in range(steps + 1):
        if len(active) == 0:
            return
        images = best.originals[active]
        points = _put(images, delta, box)
        values, gradient = _ascend(logits, points, active, objective)
        going = ~best.offer(active, points, values)
        active, reach = active[going], reach[going]
        move = reach * _fading(step, steps) * _direction(gradient[going], noise, best.norm)
        delta = _project((points - images)[going] + move, reach, best.norm)


def _shrink_sphere(
    logits: Logits,
    best: _Best,
    objective: Objective,
    steps: int,
    noise: torch.Generator,
    box: bool,
    progress: Callable[[int], None] | None,
) -> None:
    """Decoupled direction and norm, with all sizes relative to the sphere's present radius."""
    images = best.originals
    everything = torch.arange(len(images), device=images.device)
    values, gradient = _ascend(logits, images, everything, objective)
    best.offer(everything, images, values)
    # The first sphere is where the linearised margin vanishes.
    slope = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    guess = -objective(values, everything) / slope
    size = _column(torch.where(guess.isfinite(), guess, 1.0).clamp(1e-4, 1e3), images)
    delta = size * _direction(gradient, noise, 2.0)
    for step in range(steps):
        points = _put(images, delta, box)
        values, gradient = _ascend(logits, points, everything, objective)
        wrong = best.offer(everything, points, values)
        fading = _fading(step, steps)
        delta = (points - images) + size * fading * _direction(gradient, noise, 2.0)
        factor = 0.02 + 0.28 * fading
        size = size * _column(torch.where(wrong, 1 / (1 + factor), 1 + factor), images)
        delta = _rescale(delta, size, 2.0)
        if progress is not None:
            progress(1)


def _start_from_others(logits: Logits, best: _Best) -> None:
    """Offer each image without a success the nearest one of the batch that the network labels otherwise."""
    missing = torch.nonzero(best.distance.isinf()).flatten()
    if len(missing) == 0:
        return
    with torch.no_grad():
        values = logits(best.originals)
    gap = torch.cdist(best.originals[missing].flatten(1), best.originals.flatten(1))
    same = values.argmax(dim=1)[None, :] == best.labels[missing][:, None]
    nearest = gap.masked_fill(same, math.inf).argmin(dim=1)
    best.offer(missing, best.originals[nearest], values[nearest])


@torch.no_grad()
def _bisect(logits: Logits, best: _Best, halvings: int) -> None:
    """Draw each success back towards its image until the segment's last stretch is 2^-halvings of it."""
    index = best.open()
    if len(index) == 0:
        return
    images, segment = best.originals[index], best.images[index] - best.originals[index]
    low = torch.zeros(len(index), dtype=images.dtype, device=images.device)
    high = torch.ones_like(low)
    for _ in range(halvings):
        middle = (low + high) / 2
        points = images + _column(middle, images) * segment
        wrong = best.offer(index, points, logits(points))
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)


def _walk(logits: Logits, best: _Best, box: bool) -> None:
    """Offer the image's projection on the boundary as it is linearised at the success, and a bit further."""
    index = best.open()
    if len(index) == 0:
        return
    images, points = best.originals[index], best.images[index]
    values, gradient = _ascend(logits, points, index, _largest_rival(best.labels))
    margin = rival_margin(values, best.labels[index])
    along = (gradient * (points - images)).flatten(1).sum(1)
    squared = gradient.flatten(1).square().sum(1).clamp_min(torch.finfo(images.dtype).tiny)
    step = _column(((along - margin) / squared).clamp_min(0), images) * gradient
    for overshoot in OVERSHOOTS:
        candidates = _put(images, overshoot * step, box)
        with torch.no_grad():
            best.offer(index, candidates, logits(candidates))


def _nearest_rivals(logits: Logits, best: _Best) -> Tensor:
    """Return (n, R) of the R <= `RIVALS` largest rivals, those whose linearised boundary is nearest first."""
    images, labels = best.originals, best.labels
    everything = torch.arange(len(images), device=images.device)
    with torch.no_grad():
        values = logits(images)
    if values.dim() != 2 or values.shape[1] < 2:
        raise DataError(f"an attack needs logits (n, K) of K >= 2 classes, got {tuple(values.shape)}")
    count = min(RIVALS, values.shape[1] - 1)
    rivals = values.scatter(1, labels[:, None], -math.inf).topk(count, dim=1).indices
    gaps = []
    for rival in rivals.unbind(1):
        objective = _towards(rival, labels)
        values, gradient = _ascend(logits, images, everything, objective)
        dual = 1.0 if best.norm == math.inf else 2.0
        gaps.append(
            -objective(values, everything) / torch.linalg.vector_norm(gradient.flatten(1), dual, dim=1)
        )
    return rivals.gather(1, torch.stack(gaps, dim=1).nan_to_num(math.inf).argsort(dim=1))


def _towards(target: Tensor, labels: Tensor) -> Objective:
    """The logit of the image's target less that of its label."""

    def objective(values: Tensor, index: Tensor) -> Tensor:
        pair = torch.stack([target[index], labels[index]], dim=1)
        logit = values.gather(1, pair)
        return logit[:, 0] - logit[:, 1]

    return objective


def _largest_rival(labels: Tensor) -> Objective:
    return lambda values, index: rival_margin(values, labels[index])


def _away_from(labels: Tensor) -> Objective:
    return lambda values, index: functional.cross_entropy(values, labels[index], reduction="none")


def _ascend(logits: Logits, points: Tensor, index: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the logits and the gradient of the objective in the images."""
    points = points.detach().requires_grad_(True)
    with torch.enable_grad():
        values = logits(points)
        total = objective(values, index).sum()
        if not total.requires_grad:
            raise ConfigError(
                "the network has no gradient in the image; pass one that torch can differentiate"
            )
        (gradient,) = torch.autograd.grad(total, points)
    return values.detach(), gradient


def _direction(gradient: Tensor, noise: torch.Generator, norm: float) -> Tensor:
    """Return the steepest direction of norm 1; a random one where the gradient vanishes or is not finite."""
    size = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    usable = _column(size.isfinite() & (size > 0), gradient)
    gradient = torch.where(usable, gradient, _random_like(gradient, noise))
    return _rescale(gradient.sign() if norm == math.inf else gradient, 1.0, norm)


def _rescale(delta: Tensor, size: Tensor | float, norm: float) -> Tensor:
    """Stretch to norm `size`, shape (n, 1, ...); 0 stays 0."""
    length = torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1)
    return delta * (size / _column(length.clamp_min(torch.finfo(delta.dtype).tiny), delta))


def _project(delta: Tensor, size: Tensor, norm: float) -> Tensor:
    if norm == math.inf:
        return delta.clamp(-size, size)
    length = _column(torch.linalg.vector_norm(delta.flatten(1), dim=1), delta)
    return torch.where(length > size, delta * (size / length), delta)


def _put(images: Tensor, delta: Tensor, box: bool) -> Tensor:
    points = images + delta
    return points.clamp(0, 1) if box else points


def _random_like(like: Tensor, noise: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=noise, dtype=like.dtype).to(like.device)


def _fading(step: int, steps: int) -> float:
    """Fall from 1 to about 0 along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def _column(vector: Tensor, images: Tensor) -> Tensor:
    """View (n,) so that it broadcasts along images (n, ...)."""
    return vector.reshape(-1, *[1] * (images.dim() - 1))


def _radii(radius: float | Tensor, images: Tensor) -> Tensor:
    radii = torch.as_tensor(radius, dtype=torch.float64, device=images.device)
    if radii.dim() > 1 or (radii.dim() == 1 and len(radii) != len(images)):
        raise DataError(
            f"radius must be one number or one for each of {len(images)} images, got {tuple(radii.shape)}"
        )
    radii = radii.expand(len(images))
    if not bool((radii.isfinite() & (radii >= 0)).all()):
        raise DataError("a radius must be finite and at least 0")
    return radii


def _reach(limit: Tensor, images: Tensor) -> Tensor:
    """Shrink the balls by what rounding the perturbed images can add, so that they stay within the limit."""
    pixels = images[:1].numel()
    rounding = math.sqrt(pixels) * torch.finfo(images.dtype).eps
    return (limit * (1 - 1e-9) - rounding).clamp_min(0).to(images.dtype)


def _check_inputs(images: Tensor, labels: Tensor, steps: int) -> None:
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
