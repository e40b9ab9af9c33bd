"""Sums of the absolute rows of `W W^T`: the diagonal matrix above it that SDP-based layers are scaled by.

For a symmetric matrix `G` and any positive vector `v`, `G <= diag(L)` in the order of semidefinite matrices, where
`L_i = sum_j |G_ij| v_j / v_i` (Gershgorin's theorem for `V^-1 G V`). Hence `||S^(1/2) W||^2 <= max_i S_i L_i` for any
diagonal `S >= 0`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, add_up, gamma

_U = UNIT_ROUNDOFF[torch.float64]
_TINY = 1e-290  # in each entry of the Gram matrix: covers every underflow in the sums that form it
_SMALLEST_RATIO = 1e-15  # of v_j / v_i; a larger one is sound, and keeps products with `_TINY` from underflow


def row_sums(weight: Tensor, witness: Tensor) -> Tensor:
    """Return `L_i = sum_j |W W^T|_ij v_j / v_i`, differentiable and not rounded upwards, shape `(m,)`.

    Args:
        weight: `(m, n)` of a dense layer, or `(m, c, k, k)` of a convolution of stride 1, in which case the entries of
            `W W^T` are those at all `(2 k - 1)^2` offsets.
        witness: v, shape `(m,)`, positive.
    """
    return (_gram(weight).abs().sum(-1) * (witness / witness[:, None])).sum(1)


def row_sums_up(weight: Tensor, witness: Tensor) -> Tensor:
    """Return `row_sums` rounded upwards, shape `(m,)`, float64.

    It holds for a zero-padded convolution as for one on the plane: with E the embedding of the image and P the crop of the
    output, `P C E E^T C^T P^T <= P C C^T P^T`, whose rows are parts of the rows of `C C^T`.

    Args:
        weight: as for `row_sums`; any floating dtype, taken as exact.
        witness: v, shape `(m,)`, any positive numbers.

    Raises:
        UnsoundError: if the weight or the witness holds NaN, infinity or numbers whose products overflow, or the witness
            numbers that are not positive.
    """
    w, v = weight.detach().double(), witness.detach().double()
    ratio = (v / v[:, None]).clamp_min(_SMALLEST_RATIO)
    # |G - fl(G)| <= gamma_n |W| |W|^T entry by entry; the sum of the right side over all offsets is that of the taps' sums.
    terms = math.prod(w.shape[1:])
    taps = w.abs().flatten(2).sum(-1) if w.dim() == 4 else w.abs()
    entries = _gram(w).abs().sum(-1) + gamma(terms, _U) * (taps @ taps.mT) + _TINY
    # All that is left are sums, products and a quotient of positive numbers.
    factor = add_up(1.0, gamma(4 * (terms + len(w) + 8), _U))
    sums = (entries * ratio).sum(1) * factor
    if not bool((v > 0).all()) or not bool(torch.isfinite(sums).all()):
        raise UnsoundError(
            "the weights of an SDP-based layer hold NaN, infinity or numbers that overflow; nothing can be proved about them, "
            "train again with a smaller learning rate or reload"
        )
    return sums


def _gram(weight: Tensor) -> Tensor:
    """`W W^T` at all offsets, shape `(m, m, offsets)`: as products of matrices, whose rounding is known."""
    if weight.dim() == 2:
        return (weight @ weight.mT).unsqueeze(-1)
    kernel = weight.shape[-1]
    patches = functional.unfold(weight, kernel, padding=kernel - 1)
    return weight.flatten(1) @ patches
