"""Sorting activations that keep gradient norms, as modules to write one's own network with.

All are 1-Lipschitz and compute without rounding: they compare and move numbers.
"""

import torch
from torch import Tensor, nn


class MaxMin(nn.Module):
    """`(max(a, b), min(a, b))` for the two halves `a`, `b` of the channels (Anil et al. 2019, groups of two)."""

    def forward(self, x: Tensor) -> Tensor:
        """Sort the pairs of `(n, C, ...)`, C even; the maxima come first."""
        first, second = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)


class GroupSort(nn.Module):
    """Sort neighbouring channels in groups, ascending (Anil et al. 2019).

    Args:
        group_size: channels in a group, a divisor of their number; None sorts all of them.
    """

    def __init__(self, group_size: int | None = 2) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Sort `(n, C, ...)` along the channels."""
        size = self.group_size or x.shape[1]
        return x.unflatten(1, (-1, size)).sort(dim=2).values.flatten(1, 2)

    def extra_repr(self) -> str:
        """Show the group size, which decides the function."""
        return f"group_size={self.group_size}"


class MaxMinReLU(nn.Module):
    """`(relu(x), relu(-x))` along the channels, twice as many as before (Blot et al. 2016).

    1-Lipschitz, because `|relu(s) - relu(t)|^2 + |relu(-s) - relu(-t)|^2 <= |s - t|^2`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Split `(n, C, ...)` into positive and negative parts, `(n, 2 C, ...)`."""
        return torch.cat([torch.relu(x), torch.relu(-x)], dim=1)
