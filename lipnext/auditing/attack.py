"""Attacks that try to break a certificate: gradient ascent in a ball, and the smallest perturbation.

An attack gives an upper bound on the distance to the decision boundary, a certificate a lower one. Where
they cross, the library is wrong. Balls are not clipped to [0, 1] unless asked for: a certificate speaks of
the whole ball, so the unclipped attack is the stronger check. Attack what the certificate speaks of, the
stored weights in float64: `net.materialise().double()` on float64 images.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipnext.auditing.ascent import (
    AttackResult,
    Best,
    Logits,
    Objective,
    ascend,
    away_from,
    check_inputs,
    column,
    direction,
    dual_norm,
    inner_radii,
    largest_rival,
    nearest_rivals,
    project,
    put,
    radii_of,
    random_like,
    rescale,
    rival_margin,
    towards,
)
from lipnext.core.bound import norm_label
from lipnext.core.certificate import Certificate
from lipnext.core.errors import DataError, UnsoundError
from lipnext.core.seed import generator

# As many as the precision can tell apart, beyond what the result needs.
BISECTIONS = {torch.float32: 18, torch.float64: 40}
# One rival is too few: on the digits the nearest boundary was often that of the second or third.
AIMED_AT = 3
# How far behind the linearised boundary a new candidate is put; a curved boundary needs the larger ones.
OVERSHOOTS = (1.001, 1.02, 1.2)


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
    check_inputs(images, labels_predicted, steps, restarts)
    best = Best(images, labels_predicted, norm, radii_of(radius, images))
    reach = column(inner_radii(best.limit, images), images)
    rivals = nearest_rivals(logits, best)
    for restart in range(restarts):
        target = rivals[:, restart // 2 % rivals.shape[1]]
        objective = away_from(labels_predicted) if restart % 2 else towards(target, labels_predicted)
        noise = generator("pgd", seed, restart)
        start = rescale(random_like(images, noise), reach, norm) if restart else torch.zeros_like(images)
        _climb(logits, best, start, reach, objective, steps, noise, box)
    return best.result()


def minimal_norm(
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 100,
    seed: int = 0,
    norm: float = 2.0,
    box: bool = False,
    progress: Callable[[int], None] | None = None,
) -> AttackResult:
    """Search for the smallest perturbation that changes each label.

    Rony et al., "Decoupling Direction and Norm" (CVPR 2019): ascend on a sphere whose radius shrinks while
    the label is changed and grows while it is not; half of the steps drive towards the three rivals that are
    nearest by linearisation, one after the other, half towards the largest one at each step. Where both fail,
    the nearest other image with another label is the start. What is found is drawn back to the boundary by
    bisection, then moved along it with the boundary's linearisation (Croce and Hein, "Minimally distorted
    Adversarial Examples", ICML 2020). In linf the sphere becomes a ball and the gradient its sign (Pintor et
    al., "Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints", NeurIPS 2021).

    Args:
        logits: the network.
        images: (n, ...) float32 or float64; the attack runs in this precision.
        labels: int64 (n,), the labels that should change.
        steps: gradient steps on the sphere.
        seed: of the random directions where a gradient vanishes.
        norm: 2.0 or inf.
        box: keep the images in [0, 1].
        progress: called with 1 after each of the `steps`.

    Returns:
        The smallest perturbation found for each image; distance 0 where the label was not predicted at all.

    Raises:
        DataError: where images or labels do not fit.
        ConfigError: where steps is below 1 or the network has no gradient in the image.
        UnsoundError: for another norm.
    """
    norm_label(norm)
    check_inputs(images, labels, steps)
    best = Best(images, labels, norm, torch.full((len(images),), math.inf))
    if len(images) == 0:
        return best.result()
    noise = generator("minimal_norm", seed)
    rivals = nearest_rivals(logits, best)[:, :AIMED_AT]
    each, rest = divmod(steps // 2, rivals.shape[1])
    for k, rival in enumerate(rivals.unbind(1)):
        _shrink_sphere(logits, best, towards(rival, labels), each + (k < rest), noise, box, progress)
    _shrink_sphere(logits, best, largest_rival(labels), (steps + 1) // 2, noise, box, progress)
    _start_from_others(logits, best)
    halvings = BISECTIONS[images.dtype]
    _bisect(logits, best, halvings)
    for _ in range(5):
        _walk(logits, best, noise, box)
        _bisect(logits, best, halvings // 3)
    _bisect(logits, best, halvings)
    return best.result()


def _climb(
    logits: Logits,
    best: Best,
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
        points = put(images, delta, box)
        values, gradient = ascend(logits, points, active, objective)
        going = ~best.offer(active, points, values)
        active, reach = active[going], reach[going]
        move = reach * _fading(step, steps) * direction(gradient[going], noise, best.norm)
        delta = project((points - images)[going] + move, reach, best.norm)


def _shrink_sphere(
    logits: Logits,
    best: Best,
    objective: Objective,
    steps: int,
    noise: torch.Generator,
    box: bool,
    progress: Callable[[int], None] | None,
) -> None:
    """Decoupled direction and norm, with all sizes relative to the sphere's present radius."""
    images = best.originals
    everything = torch.arange(len(images), device=images.device)
    values, gradient = ascend(logits, images, everything, objective)
    best.offer(everything, images, values)
    # The first sphere is where the linearised margin vanishes.
    guess = -objective(values, everything) / dual_norm(gradient, best.norm)
    size = column(torch.where(guess.isfinite(), guess, 1.0).clamp(1e-4, 1e3), images)
    delta = size * direction(gradient, noise, best.norm)
    for step in range(steps):
        points = put(images, delta, box)
        values, gradient = ascend(logits, points, everything, objective)
        wrong = best.offer(everything, points, values)
        fading = _fading(step, steps)
        delta = (points - images) + size * fading * direction(gradient, noise, best.norm)
        factor = 0.02 + 0.28 * fading
        size = torch.where(column(wrong, images), size / (1 + factor), size * (1 + factor))
        # On the sphere in l2; in linf only few points of the ball have all pixels at its border.
        delta = project(delta, size, math.inf) if best.norm == math.inf else rescale(delta, size, 2.0)
        if progress is not None:
            progress(1)


