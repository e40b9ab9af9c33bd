"""Mean shift: what follows a layer of distances, which are all far from 0, in place of batch normalisation."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import UnsoundError
from lipnext.core.interval import IntervalModule, outward, relative_error
from lipnext.core.rounding import RoundingState

MOMENTUM = 0.1
"""Share of the latest batch in the running mean."""


class MeanShift(IntervalModule):
    """`y -> y - mean` on features `(B, n)`: of the batch while training, with its gradient; else the stored one.

    There is no scale: a translation leaves all distances as they are.

    Args:
        features: n.
    """

    batch_parts: ClassVar[Literal["any", "processes", "none"]] = "none"
    mean: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Shift."""
        if not self.training:
            return x - self.mean
        every = torch.arange(x.shape[-1], device=x.device)
        return self.shift(x[None], every[None])[0]

    def shift(self, x: Tensor, columns: Tensor) -> Tensor:
        """Shift some features in training: each by its mean over the groups that have it.

        Args:
            x: `(g, b, k)`.
            columns: `(g, k)`, which features these are.
        """
        flat = columns.flatten()
        sums = x.new_zeros(len(self.mean)).index_add(0, flat, x.sum(1).flatten())
        counts = x.new_zeros(len(self.mean)).index_add(0, flat, x.new_full((len(flat),), x.shape[1]))
        mean = sums / counts.clamp_min(1)
        with torch.no_grad():
            self.mean.lerp_(torch.where(counts > 0, mean, self.mean), MOMENTUM)
        return x - mean[columns][:, None]

    @torch.no_grad()
    def estimate_again(self, x: Tensor, before: int) -> Tensor:
        """Shift by the mean of this batch, and make the stored mean the average over it and the `before` batches before."""
        mean = x.mean(0)
        self.mean.lerp_(mean, 1 / (before + 1))
        return x - mean

    def lipschitz_bound(self) -> LipschitzBound:
        """Return 1."""
        return LipschitzBound(value=1.0, norm=math.inf, proof="translation")

    def box(self, lower: Tensor, upper: Tensor, unit: float | None) -> tuple[Tensor, Tensor]:
        """Shift both sides: one rounding each."""
        low, high, error = lower - self.mean, upper - self.mean, relative_error(1, unit)
        return outward(low, high, error * low.abs(), error * high.abs(), unit)

    def rounding(self, state: RoundingState) -> RoundingState:
        """Refuse: errors are followed in the l-infinity norm here, by another certificate.

        Raises:
            UnsoundError: always.
        """
        raise UnsoundError(
            "mean shift has no rounding bound in l2; certify with lipnext.certificates.interval.IntervalCertifier"
        )
