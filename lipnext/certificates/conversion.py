"""Radii of one norm as radii of the other, by the factor that every ball obeys: `||v||_inf <= ||v||_2 <= sqrt(d) ||v||_inf`.

A ball of linf radius r holds the l2 ball of radius r, and an l2 ball of radius R the linf ball of radius `R / sqrt(d)`. Both
factors are the best that hold for all directions, and most of a radius is lost by either: a system made for a norm keeps more.
"""

import math
from dataclasses import replace

from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.rounding import mul_up, tensor_down, up


def in_norm(certificate: Certificate, norm: float, numbers: int) -> Certificate:
    """Return the certificate with its radii in another norm, rounded down; the same one if it is in that norm already.

    Args:
        certificate: of n samples.
        norm: 2.0 or inf.
        numbers: d, how many numbers an image has.
    """
    if certificate.norm == norm:
        return certificate
    factor = 1.0 if norm == 2 else up(math.sqrt(numbers))
    bound = certificate.lipschitz
    if bound is not None:
        bound = LipschitzBound(value=mul_up(bound.value, factor), norm=norm, proof="equivalent-norms")
    radius = tensor_down(certificate.radius / factor).clamp_min(0.0)
    return replace(certificate, radius=radius, norm=norm, lipschitz=bound)
