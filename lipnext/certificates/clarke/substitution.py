"""Linear functions of the last number of a chain, bounded by substitution back to its start, rounding included.

A chain is `p_s = W_s v_(s-1) + b_s`, with straight lines around every component of v_s in terms of the same component of p_s,
and v_0 in a box. Whatever holds a row a of coefficients of p_s, computed with whatever error, then

    a p_s = (a W_s) v_(s-1) + a b_s,    a v_s <= (a+ upper_slope + a- lower_slope) p_s + a+ upper + a- lower

with a+ and a- the parts of a that are not negative and not positive. The next row is rounded, and taken as it comes; what that
can change is paid for at once, since proved bounds H on |v| and P on |p| are at hand: n roundings of `a W` move its product
with v by at most `gamma_n |a| (|W| H)`, one rounding of a product by a slope at most `2^-53 |a| P`. The sums of constants are
relative to their own sizes. So one number, the sum of these sizes times `2 gamma_N`, covers everything, where N exceeds the
longest sum and the number of terms that are added in all; the factor 2 pays for the roundings of the sizes and of the result.

Numbers that underflow are covered by `TINY` as long as `check_range` holds: every row grows by less than 2^200 on its way.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipnext.certificates.clarke.relaxation import Box, Lines
from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, gamma, mul_up

TINY = 2.0**-700
CHUNK = 2**22
"""Coefficients at once: 32 MiB, of which a few copies are alive."""


@dataclass(frozen=True)
class Link:
    """One step of a chain.

    Attributes:
        weight: W, (out, in).
        bias: b, (out,), or None.
        bias_size: (out,), what the error of b is relative to.
        terms: roundings in an entry of W or b, at most.
        reach: H, (n, in), proved bound on |v| before the step.
        box: of p behind the step, (n, out) each; filled in as it is proved.
        lines: around v behind the step in terms of p, (n, out) each; None at the end.
    """

    weight: Tensor
    bias: Tensor | None
    bias_size: Tensor | None
    terms: int
    reach: Tensor
    box: Box
    lines: Lines | None = None

    @property
    def roundings(self) -> int:
        """Of the longest sum."""
        return max(self.weight.shape) + self.terms

    def sizes(self) -> Tensor:
        """`|W| H + |b|`, (n, out)."""
        size = self.reach @ self.weight.abs().T
        return size if self.bias_size is None else size + self.bias_size


def check_range(weights: Sequence[Tensor]) -> None:
    """Refuse chains whose rows could grow so much that an underflow counts, or overflow.

    Raises:
        UnsoundError: where the product of all row and column sums is too large.
    """
    growth = 0.0
    for weight in weights:
        sums = [weight.abs().sum(dim).max().item() for dim in (0, 1)]
        growth += math.log2(1 + max(sums))
    if not growth < 200:
        raise UnsoundError("the weights are so large that sums may overflow; rescale the network")


def interval(box: Box, weight: Tensor, bias: Tensor | None, bias_size: Tensor | None, terms: int) -> Box:
    """Interval arithmetic for `W v + b`, rounded outwards."""
    lower, upper = box
    middle = (lower + upper) / 2
    half = torch.maximum(upper - middle, middle - lower) * (1 + 2.0**-50) + TINY
    absolute = weight.abs().T
    spread = half @ absolute
    size = middle.abs() @ absolute + spread
    centre = middle @ weight.T
    if bias is not None and bias_size is not None:
        centre, size = centre + bias, size + bias_size
    error = _relative(max(weight.shape) + terms + 32) * size + TINY
    return centre - spread - error, centre + spread + error


def upper_bounds(
    links: Sequence[Link], start: Box, rows: Tensor, constant: Tensor | float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Bound `a p + constant` from above, p the end of the chain, for every row a.

    Args:
        links: the chain.
        start: box of v_0, (n, d) each.
        rows: coefficients, (n, R, out), or (1, R, out) for all n alike.
        constant: (n, R).

    Returns:
        The bounds (n, R), and for each link but the last the coefficients of v behind it, (n, R, out).
    """
    total = torch.as_tensor(constant, dtype=rows.dtype).expand(len(start[0]), rows.shape[1])
    size = total.abs()
    coefficients = []
    for s in range(len(links) - 1, -1, -1):
        link = links[s]
        size = size + _dot(rows.abs(), link.sizes())
        if link.bias is not None:
            total = total + _dot(rows, link.bias[None])
        rows = rows @ link.weight
        positive, negative = rows.clamp_min(0), rows.clamp_max(0)
        if s == 0:
            low, high = start
            total = total + (_dot(positive, high) + _dot(negative, low))
            size = size + (_dot(positive, high.abs()) + _dot(-negative, low.abs()))
            break
        coefficients.append(rows)
        before = links[s - 1]
        lines = before.lines
        assert lines is not None
        total = total + (_dot(positive, lines.upper) + _dot(negative, lines.lower))
        size = size + (_dot(positive, lines.upper.abs()) + _dot(-negative, lines.lower.abs()))
        rows = positive * lines.upper_slope[:, None] + negative * lines.lower_slope[:, None]
        size = size + _dot(rows.abs(), torch.maximum(before.box[0].abs(), before.box[1].abs()))
    roundings = max(link.roundings for link in links) + 8 * len(links) + 32
    return total + _relative(roundings) * size + TINY, coefficients[::-1]


def entry_bounds(links: Sequence[Link], start: Box) -> Box:
    """Bound every component of p at the end of the chain, (n, out) each."""
    count = links[-1].weight.shape[0]
    widest = max(max(link.weight.shape) for link in links)
    size = max(1, CHUNK // (2 * widest * len(start[0])))
    lower, upper = [], []
    for rows in torch.eye(count, dtype=torch.float64).split(size):
        bounds, _ = upper_bounds(links, start, torch.cat([rows, -rows])[None])
        upper.append(bounds[:, : len(rows)])
        lower.append(-bounds[:, len(rows) :])
    return torch.cat(lower, dim=1), torch.cat(upper, dim=1)


def intersection(first: Box, second: Box) -> Box:
    """The numbers that lie in both; NaN stays NaN."""
    return torch.maximum(first[0], second[0]), torch.minimum(first[1], second[1])


def _dot(rows: Tensor, vectors: Tensor) -> Tensor:
    """Products of `(n or 1, R, d)` with `(n or 1, d)`, `(n, R)`."""
    if len(rows) == 1:
        return vectors @ rows[0].T
    return (rows @ vectors[..., None]).squeeze(-1)


def _relative(roundings: int) -> float:
    return mul_up(2.0, gamma(roundings, UNIT_ROUNDOFF[torch.float64]))
