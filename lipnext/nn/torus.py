"""Convolutions on a torus, given by one complex matrix for each frequency: the common form of orthogonal FFT layers.

A real image on a torus is a sum of cosines and sines. In the orthonormal basis of these a circular convolution is block
diagonal, with its transfer matrices `M(w) = sum_q K_q exp(i w.q)` as blocks (Sedghi, Gupta & Long 2019). The change of basis is
a product with a stored matrix here, not an FFT: at the sizes of feature maps it is as fast, runs in any precision, and what is
certified are the stored numbers, all of them, with no assumption about an FFT library.
"""

import math
from abc import abstractmethod
from itertools import product
from typing import Self

import torch
from torch import Tensor, nn

from lipnext.bounds.spectral import absolute_norm_bound, near_orthogonal_bound
from lipnext.bounds.stack import largest_norm_up
from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_addition, after_product, norm_up
from lipnext.core.rounding import RoundingState

Frequencies = list[tuple[int, int]]


class TorusConvolution(LipschitzModule):
    """`crop(F^T M F pad(x)) + b` on `(B, c_in, H, W)`: F is the real Fourier basis of the torus, M block diagonal.

    Buffer `basis (2 f, H W)`: F on the pixels of the image, f pairs of a cosine and a sine. `weight`: what M is formed from,
    None once materialised. `transfer (f, 2, c_out, c_in)`: the real and the imaginary parts of M, stored from then on; with a
    kernel of one pixel there is one pair for all frequencies.

    Args:
        start: first value of the parameter `weight`, a kernel `(..., ..., k, k)`.
        channels_out: c_out.
        input_size: `(H, W)`.
        margin: zeros on all sides of the image; 0 is a circular convolution.
    """

    basis: Tensor
    waves: Tensor

    def __init__(
        self, start: Tensor, channels_out: int, input_size: tuple[int, int], *, margin: int = 0
    ) -> None:
        super().__init__()
        self.input_size = input_size
        torus = (input_size[0] + 2 * margin, input_size[1] + 2 * margin)
        dtype = torch.get_default_dtype()
        self.weight: nn.Parameter | None = nn.Parameter(start.to(dtype))
        self.transfer: nn.Parameter | None = None
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.register_buffer("basis", fourier_basis(input_size, torus).to(dtype))
        self.register_buffer("waves", kernel_waves(start.shape[-1], torus).to(dtype), persistent=False)

    @abstractmethod
    def form(self, spectrum: Tensor) -> Tensor:
        """Form the transfer matrices `(f, c_out, c_in)` from those of `weight`, complex and differentiable."""

    def matrices(self) -> Tensor:
        """Real and imaginary parts of the transfer matrices, `(f, 2, c_out, c_in)`, in the dtype of the weights."""
        if self.weight is None:
            assert self.transfer is not None
            return self.transfer
        with torch.autocast(self.weight.device.type, enabled=False):
            real, imaginary = self.waves @ self.weight.flatten(2).flatten(0, 1).mT
            rows, columns = self.weight.shape[:2]
            formed = self.form(torch.complex(real, imaginary).unflatten(1, (rows, columns)))
            return torch.stack([formed.real, formed.imag], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the layer; under autocast all products run in the autocast dtype."""
        blocks = _blocks(self.matrices())
        x = images.flatten(2) @ self.basis.mT
        x = x.unflatten(2, (-1, 2)).permute(2, 0, 3, 1).flatten(2)  # (f, B, 2 c_in), real parts first
        x = x @ blocks.mT
        x = x.unflatten(2, (2, -1)).permute(1, 3, 0, 2).flatten(2)
        x = (x @ self.basis).unflatten(2, self.input_size)
        return x + self.bias[:, None, None].to(x.dtype)

    def lipschitz_bound(self) -> LipschitzBound:
        """The norm of the largest block times that of the basis, twice: as stored, it is not quite orthonormal."""
        largest = LipschitzBound(value=self._largest_norm(), norm=2.0, proof="transfer-matrix")
        basis = near_orthogonal_bound(self.basis)
        return LipschitzBound.compose(basis, largest, basis)

    def rounding(self, state: RoundingState) -> RoundingState:
        """Three products, with H W, 2 c_in and 2 f terms in each sum, and the addition of the bias."""
        basis, absolute = near_orthogonal_bound(self.basis).value, absolute_norm_bound(self.basis)
        blocks = _blocks(self.matrices().detach())
        largest = max(absolute_norm_bound(block) for block in blocks)
        state = after_product(state, self.basis.shape[1], basis, absolute)
        state = after_product(state, blocks.shape[2], self._largest_norm(), largest)
        state = after_product(state, self.basis.shape[0], basis, absolute)
        return after_addition(state, norm_up(self.bias, copies=math.prod(self.input_size)))

    def materialise(self) -> Self:
        """Return a copy that stores the transfer matrices."""
        layer = super().materialise()
        layer.transfer, layer.weight = nn.Parameter(self.matrices().detach().clone()), None
        layer.register_buffer("waves", None, persistent=False)
        return layer

    def _largest_norm(self) -> float:
        matrices = self.matrices().detach().double()
        if (
            matrices.shape[2] < matrices.shape[3]
        ):  # the transposes have the same norms and a smaller Gram matrix
            matrices = matrices.mT
        return largest_norm_up(matrices.flatten(1, 2))


def half_spectrum(torus: tuple[int, int]) -> Frequencies:
    """One of each pair `(j, k)`, `(-j, -k)` of frequencies: a real kernel has conjugate matrices at the other."""
    return [
        (j, k)
        for j, k in product(range(torus[0]), range(torus[1]))
        if (j, k) <= (-j % torus[0], -k % torus[1])
    ]


def fourier_basis(input_size: tuple[int, int], torus: tuple[int, int]) -> Tensor:
    """The orthonormal basis on the pixels of an image in the corner of a torus, float64 `(2 f, H W)`.

    Rows `a cos(w.p)` and `-a sin(w.p)` in turn, `a^2 = 2 / n` on n positions; where w and -w are the same frequency,
    `a^2 = 1 / n` and the sine is zero. Columns are orthonormal.
    """
    frequencies = half_spectrum(torus)
    angles = _angles(frequencies, torus, list(product(range(input_size[0]), range(input_size[1]))))
    single = torch.tensor([(2 * j % torus[0], 2 * k % torus[1]) == (0, 0) for j, k in frequencies])[:, None]
    size = torch.where(single, 1.0, 2.0).to(angles.dtype).div(math.prod(torus)).sqrt()
    rows = torch.stack([size * angles.cos(), (-size * angles.sin()).masked_fill(single, 0.0)], dim=1)
    return rows.flatten(0, 1)


def kernel_waves(kernel: int, torus: tuple[int, int]) -> Tensor:
    """`exp(i w.q)` for the taps q of a centred kernel, real and imaginary parts: float64 `(2, f, k^2)`.

    A product with it gives the transfer matrices of the correlation that `torch.nn.functional.conv2d` computes. Those of a
    single tap are the same at all frequencies: f is 1 for k = 1.
    """
    if kernel == 1:
        return torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1)
    taps = [tap - (kernel - 1) // 2 for tap in range(kernel)]
    angles = _angles(half_spectrum(torus), torus, list(product(taps, taps)))
    return torch.stack([angles.cos(), angles.sin()])


def _angles(frequencies: Frequencies, torus: tuple[int, int], positions: list[tuple[int, int]]) -> Tensor:
    """`w.p`, shape `(f, positions)`, float64, reduced to one turn in integers before anything is rounded."""
    turn = math.lcm(*torus)
    w = torch.tensor(frequencies) * torch.tensor([turn // torus[0], turn // torus[1]])
    return (w @ torch.tensor(positions).mT % turn).double() * (2 * math.pi / turn)


def _blocks(matrices: Tensor) -> Tensor:
    """`A + iB`, `(f, 2, c_out, c_in)`, as real matrices `[[A, -B], [B, A]]`, `(f, 2 c_out, 2 c_in)`."""
    a, b = matrices.unbind(1)
    return torch.cat([torch.cat([a, -b], dim=2), torch.cat([b, a], dim=2)], dim=1)
