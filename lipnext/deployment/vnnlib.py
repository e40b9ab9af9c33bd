"""A VNN-LIB query about one image, for verifiers that know nothing of Lipschitz constants.

VNN-LIB 1.0 states linear constraints, and an l2 ball is not linear. The query asks about the box of half side `eps / sqrt(n)`
around the image, which lies inside the ball of radius eps: where the network is certified at eps, the answer is "unsat". The
converse does not hold: "unsat" says nothing about the rest of the ball, and the box around the ball, of half side eps, is far
larger than it.
"""

import math
from fractions import Fraction

from torch import Tensor

from lipnext.core.certificate import Certificate
from lipnext.core.eps import eps_label, round_down, round_up
from lipnext.core.errors import ConfigError
from lipnext.core.rounding import fraction_down

_DIGITS = 15
_SMALLEST = 1e-12


def query(image: Tensor, classes: int, certificate: Certificate, index: int, eps: Fraction) -> str:
    """Return the text of a query: can another class reach the label's logit inside the box?

    Args:
        image: (C, H, W) in [0, 1]; X_0, X_1, ... are its pixels in this order, the last dimension fastest.
        classes: k; Y_0, Y_1, ... are the logits.
        certificate: of this one image, in l2.
        index: of the image in its data set, for the comment.
        eps: l2 radius of the ball that holds the box.

    Raises:
        ConfigError: if the certificate is not a deterministic one in l2, or eps is too small to be written down.
    """
    if certificate.norm != 2.0 or certificate.kind != "deterministic":
        raise ConfigError("a query needs a deterministic certificate in l2; this network has another one")
    pixels = [Fraction(value) for value in image.double().flatten().tolist()]
    half = half_side(eps, len(pixels))
    if half < _SMALLEST:
        raise ConfigError(f"eps {eps_label(eps)} is too small to be written with {_DIGITS} digits")
    label, expected = int(certificate.label[0]), "nothing is proved at this eps"
    if bool(certificate.certified_at(eps)[0]):
        expected = "unsat, for the radius is greater than eps"
    radius = round_down(float(certificate.radius[0]), 6)
    lines = [
        f"; image {index}, label {label}, certified l2 radius {radius}, semantics {certificate.semantics}",
        f"; weights {certificate.model_sha256}",
        f"; the box of half side {half!r} lies inside the l2 ball of radius {eps_label(eps)}, and is smaller",
        f"; expected: {expected}",
        *(f"(declare-const X_{i} Real)" for i in range(len(pixels))),
        *(f"(declare-const Y_{j} Real)" for j in range(classes)),
    ]
    for i, pixel in enumerate(pixels):
        # rounded towards the image: the box must not grow
        lines.append(f"(assert (>= X_{i} {round_up(pixel - Fraction(half), _DIGITS)}))")
        lines.append(f"(assert (<= X_{i} {round_down(pixel + Fraction(half), _DIGITS)}))")
    rivals = " ".join(f"(and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label)
    return "\n".join([*lines, f"(assert (or {rivals}))", ""])


def half_side(eps: Fraction, inputs: int) -> float:
    """Return a float64 d with `inputs * d^2 <= eps^2`, the largest one or next to it."""
    half = fraction_down(eps) / math.sqrt(inputs)
    while inputs * Fraction(half) ** 2 > eps**2:
        half = math.nextafter(half, 0.0)
    return half
