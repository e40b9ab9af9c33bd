"""Norms of one matrix with rows and columns masked out, sample by sample, from above, rounding included."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lipnext.bounds.spectral import TINY, mirrored, power_of_two
from lipnext.core.rounding import UNIT_ROUNDOFF, add_up, gamma

_U = UNIT_ROUNDOFF[torch.float64]

_CHUNK = 2**22  # numbers in the masked matrices that are formed at once

Map = Callable[[Tensor], Tensor]


@torch.no_grad()
def masked_gram_bounds(
    matrix: Tensor, rows: Tensor, columns: Tensor, largest: int, squarings: int = 6
) -> Tensor:
    """Bound `||diag(rows_b) W diag(columns_b)||_2` for each b by Gram iteration on what is left of the matrix.

    `||M||_2^2 = ||M M^T||_2`, and `||G||_2^2 = ||G^2||_2 <= ||fl(G^2)||_2 + gamma_n ||G||_F^2` for symmetric G, the last norm
    being that of Frobenius (Delattre et al. 2023). The excess is below a factor `n^(1/2^(squarings + 2))`.

    Args:
        matrix: W, float64 `(m, n)`; taken as exact.
        rows: bool `(b, m)`.
        columns: bool `(b, n)`.
        largest: the smaller side, up to which masked matrices are formed; beyond, the bound is inf.
        squarings: how many times each Gram matrix is squared.

    Returns:
        Float64 `(b,)`.
    """
    bounds = matrix.new_full((len(rows),), math.inf)
    scale = power_of_two(matrix.abs().max().item())
    # exact, up to underflow that `TINY` covers; a row and a column of zeros to pad with
    padded = functional.pad(matrix / scale, (0, 1, 0, 1))
    sides = torch.stack([rows.sum(1), columns.sum(1)])
    small = (sides.amin(0) <= largest).nonzero().squeeze(1)
    # Samples of similar size are padded to the same one.
    todo = small[sides[:, small].prod(0).argsort()]
    while len(todo):
        height, width = sides[:, todo[-1]].clamp_min(1).tolist()
        count = max(1, _CHUNK // (height * width))
        part, todo = todo[-count:], todo[:-count]
        row, column = _indices(rows[part]), _indices(columns[part])
        stack = padded[row[:, :, None], column[:, None, :]]
        bounds[part] = _norms_up(stack if stack.shape[1] <= stack.shape[2] else stack.mT, squarings)
    return bounds * (scale * add_up(1.0, gamma(2, _U)))


def _indices(mask: Tensor) -> Tensor:
    """Where each mask is true, `(b, most)`, padded with the index behind the last one."""
    most = max(1, int(mask.sum(1).max()))
    index = mask.to(torch.uint8).argsort(dim=1, descending=True)[:, :most]
    return torch.where(mask.gather(1, index), index, mask.shape[1])


def _norms_up(stack: Tensor, squarings: int) -> Tensor:
    """Bound the norms of `(b, k, n)` with k <= n and entries of at most 1 by Gram iteration.

    A sum of `n` squares, its root and the few operations around it have a relative error below `gamma_(n + 16)`.
    """
    rounding = gamma(stack.shape[2] + 16, _U) * _frobenius_up(stack).square() + TINY
    matrix, levels = mirrored(stack @ stack.mT), []
    for _ in range(squarings):
        size = _frobenius_up(matrix)
        scale = torch.exp2(torch.frexp(size.clamp_min(1e-250)).exponent.double())
        matrix = matrix / scale[:, None, None]
        matrix = mirrored(matrix @ matrix.mT)
        levels.append((scale, gamma(stack.shape[1] + 16, _U) * (size / scale).square() + TINY))
    norm, factor = _frobenius_up(matrix), add_up(1.0, gamma(16, _U))
    for scale, error in reversed(levels):
        norm = (norm + error).sqrt() * scale * factor
    return (norm + rounding).sqrt() * factor


def _frobenius_up(stack: Tensor) -> Tensor:
    """`||M_b||_F` rounded up; 0 squares exactly, and tiny entries lose at most `TINY` before the root of it is added."""
    sizes = stack.flatten(1)
    terms = sizes.shape[1]
    return torch.linalg.vector_norm(sizes, dim=1) * add_up(1.0, gamma(terms + 16, _U)) + 1e-140


@torch.no_grad()
def masked_absolute_bounds(
    product: Map, adjoint: Map, rows: Tensor, columns: Tensor, steps: int = 2
) -> Tensor:
    """Bound the norm of a masked map by that of the matrix of its absolute values, by Collatz-Wielandt.

    For `A = diag(rows) |W| diag(columns)`, `||A||_2^2 <= max_i (A^T A v)_i / v_i` over the columns that are left, for any v
    positive there. It is far above the norm of a matrix whose signs cancel, but falls where few entries are left.

    Args:
        product: `x -> |W| x` for float64 inputs of the shape of `columns`.
        adjoint: `y -> |W|^T y`.
        rows: bool `(b, ...)`, of the shape of the outputs.
        columns: bool `(b, ...)`.
        steps: power iterations on v.

    Returns:
        Float64 `(b,)`.
    """
    keep_rows, keep = rows.double(), columns.double()
    v = keep
    terms = rows[0].numel() + columns[0].numel() if len(rows) else 0
    for step in range(steps + 1):
        image = adjoint(product(v) * keep_rows) * keep
        if step < steps:
            peak = image.flatten(1).amax(1).clamp_min(1e-250).view(-1, *[1] * (image.dim() - 1))
            v = (image / peak).clamp_min(1e-6) * keep
    ratio = torch.where(columns, image / v, 0.0).flatten(1).amax(1)
    return (ratio * add_up(1.0, gamma(terms + 8, _U)) + 1e-290).sqrt() * add_up(1.0, gamma(4, _U))
