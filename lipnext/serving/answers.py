"""What the server answers: plain documents in which no radius stands without what it means."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from pydantic import BaseModel

from lipnext.core.bound import norm_label
from lipnext.core.certificate import Certificate
from lipnext.serving.inputs import Given

WORDS = {
    "real": "the network with exactly these weights, computed in real arithmetic, gives this label to every picture whose "
    "{norm} distance is at most the radius",
    "deployed": "the program that evaluates these weights in {arithmetic}, in any order of summation, gives this label to "
    "every picture of that type whose {norm} distance is at most the radius",
}


class Prediction(BaseModel):
    """One image."""

    label: int | None
    """Number of the class; null where the server abstains."""
    class_name: str | None
    score: float
    """Margin: logit of the label less that of the closest rival. No probability."""
    radius: float
    """Certified, in pixel units of images in [0, 1], rounded down."""
    certified_at: dict[str, bool]
    """By eps, whether radius > eps, decided exactly."""
    abstained: bool
    rival: int | None
    """The class whose boundary the bound puts nearest."""
    rival_name: str | None
    resized: bool
    preprocessing: str


class Meaning(BaseModel):
    """What the radii of an answer mean."""

    norm: str
    kind: str
    confidence: float
    semantics: str
    arithmetic: str
    statement: str
    model_sha256: str


class Predictions(Meaning):
    """The answer of /v1/predict, one prediction for each image in order."""

    predictions: list[Prediction]


class Budget(BaseModel):
    """One step of the attack's growing budget."""

    eps: float
    flipped: bool


class Attacked(Meaning):
    """The answer of /v1/attack."""

    prediction: Prediction
    budgets: list[Budget]
    distance: float | None
    """Of the closest picture found with another label, rounded up; null where none was found."""
    becomes: int | None
    becomes_name: str | None
    refuted: bool
    """Whether the label changed within the radius, which would be a bug of this library."""
    finished: bool
    """Whether the attack ran to its end in time."""
    original: list[list[list[float]]]
    changed: list[list[list[float]]] | None
    """Both pictures, (C, H, W) in [0, 1], as the model sees them."""


class Problem(BaseModel):
    """Every answer that is no success."""

    error: str


def meaning(certificate: Certificate) -> dict[str, Any]:
    """Return what the radii of a certificate mean."""
    norm = norm_label(certificate.norm)
    return {
        "norm": norm,
        "kind": certificate.kind,
        "confidence": certificate.confidence,
        "semantics": certificate.semantics,
        "arithmetic": certificate.arithmetic,
        "statement": WORDS[certificate.semantics].format(norm=norm, arithmetic=certificate.arithmetic),
        "model_sha256": certificate.model_sha256,
    }


def predictions(
    certificate: Certificate,
    given: Sequence[Given],
    classes: Sequence[str],
    eps: Mapping[str, Fraction],
    abstain_below: Fraction | None,
) -> list[dict[str, Any]]:
    """Return one document for each image.

    Args:
        certificate: of the images.
        given: the images.
        classes: names.
        eps: exact values by the text that was asked for.
        abstain_below: no label is told unless the radius is above it, strictly and exactly; None tells every label.
    """
    certified = {name: certificate.certified_at(value).tolist() for name, value in eps.items()}
    told = [True] * len(given) if abstain_below is None else certificate.certified_at(abstain_below).tolist()
    rivals: list[int | None] = (
        [None] * len(given) if certificate.rival is None else certificate.rival.tolist()
    )
    columns = (certificate.label.tolist(), certificate.margin.tolist(), certificate.radius.tolist(), rivals)
    documents = []
    for k, (label, margin, radius, rival) in enumerate(zip(*columns, strict=True)):
        shown = rival if told[k] else None
        documents.append(
            {
                "label": label if told[k] else None,
                "class_name": classes[label] if told[k] else None,
                "score": margin,
                "radius": radius,
                "certified_at": {name: values[k] for name, values in certified.items()},
                "abstained": not told[k],
                "rival": shown,
                "rival_name": None if shown is None else classes[shown],
                "resized": given[k].resized,
                "preprocessing": given[k].preprocessing,
            }
        )
    return documents
