"""The SDP-based residual layer of SLL (Araujo et al., ICLR 2023), in the version that its erratum made sound.

`y = x - 2 W^T T relu(W x + b)` is 1-Lipschitz if `W W^T <= T^-1`, which the diagonal `T_i = 1 / sum_j |W W^T|_ij q_j / q_i`
fulfils for any positive q (Gershgorin; theorem 3 of the paper). q is `exp` of a parameter: positive, whatever it is.
"""

import torch
from torch import Tensor, nn

from lipnext.bounds.gershgorin import row_sums, row_sums_up
from lipnext.core.rounding import mul_up
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.gradient_step import GradientStep

_SMALLEST = 1e-30  # rows of W W^T with a smaller sum are left out: their share of the layer is nothing, their T overflows


class SdpResidual(GradientStep):
    """`y = x - 2 W^T T relu(W x + b)`; `log_q (m,)` is the logarithm of q.

    Args:
        inner: as `GradientStep`.
        generator: source of randomness; `log_q` starts normal, as published.
    """

    def __init__(self, inner: Dense | Convolution, generator: torch.Generator | None = None) -> None:
        super().__init__(inner.materialise(), generator)  # no power iteration here
        self.log_q = nn.Parameter(torch.randn(len(inner.weight), generator=generator))

    def form_scale(self) -> Tensor:
        """`2 T`, in the precision of the weights, autocast or not."""
        with torch.autocast(self.log_q.device.type, enabled=False):
            return _inverse(row_sums(self.inner.weight, self._q(self.log_q)))

    def prove_scale(self) -> Tensor:
        """`2 T` with row sums rounded upwards."""
        return _inverse(self._row_sums_up())

    def curvature_bound(self) -> float:
        """`max_i 2 T_i sum_j |W W^T|_ij q_j / q_i` for the stored T; the inequality holds for any q."""
        pairs = zip(self._checked_scale().tolist(), self._row_sums_up().tolist(), strict=True)
        return max(mul_up(scale, total) for scale, total in pairs)

    def _row_sums_up(self) -> Tensor:
        return row_sums_up(self.inner.weight, self._q(self.log_q.detach().double()))

    @staticmethod
    def _q(log_q: Tensor) -> Tensor:
        """Return q up to a common factor, which cancels."""
        return torch.exp(log_q - log_q.detach().max())


def _inverse(sums: Tensor) -> Tensor:
    return torch.where(sums > _SMALLEST, 2 / sums.clamp_min(_SMALLEST), 0.0)
