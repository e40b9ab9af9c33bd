"""Gaussian noise rounded to a grid, drawn exactly: what a computer can add to a point without any rounding error.

Let s be a grid's spacing, z a point of the grid, and delta a normal vector of real numbers. Then `round(z + delta) = z +
round(delta)`, ties aside, which have probability 0. So a classifier that begins by rounding its input to the grid can be
sampled by integers, and the theorem of smoothing, which speaks of real noise, holds for it. Adding floating-point noise to a
floating-point image instead samples another distribution, which can be told from the image by its last bits (Voracek & Hein,
"Sound Randomized Smoothing in Floating-Point Arithmetics", ICLR 2023, who round as well).

With s = sigma / 1024 the integers do not depend on sigma. Their distribution is stored as multiples of 2^-63 and drawn by
Walker's alias method in integer arithmetic: of 63 random bits, 14 choose a slot and 49 one of the two numbers in it.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lipnext.bounds.normal import cell_masses

LEVELS = 1024
"""Steps of the grid in one standard deviation."""
TOTAL_VARIATION = 2.0**-48
"""Distance of one drawn integer from a rounded normal number: 8,192 halves of 2^-63 and the tails beyond 8 deviations."""
_SLOTS, _BITS = 2**14, 49
_CENTRE = _SLOTS // 2
_CHUNK = 2**17  # numbers at a time, which stay in the cache


def rounded_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw `round(1024 g)` for independent standard normal g, int16, within `TOTAL_VARIATION` of that distribution each.

    Args:
        shape: of the result.
        generator: of random bits, on the CPU; its bits are taken as independent and fair.
    """
    keep, other = _alias()
    drawn = torch.empty(shape, dtype=torch.int16)
    for part in drawn.view(-1).split(_CHUNK):
        bits = torch.empty(len(part), dtype=torch.int64).random_(generator=generator)
        slot, rest = bits >> _BITS, bits & (2**_BITS - 1)
        own = rest < keep.index_select(0, slot)
        part.copy_(torch.where(own, (slot - _CENTRE).to(torch.int16), other.index_select(0, slot)))
    return drawn


@lru_cache(1)
def weights() -> list[int]:
    """How many of the 2^63 equally likely draws give each integer from -8192 to 8191."""
    half = [int((mass * 2**63).to_integral_value()) for mass in cell_masses(LEVELS, _CENTRE - 1)]
    found = [0, *half[:0:-1], 0, *half[1:]]
    found[_CENTRE] = 2**63 - sum(found)
    return found


@lru_cache(1)
def _alias() -> tuple[Tensor, Tensor]:
    """Give each slot 2^49 draws of its own number and at most one other; return how many are its own, and the other number."""
    left, size = weights().copy(), 2**_BITS
    keep, other = [0] * _SLOTS, list(range(_SLOTS))
    small = [k for k in range(_SLOTS) if left[k] < size]
    large = [k for k in range(_SLOTS) if left[k] >= size]
    while small:
        slot, giver = small.pop(), large[-1]
        keep[slot], other[slot] = left[slot], giver
        left[giver] -= size - left[slot]
        if left[giver] < size:
            small.append(large.pop())
    for slot in large:  # what is left is full
        keep[slot] = left[slot]
    return torch.tensor(keep), torch.tensor([k - _CENTRE for k in other], dtype=torch.int16)
