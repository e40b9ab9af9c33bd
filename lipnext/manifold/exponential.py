"""The matrix exponential of small skew matrices by a short Taylor series (LipNeXt's FastExp)."""

import math

import torch
from torch import Tensor

# Frobenius norm below which each Taylor order is used (LipNeXt, FastExp); above the last, the exact map.
THRESHOLDS = ((0.05, 2), (0.25, 3), (1.0, 4))


def taylor_exp(direction: Tensor, order: int) -> Tensor:
    """Return the Taylor polynomial of `exp` of order 2 (one product), 3 or 4 (two products).

    For a skew `A` of spectral norm `a` the remainder is at most `a^(order+1) / (order+1)!`. The eigenvalues of
    `A` are `i t`, so `P^T P - I` has the eigenvalues `|P(i t)|^2 - 1`: `t^4/4` at order 2,
    `-t^4/12 + t^6/36` at order 3, `-t^6/72 + t^8/576` at order 4.

    Args:
        direction: skew matrices, shape `(..., n, n)`.
        order: 2, 3 or 4.
    """
    if order not in (2, 3, 4):
        raise ValueError(f"`order` must be 2, 3 or 4, got {order}.")
    a = direction.reshape(math.prod(direction.shape[:-2]), *direction.shape[-2:])
    if order == 2:
        result = torch.baddbmm(a, a, a, alpha=0.5)
    else:
        square = a @ a
        tail = a / 6 if order == 3 else (a / 6).add_(square, alpha=1 / 24)
        tail.diagonal(dim1=-2, dim2=-1).add_(0.5)
        result = torch.baddbmm(a, square, tail)
    result.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return result.view(direction.shape)


def fast_exp(direction: Tensor) -> Tensor:
    """Exponential of skew matrices as in LipNeXt: the cheaper the smaller the step.

    Each matrix of the batch takes the Taylor order that its own Frobenius norm allows (`THRESHOLDS`), so a batch gives the
    same result as its matrices one by one. At the thresholds the error in Frobenius norm is at most
    `0.05^3/6 = 2.1e-5`, `0.25^4/24 = 1.7e-4` and `1/120 = 8.4e-3`; orthogonality is lost more slowly than that
    (see `taylor_exp`), and the retraction at the end of an epoch takes it back.

    Args:
        direction: skew matrices, shape `(..., n, n)`, float32 or float64.

    Returns:
        Nearly orthogonal matrices of the same shape and dtype.
    """
    norms = torch.linalg.matrix_norm(direction)
    edges = torch.tensor([edge for edge, _ in THRESHOLDS], dtype=norms.dtype, device=norms.device)
    buckets = torch.bucketize(norms, edges, right=True)  # a norm equal to an edge takes the next order
    present = torch.unique(buckets).tolist()
    if len(present) == 1:  # the usual case: one batched call, no gather
        return _exp_of_order(direction, present[0])
    result = torch.empty_like(direction)
    for bucket in present:
        chosen = buckets == bucket
        result[chosen] = _exp_of_order(direction[chosen], bucket)
    return result


def _exp_of_order(direction: Tensor, bucket: int) -> Tensor:
    if bucket == len(THRESHOLDS):
        return torch.linalg.matrix_exp(direction)
    return taylor_exp(direction, THRESHOLDS[bucket][1])
