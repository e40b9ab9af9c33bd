"""Almost-orthogonal layers (AOL; Prach & Lampert, ECCV 2022): columns are rescaled until the norm is at most 1."""

from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from lipnext.bounds.gershgorin import row_sums_up
from lipnext.core.bound import LipschitzBound
from lipnext.core.rounding import sqrt_up
from lipnext.manifold.haar import haar
from lipnext.nn.formed import FormedConvolution

_FLOOR = 1e-6  # as published; keeps the scale of a column of zeros finite


class AolConvolution(FormedConvolution):
    """A convolution of c to c channels whose parameter `(c, c, k, k)` is rescaled by `almost_orthogonal`.

    Args:
        channels: c.
        kernel: k, odd.
        input_size: `(H, W)`.
        generator: source of randomness. A 1x1 convolution starts as a random rotation, a larger one as the identity: both
            lose nothing.
    """

    scale: Tensor

    def __init__(
        self,
        channels: int,
        kernel: int,
        input_size: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        start = torch.zeros(channels, channels, kernel, kernel)
        start[..., kernel // 2, kernel // 2] = (
            haar(channels, generator=generator) if kernel == 1 else torch.eye(channels)
        )
        super().__init__(start, channels, kernel, input_size)

    def form(self) -> Tensor:
        """Rescale the parameter."""
        return almost_orthogonal(self.weight)

    def lipschitz_bound(self) -> LipschitzBound:
        """The smaller one of two proofs for the stored kernel: by transfer matrices, and AOL's own theorem.

        With `v = 1 / t` no row of `|G| v` exceeds `v_i` but for rounding, G that of the rescaled kernel. The theorem holds for
        any positive v, so that the stored scale t needs no trust.
        """
        scale = self.scale if self.formed else column_scale(self.weight.detach())
        sums = row_sums_up(self.kernel().detach().transpose(0, 1), 1 / scale.double())
        theorem = LipschitzBound(value=sqrt_up(sums.max().item()), norm=2.0, proof="collatz-wielandt")
        return min(theorem, super().lipschitz_bound(), key=lambda bound: bound.value)

    def materialise(self) -> Self:
        """Return a copy that stores the kernel, and the scale of its columns for the proof."""
        layer = super().materialise()
        if not self.formed:
            layer.register_buffer("scale", column_scale(self.weight.detach()))
        return layer


def almost_orthogonal(kernel: Tensor) -> Tensor:
    """Multiply the input channels of a kernel `(c_out, c_in, k, k)` by `column_scale`.

    Every convolution with the result has a norm of at most 1 in exact arithmetic, whatever its padding, since sums of absolute
    values do not depend on it. A certificate proves the norm of the kernel that comes out.
    """
    return kernel * column_scale(kernel)[:, None, None]


def column_scale(kernel: Tensor) -> Tensor:
    """`t_i = (sum_jd |G_ij(d)| + 1e-6)^(-1/2)` with `G_ij(d) = sum_oq P_oi(q) P_oj(q + d)`, shape `(c_in,)`.

    `diag(t^-2) - G` is diagonally dominant, hence positive semidefinite (Prach & Lampert 2022, theorem 2).
    """
    columns = kernel.transpose(0, 1)
    gram = functional.conv2d(columns, columns, padding=kernel.shape[-1] - 1)
    return torch.rsqrt(gram.abs().sum(dim=(1, 2, 3)) + _FLOOR)
