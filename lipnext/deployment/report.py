"""The audit as one page for people: no script, no network, every number taken from the audit's document.

The page is a Jinja2 template with autoescape (extra `lipnext[report]`), its figures are inline SVG, its images data URIs.
Numbers stand in `<data>` elements with their value and place in the document; they are printed rounded to the safe side: what
is certified down, what an attack reached or a bound up.
"""

import base64
import io
import json
import shlex
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipnext.core.eps import parse_eps, round_down, round_up
from lipnext.deployment.figures import (
    attack_scatter,
    audited_accuracy,
    check_installed,
    exact_curve,
    inline_svg,
    radius_histogram,
    training_curves,
)

SIDE = 96
"""Larger pictures are drawn smaller, so that the page stays small."""
MATRIX = 20
"""Most classes of which a whole confusion matrix is shown."""
SEMANTICS = {
    "real": "The network with exactly these weights, computed in real arithmetic, gives the same label to every point of the "
    "closed ball of this radius around the image.",
    "deployed": "The program that evaluates these weights returns the same label at every point of the ball of this radius "
    "that its number type can represent.",
}
NORMS = {
    "l2": "The ball is measured in the l2 norm on pixel values in [0, 1], over all pixels and channels together: 36/255 is "
    "one pixel channel changed by 36 grey levels, or many changed by less.",
    "linf": "The ball is measured in the l-infinity norm on pixel values in [0, 1]: every pixel channel may change by up to "
    "the radius.",
}
GROUPS = {
    "least": "Least robust, label right",
    "most": "Most robust, label right",
    "wrong": "Certified, but the label is wrong",
}


