"""Distances, order statistics and lp norms of `x - w` for all pairs of rows, on a GPU: `sort_kernel` in Triton.

A program holds a tile of pairs and walks along the rows: the memory that is needed is that of the arguments and results.
Order statistics take one walk per term, each looking for the largest distance behind the one before; equal distances are
in the order of their places. A walk reads its tiles from the cache and keeps one number and one place per pair, where a
sorted list per pair would fill the registers. Gradients compute their powers twice, once for x and once for the weight: no
two programs add to the same number, so results do not depend on the order in which programs run.

Checked in Triton's interpreter alone (`tests/nn/test_sort_triton.py`); these kernels have never run on a GPU.
"""

from __future__ import annotations  # the annotations of kernels name Triton, which may be missing

import torch
from torch import Tensor

from lipnext.nn.triton_language import jit, tiles, tl

_ROWS, _COLUMNS, _WIDE = 16, 16, 16  # a tile of pairs, and numbers of each row that are looked at together


def top(
    low: Tensor, high: Tensor, weight: Tensor, coefficients: Tensor, *, nearest: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the weighted sums of the largest distances between each box and each row of the weight, and where they are.

    A NaN counts as infinitely far, so that the sum is not finite.

    Args:
        low: `(g, b, n)`, float32 or float64.
        high: `(g, b, n)`, the same tensor for a point.
        weight: `(g, m, n)`.
        coefficients: `(t,)`, t at most n, of the largest distance, the second largest and so on.
        nearest: measure from the nearest point of the box, instead of the farthest.

    Returns:
        Sums `(g, b, m)`, and places `(g, b, m, t)`, int32, of equal distances those with the smallest places, in order.
    """
    groups, batch, n = low.shape
    outputs, terms = weight.shape[1], len(coefficients)
    a, b, w, c = (t.detach().contiguous() for t in (low, high, weight, coefficients))
    sums = a.new_empty(groups, batch, outputs)
    places = torch.empty(groups, batch, outputs, terms, dtype=torch.int32, device=a.device)
    grid = tiles((groups, 1), (batch, _ROWS), (outputs, _COLUMNS))
    with torch.cuda.device_of(a):
        _top_kernel[grid](
            a, b, w, c, sums, places, batch, outputs, n, terms, bool(nearest), _ROWS, _COLUMNS, _WIDE
        )
    return sums, places


def power_distance(x: Tensor, weight: Tensor, exponent: float) -> Tensor:
    """Return `(sum_i |x_i - w_i|^p)^(1/p)` for rows `(g, b, n)` and `(g, m, n)`, shape `(g, b, m)`, float32, finite p."""
    groups, batch, n = x.shape
    outputs = weight.shape[1]
    a, w = (t.detach().contiguous() for t in (x, weight))
    y = a.new_empty(groups, batch, outputs)
    grid = tiles((groups, 1), (batch, _ROWS), (outputs, _COLUMNS))
    with torch.cuda.device_of(a):
        _power_kernel[grid](a, w, y, batch, outputs, n, float(exponent), 1 / exponent, _ROWS, _COLUMNS, _WIDE)
    return y


def power_gradients(
    x: Tensor, weight: Tensor, exponent: float, y: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `sum(dy * y)` in x and in the weight, float32, y from `power_distance`."""
    groups, batch, n = x.shape
    outputs = weight.shape[1]
    a, w, y, dy = (t.detach().contiguous() for t in (x, weight, y, dy))
    dx, dw = torch.empty_like(a), torch.empty_like(w)
    # The distance is the same from both ends: the rows of the weight are to x what those of x are to the weight.
    ends = ((a, w, dx, batch, outputs, outputs, 1), (w, a, dw, outputs, batch, 1, outputs))
    with torch.cuda.device_of(a):
        for own, other, gradient, rows, others, step, stride in ends:
            grid = tiles((groups, 1), (rows, _ROWS), (n, _WIDE))
            _gradient_kernel[grid](
                own,
                other,
                y,
                dy,
                gradient,
                rows,
                others,
                n,
                step,
                stride,
                exponent - 1.0,
                _ROWS,
                _COLUMNS,
                _WIDE,
            )
    return dx, dw


@jit
def _top_kernel(
    low,
    high,
    weight,
    coefficients,
    sums,
    places,
    batch,
    outputs,
    n,
    terms,
    nearest: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, across, down = tl.program_id(0), tl.cdiv(outputs, COLUMNS), tl.cdiv(batch, ROWS)
    group = (tile // (across * down)).to(tl.int64)
    i = tile // across % down * ROWS + tl.arange(0, ROWS)
    o = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    box, row = (group * batch + i) * n, (group * outputs + o) * n
    pair = (group * batch + i)[:, None] * outputs + o[None, :]
    exists = (i < batch)[:, None] & (o < outputs)[None, :]
    real = sums.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), real)
    previous = tl.full((ROWS, COLUMNS), float("inf"), real)
    taken = tl.full((ROWS, COLUMNS), -1, tl.int32)
    for k in range(terms):
        best = tl.full((ROWS, COLUMNS), -1.0, real)
        where = tl.zeros((ROWS, COLUMNS), tl.int32)
        for start in range(0, n, WIDE):
            at = start + tl.arange(0, WIDE)
            inside = at < n
            box_mask = (i < batch)[:, None] & inside[None, :]
            a = tl.load(low + box[:, None] + at[None, :], mask=box_mask, other=0.0)[:, None, :]
            b = tl.load(high + box[:, None] + at[None, :], mask=box_mask, other=0.0)[:, None, :]
            row_mask = (o < outputs)[:, None] & inside[None, :]
            w = tl.load(weight + row[:, None] + at[None, :], mask=row_mask, other=0.0)[None, :, :]
            if nearest:
                d = tl.maximum(a - w, w - b, propagate_nan=tl.PropagateNan.ALL)
            else:
                d = tl.maximum(w - a, b - w, propagate_nan=tl.PropagateNan.ALL)
            d = tl.where(d == d, tl.maximum(d, 0.0), float("inf"))
            # Behind the one before: smaller, or as large and further on.
            before, last = previous[:, :, None], taken[:, :, None]
            behind = (d < before) | ((d == before) & (at[None, None, :] > last))
            d = tl.where(behind & inside[None, None, :], d, -1.0)
            value, offset = tl.max(d, axis=2, return_indices=True)
            better = value > best
            best = tl.where(better, value, best)
            where = tl.where(better, start + offset, where)
        total += tl.load(coefficients + k) * best
        tl.store(places + pair * terms + k, where, mask=exists)
        previous, taken = best, where
    tl.store(sums + pair, total, mask=exists)


@jit
def _power_kernel(
    x,
    weight,
    y,
    batch,
    outputs,
    n,
    exponent,
    inverse,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, across, down = tl.program_id(0), tl.cdiv(outputs, COLUMNS), tl.cdiv(batch, ROWS)
    group = (tile // (across * down)).to(tl.int64)
    i = tile // across % down * ROWS + tl.arange(0, ROWS)
    o = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    point, row = (group * batch + i) * n, (group * outputs + o) * n
    # Without the largest taken out, d^p overflows or vanishes.
    largest = tl.full((ROWS, COLUMNS), 1e-10, tl.float32)
    for start in range(0, n, WIDE):
        at = start + tl.arange(0, WIDE)
        a = tl.load(
            x + point[:, None] + at[None, :], mask=(i < batch)[:, None] & (at < n)[None, :], other=0.0
        )
        w = tl.load(
            weight + row[:, None] + at[None, :], mask=(o < outputs)[:, None] & (at < n)[None, :], other=0.0
        )
        d = tl.abs(a[:, None, :] - w[None, :, :])
        largest = tl.maximum(largest, tl.max(d, axis=2))
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n, WIDE):
        at = start + tl.arange(0, WIDE)
        a = tl.load(
            x + point[:, None] + at[None, :], mask=(i < batch)[:, None] & (at < n)[None, :], other=0.0
        )
        w = tl.load(
            weight + row[:, None] + at[None, :], mask=(o < outputs)[:, None] & (at < n)[None, :], other=0.0
        )
        share = tl.abs(a[:, None, :] - w[None, :, :]) / largest[:, :, None]
        share = tl.maximum(share, 1e-30, propagate_nan=tl.PropagateNan.ALL)
        power = tl.exp2(exponent * tl.log2(share))
        total += tl.sum(tl.where((at < n)[None, None, :], power, 0.0), axis=2)
    total = tl.maximum(total, 1e-30, propagate_nan=tl.PropagateNan.ALL)
    norm = largest * tl.exp2(inverse * tl.log2(total))
    pair = (group * batch + i)[:, None] * outputs + o[None, :]
    tl.store(y + pair, norm, mask=(i < batch)[:, None] & (o < outputs)[None, :])


@jit
def _gradient_kernel(
    own,
    other,
    y,
    dy,
    gradient,
    rows,
    others,
    n,
    step,
    stride,
    exponent,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, across, down = tl.program_id(0), tl.cdiv(n, WIDE), tl.cdiv(rows, ROWS)
    group = (tile // (across * down)).to(tl.int64)
    i = tile // across % down * ROWS + tl.arange(0, ROWS)
    at = tile % across * WIDE + tl.arange(0, WIDE)
    exists = (i < rows)[:, None] & (at < n)[None, :]
    place = (group * rows + i)[:, None] * n + at[None, :]
    a = tl.load(own + place, mask=exists, other=0.0)
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, others, COLUMNS):
        o = start + tl.arange(0, COLUMNS)
        mask = (o < others)[:, None] & (at < n)[None, :]
        b = tl.load(other + (group * others + o)[:, None] * n + at[None, :], mask=mask, other=0.0)
        pair = group * rows * others + i[:, None].to(tl.int64) * step + o[None, :] * stride
        mask = (i < rows)[:, None] & (o < others)[None, :]
        # No pair is infinitely far apart: its share is 0, where 0 times an overflow would be NaN.
        size = tl.load(y + pair, mask=mask, other=float("inf"))
        g = tl.load(dy + pair, mask=mask, other=0.0)
        d = a[:, None, :] - b[None, :, :]
        share = tl.abs(d) / tl.maximum(size, 1e-30)[:, :, None]  # a size of 0 where x equals w
        share = tl.maximum(share, 1e-30, propagate_nan=tl.PropagateNan.ALL)
        power = tl.exp2(exponent * tl.log2(share))
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        total += tl.sum(g[:, :, None] * power * sign, axis=1)
    tl.store(gradient + place, total, mask=exists)
