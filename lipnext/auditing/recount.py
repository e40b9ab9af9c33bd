"""What can be counted again without an attack: labels, margins, radii and shares, by other code than the certifier's.

These checks find what no attack may find: a rule that is broken on paper, but on no image of this test part. Logits are
computed again in float64; two float64 evaluations agree to about 1e-13 of their size, so that 1e-9 is generous.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from lipnext.core.certificate import Certificate
from lipnext.core.network import LipschitzNetwork

AGREEMENT = 1e-9
"""How far two float64 evaluations may lie apart, relative to 1 + the largest logit."""
ALONE = 8
"""Images that are evaluated one by one."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim that was counted again.

    Attributes:
        name: what was checked.
        holds: whether it holds for every image.
        detail: one line, with the first image for which it does not.
    """

    name: str
    holds: bool
    detail: str


@torch.no_grad()
def recount(
    network: LipschitzNetwork,
    logits: Tensor,
    images: Tensor,
    truth: Tensor,
    certificate: Certificate,
    eps: Mapping[str, Fraction],
    weights_sha256: str,
    stated: Mapping[str, Any] | None = None,
) -> list[Check]:
    """Count the certificate of some images again.

    Args:
        network: materialised, float64, in evaluation mode.
        logits: float64 (n, K), of the images.
        images: float64 (n, c, h, w).
        truth: int64 (n,), the true classes.
        certificate: of these images; radii in l2 are held against the margin formula, unless they are `per_image`.
        eps: exact values by name.
        weights_sha256: hash of the weights that are executed.
        stated: the content of `certificate.json`, where there is one.
    """
    found = [
        _labels(logits, certificate),
        _alone(network, logits, images),
        _shares(certificate, truth, eps),
        _weights(weights_sha256, certificate, stated),
    ]
    if certificate.norm == 2.0 and certificate.lipschitz is not None and not certificate.per_image:
        rows, bound = network.head.weight.detach().double().cpu(), certificate.lipschitz.value
        found += [
            _radii(rows, logits, certificate, bound),
            _slack(rows, logits, certificate, bound),
        ]
    if stated is not None:
        found += _stated(network, stated)
    return found


def _labels(logits: Tensor, certificate: Certificate) -> Check:
    """The label has the largest logit; where the radius is positive, strictly and among finite ones."""
    lead = _margins(logits, certificate.label).amin(dim=1)
    tied = lead < -_tolerance(logits, certificate)
    unproved = ~(lead > 0) | ~logits.isfinite().all(dim=1)
    wrong = tied | (unproved & (certificate.radius > 0))
    return _check("labels", wrong, "the label leads, and a tie or a non-finite logit has radius 0")


def _alone(network: LipschitzNetwork, logits: Tensor, images: Tensor) -> Check:
    """A logit depends on its own image alone, not on the batch around it."""
    count = min(ALONE, len(images))
    alone = torch.cat([network(image[None]) for image in images[:count]])
    apart = (alone - logits[:count]).abs().amax(dim=1)
    wrong = ~(apart <= AGREEMENT * _size(logits[:count]))
    return _check("batches", wrong, f"{count} images alone and in a batch give the same logits")


def _shares(certificate: Certificate, truth: Tensor, eps: Mapping[str, Fraction]) -> Check:
    """Clean accuracy, CRA and ACR, counted in rationals: certified means radius > eps, strictly."""
    right = (certificate.label == truth).tolist()
    radii = [Fraction(radius) for radius in certificate.radius.tolist()]
    n = len(radii)
    told = {
        "clean": (certificate.clean_accuracy(truth), sum(right) / n),
        "ACR": (certificate.acr(truth), float(sum(r for r, ok in zip(radii, right, strict=True) if ok) / n)),
    }
    for name, value in eps.items():
        count = sum(ok and radius > value for radius, ok in zip(radii, right, strict=True))
        told[f"CRA {name}"] = (certificate.accuracy_at(value, truth), count / n)
    for name, (said, own) in told.items():
        if not math.isclose(said, own, rel_tol=1e-12, abs_tol=0):
            return Check(name="shares", holds=False, detail=f"{name} is said to be {said!r}, counted {own!r}")
    return Check(name="shares", holds=True, detail=f"{len(told)} accuracies counted again in rationals")


def _radii(rows: Tensor, logits: Tensor, certificate: Certificate, bound: float) -> Check:
    """`K ||w_y - w_j|| r` is at most the margin to every rival."""
    # one part in 1e12 for the rounding of the distances and products
    steepness = bound * (1 - 1e-12) * _distances(rows)[certificate.label]
    margins = _margins(logits, certificate.label) + _tolerance(logits, certificate)[:, None]
    wrong = (certificate.radius > 0) & ~(steepness * certificate.radius[:, None] <= margins).all(dim=1)
    return _check("radii", wrong, "K ||w_y - w_j|| r is at most the margin to every rival")


def _slack(rows: Tensor, logits: Tensor, certificate: Certificate, bound: float) -> Check:
    """Decide in rationals: `K ||w_y - w_j|| r` is at most the stated margin, which is that of a rival j, less the slack."""
    margins, tolerance = _margins(logits, certificate.label), _tolerance(logits, certificate)
    rivals = (margins - certificate.margin[:, None]).abs() <= tolerance[:, None]
    wrong = []
    columns = (certificate.label, certificate.radius, certificate.margin, certificate.slack)
    for k, (y, radius, margin, slack) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        left, reach = Fraction(margin) - Fraction(slack), Fraction(bound) * Fraction(radius)
        covered = left >= 0 and any(
            reach**2 * _square_distance(rows[y], rows[j]) <= left**2
            for j in rivals[k].nonzero().flatten().tolist()
        )
        wrong.append(radius > 0 and not covered)
    return _check("slack", torch.tensor(wrong), "the rounding error was taken off the stated margin")


def _square_distance(row: Tensor, other: Tensor) -> Fraction:
    pairs = zip(row.tolist(), other.tolist(), strict=True)
    return sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in pairs), start=Fraction(0))


def _weights(sha256: str, certificate: Certificate, stated: Mapping[str, Any] | None) -> Check:
    """The radii, and `certificate.json` where there is one, speak of the weights that are executed."""
    said = [certificate.model_sha256] + ([] if stated is None else [str(stated.get("model_sha256"))])
    wrong = [hash for hash in said if hash != sha256]
    detail = f"weights {sha256[:12]}" + (f", the certificate speaks of {wrong[0][:12]}" if wrong else "")
    return Check(name="weights", holds=not wrong, detail=detail)


def _stated(network: LipschitzNetwork, stated: Mapping[str, Any]) -> Iterator[Check]:
    """The constants of `certificate.json` are not below what follows from its layers and the weights."""
    if "layers" in stated and "lipschitz" in stated:
        product = math.prod(Fraction(layer["bound"]) for layer in stated["layers"])
        bound = stated["lipschitz"]["bound"]
        detail = f"K {bound!r} is at least the product of the {len(stated['layers'])} stated layer bounds"
        yield Check(name="product", holds=Fraction(bound) >= product, detail=detail)
    if "head_distances" in stated:
        told = torch.tensor(stated["head_distances"], dtype=torch.float64)
        own = _distances(network.head.weight.detach().double().cpu())
        wrong = torch.tensor([True]) if told.shape != own.shape else ~(told >= own * (1 - 1e-12)).all(dim=1)
        yield _check("distances", wrong, "stated row distances are not below those of the weights", "row")


def _check(name: str, wrong: Tensor, claim: str, of: str = "image") -> Check:
    count = int(wrong.sum())
    detail = claim if count == 0 else f"not so for {count}, first {of} {int(wrong.nonzero()[0])}: {claim}"
    return Check(name=name, holds=count == 0, detail=detail)


def _margins(logits: Tensor, label: Tensor) -> Tensor:
    """Logit of the label less that of each class (n, K); inf for the label itself."""
    own = logits.gather(1, label[:, None])
    return (own - logits).scatter(1, label[:, None], math.inf)


def _distances(rows: Tensor) -> Tensor:
    """`||w_i - w_j||` in float64, (K, K), from the differences: nothing cancels."""
    return torch.stack([torch.linalg.vector_norm(rows - row, dim=1) for row in rows])


def _size(logits: Tensor) -> Tensor:
    return 1 + logits.abs().amax(dim=1)


def _tolerance(logits: Tensor, certificate: Certificate) -> Tensor:
    """(n,): `slack` bounds the error of one evaluation, and there are two."""
    return AGREEMENT * _size(logits) + 2 * certificate.slack
