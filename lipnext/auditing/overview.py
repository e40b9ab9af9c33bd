"""What a certificate says of a whole test part, counted: by class, by radius, by what a label was taken for."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from lipnext.core.certificate import Certificate
from lipnext.core.errors import DataError

BINS = 30
"""Most bins of a histogram of radii."""
GRID = 255
"""The curve is told at multiples of 1/255, one grey level."""


def overview(
    certificate: Certificate, truth: Tensor, classes: tuple[str, ...], eps: Mapping[str, Fraction]
) -> dict[str, Any]:
    """Return the tables of a certified test part as plain numbers, text, lists and dictionaries.

    Args:
        certificate: of all n images.
        truth: int64 (n,), the true classes, in 0..K-1.
        classes: the K names.
        eps: exact values by name, from `parse_eps_list`; radii in pixel units of images in [0, 1].

    Returns:
        `Certificate.summary`, and: `median_radius` of the right images; `certified_but_wrong`, counts by eps; `classes`, one
        row a class with its own shares; `confusion`, by eps counts (K, K + 1) of true class against certified label, the last
        column those not certified at eps; `histogram` of positive radii; `curve`, the certified accuracy on a grid of radii;
        `error_budget`, what rounding takes off.

    Raises:
        DataError: where the labels do not fit or there is no image.
    """
    summary = certificate.summary(truth, eps)  # checks the labels
    if not bool(((truth >= 0) & (truth < len(classes))).all()):
        raise DataError(
            f"labels must be in 0..{len(classes) - 1}, got {int(truth.min())}..{int(truth.max())}"
        )
    right = certificate.label == truth
    radii = certificate.radius[right]
    return {
        **summary,
        "median_radius": radii.median().item() if len(radii) else 0.0,
        "certified_but_wrong": {
            name: int((~right & certificate.certified_at(value)).sum()) for name, value in eps.items()
        },
        "classes": [_class(certificate, truth, k, name, eps) for k, name in enumerate(classes)],
        "confusion": {
            name: _confusion(certificate, truth, len(classes), certificate.certified_at(value))
            for name, value in eps.items()
        },
        "histogram": _histogram(certificate.radius, right),
        "curve": _curve(certificate, truth),
        "error_budget": _error_budget(certificate),
    }


def _class(
    certificate: Certificate, truth: Tensor, k: int, name: str, eps: Mapping[str, Fraction]
) -> dict[str, Any]:
    """The shares of one class; null where the test part has no image of it."""
    members = truth == k
    n = int(members.sum())
    right = members & (certificate.label == k)
    shares = {label: int((right & certificate.certified_at(value)).sum()) for label, value in eps.items()}
    return {
        "name": name,
        "n": n,
        "clean": int(right.sum()) / n if n else None,
        "cra": {label: count / n if n else None for label, count in shares.items()},
        "acr": math.fsum(certificate.radius[right].tolist()) / n if n else None,
    }


def _confusion(certificate: Certificate, truth: Tensor, classes: int, certified: Tensor) -> list[list[int]]:
    column = torch.where(certified, certificate.label, classes)
    counts = torch.bincount(truth * (classes + 1) + column, minlength=classes * (classes + 1))
    rows: list[list[int]] = counts.reshape(classes, classes + 1).tolist()
    return rows


def _histogram(radius: Tensor, right: Tensor) -> dict[str, list[float] | list[int]]:
    """Bins [a, b) of equal width that is a whole number of grey levels, from 0 past the largest radius."""
    largest = radius.max().item() * GRID
    width = max(1, math.ceil(largest / BINS))
    count = int(largest // width) + 1
    place = (radius * GRID / width).long().clamp(max=count - 1)
    positive = radius > 0
    return {
        "edges": [k * width / GRID for k in range(count + 1)],
        "right": torch.bincount(place[right & positive], minlength=count).tolist(),
        "wrong": torch.bincount(place[~right & positive], minlength=count).tolist(),
    }


def _curve(certificate: Certificate, truth: Tensor) -> dict[str, list[float]]:
    """The share that is right with a radius above k/255, for all k up to where none is left."""
    radii = certificate.radius[certificate.label == truth].sort().values
    last = math.ceil(radii.max().item() * GRID) if len(radii) else 0
    grid = torch.arange(last + 1, dtype=torch.float64) / GRID
    above = len(radii) - torch.searchsorted(radii, grid, right=True)
    return {"radius": grid.tolist(), "accuracy": [count / len(certificate) for count in above.tolist()]}


def _error_budget(certificate: Certificate) -> dict[str, Any]:
    """What bounds above 1 and rounding take off a radius, as shares; both are taken off already."""
    proved = certificate.lipschitz
    positive = certificate.radius > 0
    by_margin = positive & (certificate.margin > 0)
    shares = certificate.slack[by_margin] / certificate.margin[by_margin]
    return {
        "lipschitz_excess": None if proved is None else max(proved.value - 1, 0.0),
        "float_error": certificate.slack.max().item(),
        "median_margin": certificate.margin.median().item(),
        "share_of_margin_median": shares.median().item() if len(shares) else None,
        "share_of_margin_largest": shares.max().item() if len(shares) else None,
        "without_radius": int((~positive).sum()),
    }
