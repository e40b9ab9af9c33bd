"""Cayley convolutions (Trockman & Kolter, ICLR 2021): an orthogonal matrix for each frequency, by the Cayley map."""

from typing import Self

import torch
from torch import Tensor, nn

from lipnext.nn.torus import TorusConvolution


class CayleyConvolution(TorusConvolution):
    """A circular convolution of c_in to c_out channels whose transfer matrices are Cayley maps of a kernel's.

    The parameter `(c_out, c_in, k, k)` is used at the norm `scale`, which is learned beside it: the Cayley map of a large
    matrix is near minus the identity and hardly moves.

    Args:
        channels_in: c_in.
        channels_out: c_out.
        kernel: k.
        input_size: `(H, W)`.
        generator: source of randomness; the entries start uniform within 1 / sqrt(c_in k^2) of zero, as torch's own.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        input_size: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        start = 2 * torch.rand(channels_out, channels_in, kernel, kernel, generator=generator) - 1
        super().__init__(start / (channels_in * kernel**2) ** 0.5, channels_out, input_size)
        assert self.weight is not None
        self.scale: nn.Parameter | None = nn.Parameter(self.weight.detach().norm())

    def form(self, spectrum: Tensor) -> Tensor:
        """Map each `(c_out, c_in)`."""
        assert self.weight is not None
        assert self.scale is not None
        return cayley(spectrum * (self.scale / torch.linalg.vector_norm(self.weight)))

    def materialise(self) -> Self:
        """Return a copy that stores the transfer matrices."""
        layer = super().materialise()
        layer.scale = None
        return layer


def cayley(matrix: Tensor) -> Tensor:
    """Map matrices `(..., m, n)`, real or complex, to ones with orthonormal columns, or rows where m < n.

    With U the first n rows, V the others and `A = U - U* + V* V`, the result is
    `[(I + A)^-1 (I - A); -2 V (I + A)^-1]` (Trockman & Kolter 2021, appendix); `I + A` is regular since `Re A >= 0`.
    """
    rows, columns = matrix.shape[-2:]
    if rows < columns:
        return cayley(matrix.mH).mH
    u, v = matrix[..., :columns, :], matrix[..., columns:, :]
    a = u - u.mH + v.mH @ v
    identity = torch.eye(columns, dtype=matrix.dtype, device=matrix.device)
    square = torch.linalg.solve(identity + a, identity - a)
    if rows == columns:
        return square
    return torch.cat([square, -2 * torch.linalg.solve(identity + a, v, left=False)], dim=-2)
