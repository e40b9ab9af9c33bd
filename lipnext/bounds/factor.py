"""A proved l2 norm as sharp as float64: `s I - W^T W` is shown to be almost a product `L L^T`.

Gram iteration is too large by up to `n^(1/2^(k+2))` where many singular values are nearly equal, as those of an
orthogonalised matrix are; over the depth of a network that adds up. A positive semidefinite `L L^T` says the same without
that loss, and needs no trust in how `L` was computed: only the matrix products that check it count.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from lipnext.bounds.convolution import convolution_bound
from lipnext.bounds.spectral import (
    TINY,
    as_exact,
    frobenius_up,
    mirrored,
    power_of_two,
    spectral_bound,
)
from lipnext.core.bound import LipschitzBound
from lipnext.core.rounding import UNIT_ROUNDOFF, add_up, gamma, mul_up, sqrt_up

_U = UNIT_ROUNDOFF[torch.float64]

_ABOVE = 1.0 + 2.0**-36
"""How far `s` lies above the largest eigenvalue, so that the factorisation succeeds."""

_SMALL = 1024
"""Smaller side of an operator that is factorised in about a second."""
_ENTRIES = 2**23
"""Of such an operator: 64 MB."""


def factor_bound(weight: Tensor) -> LipschitzBound:
    """Bound `||W||_2` from above, typically within 1e-11 relative.

    With `G = W^T W` and any `L`, `s I - G = L L^T + E` gives `||W||_2^2 = ||G||_2 <= s + ||E||_2`. `s` is the largest
    eigenvalue as computed, `L` the Cholesky factor as computed, and `E` is formed and bounded here, rounding included. Where
    there is no such factor, Gram iteration (`lipnext.bounds.spectral.spectral_bound`) bounds the norm.

    Args:
        weight: shape `(m, n)`, any floating dtype; taken as exact.

    Raises:
        UnsoundError: if the weight holds NaN or infinity.
    """
    w = as_exact(weight)
    scale = power_of_two(frobenius_up(w))
    w = w / scale  # exact: a power of two, up to underflow that `TINY` covers
    gram = mirrored(w.mT @ w)
    shift = torch.linalg.eigvalsh(gram)[-1].item() * _ABOVE
    target = -gram
    target.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(target)
    factor = factor.tril()
    rest = target - factor @ factor.mT
    if failed.item() or not bool(torch.isfinite(rest).all()):
        return spectral_bound(weight)
    # G errs by gamma_m |W|^T |W|, L L^T by gamma_n |L| |L|^T, the diagonal of the target and E by one rounding each. In the
    # Frobenius norm, |A| |A|^T is at most ||A||_F^2.
    m, n = w.shape
    frobenius, size = frobenius_up(w), frobenius_up(factor)
    residual = frobenius_up(rest)
    products = add_up(
        mul_up(gamma(m, _U), mul_up(frobenius, frobenius)), mul_up(gamma(n, _U), mul_up(size, size))
    )
    roundings = mul_up(gamma(1, _U), add_up(residual, frobenius_up(torch.diagonal(target))))
    excess = add_up(add_up(residual, add_up(products, roundings)), TINY)
    return LipschitzBound(value=mul_up(sqrt_up(add_up(shift, excess)), scale), norm=2.0, proof="factor")


def small_convolution_bound(
    weight: Tensor, input_size: tuple[int, int], *, stride: int = 1, padding: int = 0
) -> LipschitzBound:
    """Bound the l2 norm of a zero-padded convolution by that of its matrix where this is small, by its torus otherwise.

    The torus that a convolution is embedded in (`lipnext.bounds.convolution`) costs some percent where the image is a few
    pixels wide. The matrix has one column a pixel of the input and holds nothing but entries of the kernel, so that forming
    it rounds nothing.

    Args:
        weight: shape `(c_out, c_in, k_h, k_w)`, any floating dtype; taken as exact.
        input_size: height and width of the images, before padding.
        stride: in both directions.
        padding: zeros on all sides.

    Raises:
        ConfigError: for settings that torch refuses.
        UnsoundError: if the weight holds NaN or infinity, or its norm overflows.
    """
    pixels = weight.shape[1] * math.prod(input_size)
    sides = [
        (side + 2 * padding - k) // stride + 1 for side, k in zip(input_size, weight.shape[2:], strict=True)
    ]
    outputs = weight.shape[0] * math.prod(sides)
    finite = bool(torch.isfinite(weight).all())
    if not finite or min(sides) < 1 or min(pixels, outputs) > _SMALL or pixels * outputs > _ENTRIES:
        return convolution_bound(weight, input_size, stride=stride, padding=padding)
    # On the CPU in float64 torch multiplies and adds: every entry is one weight times one, plus zeros.
    basis = torch.eye(pixels, dtype=torch.float64).reshape(pixels, weight.shape[1], *input_size)
    kernel = weight.detach().cpu().double()
    columns = functional.conv2d(basis, kernel, stride=stride, padding=padding).flatten(1)
    return factor_bound(columns)