def _start_from_others(logits: Logits, best: Best) -> None:
    """Offer each image without a success the nearest one of the batch that the network labels otherwise."""
    missing = torch.nonzero(best.distance.isinf()).flatten()
    if len(missing) == 0:
        return
    with torch.no_grad():
        values = logits(best.originals)
    gap = torch.cdist(best.originals[missing].flatten(1), best.originals.flatten(1), p=best.norm)
    same = values.argmax(dim=1)[None, :] == best.labels[missing][:, None]
    nearest = gap.masked_fill(same, math.inf).argmin(dim=1)
    best.offer(missing, best.originals[nearest], values[nearest])


@torch.no_grad()
def _bisect(logits: Logits, best: Best, halvings: int) -> None:
    """Draw each success back towards its image until the segment's last stretch is 2^-halvings of it."""
    index = best.open()
    if len(index) == 0:
        return
    images, segment = best.originals[index], best.images[index] - best.originals[index]
    low = torch.zeros(len(index), dtype=images.dtype, device=images.device)
    high = torch.ones_like(low)
    for _ in range(halvings):
        middle = (low + high) / 2
        points = images + column(middle, images) * segment
        wrong = best.offer(index, points, logits(points))
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)


def _walk(logits: Logits, best: Best, noise: torch.Generator, box: bool) -> None:
    """Offer the image's projection on the boundary as it is linearised at the success, and a bit further."""
    index = best.open()
    if len(index) == 0:
        return
    images, points = best.originals[index], best.images[index]
    values, gradient = ascend(logits, points, index, largest_rival(best.labels))
    margin = rival_margin(values, best.labels[index])
    along = (gradient * (points - images)).flatten(1).sum(1)
    slope = dual_norm(gradient, best.norm).clamp_min(torch.finfo(images.dtype).tiny)
    size = column(((along - margin) / slope).clamp_min(0), images)
    step = size * direction(gradient, noise, best.norm)
    for overshoot in OVERSHOOTS:
        candidates = put(images, overshoot * step, box)
        with torch.no_grad():
            best.offer(index, candidates, logits(candidates))


def _fading(step: int, steps: int) -> float:
    """Fall from 1 to about 0 along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