def render(
    document: dict[str, Any],
    radius: Tensor,
    right: Tensor,
    pictures: Sequence[tuple[Tensor, Tensor | None]],
) -> str:
    """Return the page of an audit.

    Args:
        document: of the audit, as `lipnext audit --json` prints it.
        radius: float64 (N,), the certified radii of the whole test part, in pixel units of images in [0, 1].
        right: bool (N,), whether its labels are right.
        pictures: for each entry of `document["gallery"]` the image (c, h, w) and the closest attack on it, or None.

    Returns:
        HTML, below 3 MB for images of any size.

    Raises:
        ConfigError: where Jinja2 or matplotlib is not installed.
    """
    check_installed("jinja2", "matplotlib")
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    page = Environment(
        loader=PackageLoader("lipnext", "deployment"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    for name, form in FORMS.items():
        page.globals[name] = _number(document, form)
    figures = {name: Markup(svg) for name, svg in _figures(document, radius, right).items()}
    gallery = [
        {"entry": entry, "place": place, "drawn": _draw(image, perturbed)}
        for place, (entry, (image, perturbed)) in enumerate(zip(document["gallery"], pictures, strict=True))
    ]
    return page.get_template("report.html.jinja").render(
        document=document,
        test=document["test_part"],
        eps=list(document["cra"]),
        classes=[row["name"] for row in document["test_part"]["classes"]],
        figures=figures,
        gallery=gallery,
        groups=GROUPS,
        semantics=SEMANTICS[document["semantics"]],
        norm=NORMS[document["norm"]],
        matrix=len(document["test_part"]["classes"]) <= MATRIX,
        confusions=_confusions(document),
        name=shlex.quote(document["run"]),
        data="" if document["data"]["name"] == "digits" else " --data DIR",
    )


# ---- Numbers ----


def exact_share(share: float) -> Fraction:
    """Return the share k / n, n up to a million, that a float stands for."""
    return Fraction(share).limit_denominator(10**6)


FORMS: dict[str, Callable[[Any], str]] = {
    "share": lambda value: f"{round_down(100 * exact_share(value), 2)} %",
    "share_up": lambda value: f"{round_up(100 * exact_share(value), 2)} %",
    "down": lambda value: round_down(value, 4),
    "up": lambda value: round_up(value, 4),
    "bound": lambda value: round_up(value, 9),
    "estimate": lambda value: f"{value:.9f}",
    "small": lambda value: f"{value:.2e}",
    "count": lambda value: f"{value:,}",
    "decimal": lambda value: f"{value:.4f}",
}
"""How a number of the document is printed; certified numbers use forms that round down."""


def _number(document: dict[str, Any], form: Callable[[Any], str]) -> Callable[..., Any]:
    from markupsafe import Markup

    def number(*path: str | int) -> Any:
        value: Any = document
        for key in path:
            value = value[key]
        if value is None:
            return "–"
        element = Markup('<data value="{}" data-path="{}">{}</data>')
        return element.format(json.dumps(value), json.dumps(path), form(value))

    return number


def _confusions(document: dict[str, Any], count: int = 15) -> list[tuple[str, int, int]]:
    """The most frequent certified errors at the smallest eps: (eps, true class, label)."""
    confusion = document["test_part"]["confusion"]
    eps = min(confusion, key=parse_eps)
    rows = confusion[eps]
    wrong = [(row[j], eps, i, j) for i, row in enumerate(rows) for j in range(len(rows)) if i != j and row[j]]
    return [(eps, i, j) for _, eps, i, j in sorted(wrong, reverse=True)[:count]]


# ---- Figures ----


def _figures(document: dict[str, Any], radius: Tensor, right: Tensor) -> dict[str, str]:
    norm, n, test = document["norm"], document["n"], document["test_part"]
    samples = document["samples"]
    hits = np.array([sample["label"] == sample["pred"] for sample in samples])
    certified = np.array([sample["radius"] for sample in samples])
    distance = np.array([np.inf if s["distance"] is None else s["distance"] for s in samples])
    smallest = {"minimal-norm", "foolbox-ddn", "foolbox-fmn"} & document["closest_by"].keys()
    whole = exact_curve("certified, test part", radius.cpu().numpy(), right.cpu().numpy(), norm)
    sampled = exact_curve("certified, samples", certified, hits, norm)
    attacked = exact_curve("attacked, samples", distance, hits, norm) if smallest else None
    marks = {float(parse_eps(eps)): share for eps, share in document["attacked"].items()}
    figures = {
        "accuracy": inline_svg(
            audited_accuracy(whole, sampled, attacked, marks),
            "accuracy",
            f"Accuracy against {norm} radius: certified on {test['n']} images of the test part, certified and attacked on "
            f"{n} samples. The numbers at the radii asked for stand in the table below.",
        ),
        "scatter": inline_svg(
            attack_scatter(certified, distance, hits, norm),
            "scatter",
            f"Closest attack found against certified radius for {n} samples. "
            + (
                "All points lie above the diagonal: no attack got inside a radius."
                if document["closest"] is None or document["closest"] > 1
                else "At least one point lies below the diagonal: a radius is refuted."
            ),
        ),
        "histogram": inline_svg(
            radius_histogram(test["histogram"], norm),
            "histogram",
            f"Histogram of the certified radii of {test['n']} images, right and wrong labels apart.",
        ),
    }
    figures["training"] = ""
    if document["training"]:
        figures["training"] = inline_svg(
            training_curves({document["run"]: document["training"]}),
            "training",
            f"Loss, estimates on the validation part and drift over {len(document['training'])} epochs.",
        )
    return figures


# ---- Images ----


def _draw(image: Tensor, perturbed: Tensor | None) -> dict[str, str | None]:
    """The image, the attack clipped to [0, 1], and their difference stretched around grey, as data URIs."""
    if perturbed is None:
        return {"image": _png(image), "attack": None, "difference": None}
    difference = perturbed - image
    largest = difference.abs().max().clamp_min(1e-30)
    return {
        "image": _png(image),
        "attack": _png(perturbed),
        "difference": _png(0.5 + 0.5 * difference / largest),
    }


def _png(image: Tensor) -> str:
    from PIL import Image

    bytes_ = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(bytes_[:, :, 0] if bytes_.shape[2] == 1 else bytes_)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    content = io.BytesIO()
    picture.save(content, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
