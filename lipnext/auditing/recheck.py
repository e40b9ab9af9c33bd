"""Search in float32, count in float64: a success is what the float64 network shows, whatever the search believed.

A search in float32 costs less than half, and its gradients point where those of float64 do. What it claims is another matter:
at the boundary float32 can see a changed label where there is none, and that must not refute a certificate.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipnext.auditing.ascent import AttackResult, Best, Logits, put, radii_of

# A point that float32 sees just behind the boundary may lie just before it; a little further along it is behind for sure.
LENGTHENED = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


def attack_in_float32(
    attack: Callable[..., AttackResult],
    searched: Logits,
    exact: Logits,
    images: Tensor,
    labels: Tensor,
    *radius: float | Tensor,
    **options: Any,
) -> AttackResult:
    """Run an attack on the network in float32 and return what float64 confirms of it.

    Images on which float32 claims a success that float64 does not see are attacked once more in float64.

    Args:
        attack: called with a network, images, labels and, where it works in a ball, the radius.
        searched: the network in float32.
        exact: the same network in float64.
        images: float64 (n, ...).
        labels: int64 (n,), the labels that should change.
        radius: of the balls, one for all or (n,); none for an attack that looks for the smallest perturbation.
        options: of the attack.

    Returns:
        Successes of `exact`, float64 images and distances.

    Raises:
        DataError, ConfigError, UnsoundError: as the attack does.
    """
    claimed = attack(searched, images.float(), labels, *radius, **options)
    limit = radii_of(radius[0], images) if radius else torch.full((len(images),), math.inf)
    best = Best(images, labels, claimed.norm, limit)
    unseen = _confirm(exact, claimed, best, box=options.get("box", False))
    if len(unseen):
        per_image = (r[unseen] if isinstance(r, Tensor) and r.dim() else r for r in radius)
        again = attack(exact, images[unseen], labels[unseen], *per_image, **options)
        with torch.no_grad():
            best.offer(unseen, again.images, exact(again.images))
    return best.result()


@torch.no_grad()
def _confirm(exact: Logits, claimed: AttackResult, best: Best, *, box: bool) -> Tensor:
    """Offer the claimed points, or points a little further along; return the indices where none is a success."""
    index = torch.nonzero(claimed.success).flatten()
    for more in LENGTHENED:
        if len(index) == 0:
            break
        segment = claimed.images[index].to(best.originals) - best.originals[index]
        points = put(best.originals[index], (1 + more) * segment, box)
        index = index[~best.offer(index, points, exact(points))]
    return index
