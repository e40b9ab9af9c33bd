"""The manifest: what turns the logits that another runtime computes into a label with a certified radius.

    r = min_{j != y} (f_y - f_j - error[y][j]) / denominator[y][j],    at most largest_radius

`denominator` is `K ||w_y - w_j||`, rounded up. `error` bounds what the executed program can have added to the margin, for any
order of summation, and for semantics `deployed` also what it can add at any other point of the ball.
"""

from pathlib import Path
from typing import Any

import torch

from lipnext.certificates.margin import MarginCertifier, longest_deployed_radius
from lipnext.core.classifier import Classifier
from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import add_up, mul_up
from lipnext.deployment.bundle import CERTIFICATE, read_json
from lipnext.systems import get

FORMAT = 1
KEY = "lipnext"
"""Under which the manifest stands in the metadata of an exported file."""
# A floor keeps the quotient finite where two rows of the head coincide.
_SMALLEST_DENOMINATOR = 1e-30


def make_manifest(model: Classifier, folder: Path, arithmetic: str) -> dict[str, Any]:
    """Prove the bounds again from the weights and state them for a program in one arithmetic.

    They are those of the global margin certificate; a system of its own kind may certify larger radii than follow from them.

    Args:
        model: loaded from `folder`.
        folder: the bundle, whose `certificate.json` goes along.
        arithmetic: of the exported program, "float64" or "float32".

    Returns:
        JSON: `denominator` and `error["real"]`, `error["deployed"]` of shape (k, k), `largest_radius`, and what a radius
        must not travel without.

    Raises:
        UnsoundError: if the global margin certificate does not hold for the network, or the arithmetic has no error bound.
    """
    if get(model.system).norm != 2.0:
        raise UnsoundError(
            "cannot export a network that is certified in linf; its radii need another formula"
        )
    certifier = MarginCertifier(model.net)
    proved = certifier.describe()
    if arithmetic not in proved["ball_error"]:
        known = " or ".join(proved["ball_error"]) or "nothing"
        raise UnsoundError(
            f"cannot export in {arithmetic}: no error bound is proved for this network; export in {known}"
        )
    ball = proved["ball_error"][arithmetic]
    # The margin of an image itself: the ball's bound holds there too, whatever the arithmetic.
    own = proved["margin_error"] if arithmetic == "float64" else ball
    constant = proved["lipschitz"]["bound"]
    stated = read_json(folder / CERTIFICATE)
    return {
        "format": FORMAT,
        "system": model.system,
        "classes": list(model.classes),
        "input": {"shape": list(model.input_shape), "range": [0, 1], "preprocessing": "none"},
        "norm": "l2",
        "kind": proved["kind"],
        "confidence": 1.0,
        "arithmetic": arithmetic,
        "lipschitz": proved["lipschitz"],
        "denominator": [
            [max(mul_up(constant, d), _SMALLEST_DENOMINATOR) for d in row] for row in proved["head_distances"]
        ],
        "error": {"real": own, "deployed": _sum_up(own, ball)},
        "largest_radius": longest_deployed_radius(certifier.network),
        "model_sha256": certifier.model_sha256,
        "certificate": stated,
    }


def margin_error(manifest: dict[str, Any]) -> torch.Tensor:
    """Return the bound on the error of the exported program's margins for images in [0, 1], float64 (k, k)."""
    return torch.tensor(manifest["error"]["real"], dtype=torch.float64)


def _sum_up(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[add_up(x, y) for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]
