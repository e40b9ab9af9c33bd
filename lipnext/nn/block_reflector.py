"""Block reflectors (BRO; BRONet, ICML 2025): `I - 2 V (V* V)^-1 V*` is orthogonal for any V of full rank."""

import math

import torch
from torch import Tensor

from lipnext.nn.formed import FormedConvolution
from lipnext.nn.torus import TorusConvolution

_SHIFT = 1e-5  # of the Gram matrix, relative to the mean of its diagonal; published are 1e-5 and, below float32, 1e-7


class BlockReflectorConvolution(TorusConvolution):
    """A convolution of c to c channels on the zero-padded image, cropped (BRONet, section 4.2).

    The parameter `(c, n, k, k)` gives one reflector for each frequency of the torus of `H + 2 (k // 2)` pixels a side. The
    kernel of the whole is as large as the torus, so that its edges wrap around within the padding.

    Args:
        channels: c.
        rank: n, below c.
        kernel: k, odd.
        input_size: `(H, W)`.
        generator: source of randomness.
    """

    def __init__(
        self,
        channels: int,
        rank: int,
        kernel: int,
        input_size: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        start = torch.randn(channels, rank, kernel, kernel, generator=generator)
        start = start / (kernel**2 * channels) ** 0.5
        start[range(rank), range(rank), kernel // 2, kernel // 2] += 1.0
        super().__init__(start, channels, input_size, margin=kernel // 2)

    def form(self, spectrum: Tensor) -> Tensor:
        """Reflect at the columns of each `(c, n)`."""
        return block_reflector(spectrum, spectrum.shape[1])


class BlockReflectorMixing(FormedConvolution):
    """A 1x1 convolution with the first rows or columns of a block reflector: c_in to c_out channels.

    The parameter is `(m, n)`, m the larger one of c_in and c_out (BRONet, section 4.1).

    Args:
        channels_in: c_in.
        channels_out: c_out.
        rank: n, below m.
        input_size: `(H, W)`.
        generator: source of randomness.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        rank: int,
        input_size: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        size = max(channels_in, channels_out)
        start = torch.randn(size, rank, generator=generator) / math.sqrt(size)
        start[range(rank), range(rank)] += 1.0
        super().__init__(start, channels_out, 1, input_size)
        self.channels_in, self.channels_out = channels_in, channels_out

    def form(self) -> Tensor:
        """Form the rows and columns that are used."""
        return block_reflector(self.weight, self.channels_out)[:, : self.channels_in, None, None]


def block_reflector(v: Tensor, rows: int) -> Tensor:
    """The first rows of `I - 2 V (V* V + e I)^-1 V*` for `(..., m, n)`, real or complex: `(..., rows, m)`.

    `e = 1e-5 mean(diag(V* V))` keeps the inverse finite; the eigenvalues `1 - 2 s^2 / (s^2 + e)` stay within [-1, 1].
    """
    gram = v.mH @ v
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    shift = _SHIFT * diagonal.real.mean(-1, keepdim=True)
    projected = torch.linalg.solve(gram + torch.diag_embed(shift.expand_as(diagonal)), v.mH)
    identity = torch.eye(rows, v.shape[-2], dtype=v.dtype, device=v.device)
    return identity - 2 * v[..., :rows, :] @ projected
