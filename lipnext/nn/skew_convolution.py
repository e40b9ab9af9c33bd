"""Skew orthogonal convolution (SOC): the exponential of a convolution whose matrix is skew (Singla & Feizi, ICML 2021)."""

import math
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.bounds.convolution import absolute_convolution_bound, convolution_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import UnsoundError
from lipnext.core.guard import refuse_fast_convolution
from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_addition, after_product, norm_up
from lipnext.core.rounding import RoundingState, add_up, fraction_up, mul_up
from lipnext.nn.convolution import check_size
from lipnext.nn.power_iteration import estimate_dense_norm

TRAINING_TERMS, TERMS = 6, 15
"""Terms of the exponential series while training, and in evaluation."""
_FLOOR = 1e-12


class SkewConvolution(LipschitzModule):
    """`x -> exp_T(L) x + b` on `(B, c_in, H, W)`, sizes kept; `exp_T(L) = sum of L^i / i! for i < T`.

    L is a zero-padded convolution with the kernel `(M - M^T) / (2 s)`, where `M^T` swaps the channels and flips the taps: its
    matrix is skew, so that exp(L) is orthogonal. `s` is the smaller of the norms of two matrices made of the kernel's numbers
    (`unfolded`), which bounds `||L||` by k. T is 6 while training and 15 in evaluation. Where the numbers of channels differ,
    channels of zeros are appended before, or channels left out after: the kernel is square, `c = max(c_in, c_out)`.

    `weight (c, c, k, k)` is M until the layer is materialised, and from then on the kernel of L itself; `bias (c_out,)`.

    Args:
        channels_in: c_in.
        channels_out: c_out.
        kernel: k, odd.
        input_size: `(H, W)`: the bound of the truncated series depends on it.
        generator: source of randomness; M starts with variance 1 / c.
    """

    wide: Tensor
    square: Tensor

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        input_size: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"`kernel` must be odd, got {kernel}: an even one has no tap in the middle.")
        self.channels_in, self.channels_out, self.input_size = channels_in, channels_out, input_size
        self.padding, self.formed = kernel // 2, False
        c = max(channels_in, channels_out)
        start = torch.randn(c, c, kernel, kernel, generator=generator) / math.sqrt(c)
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter((2 * torch.rand(channels_out, generator=generator) - 1) / math.sqrt(c))
        for name, size in (("wide", c), ("square", c * kernel)):
            vector = torch.randn(size, generator=generator)
            self.register_buffer(name, vector / torch.linalg.vector_norm(vector))
        with torch.no_grad():
            self._iterate(self.skew(), 50)

    def skew(self) -> Tensor:
        """`(M - M^T) / 2`, exactly skew in floating point: `fl(a - b) = -fl(b - a)`."""
        return (self.weight - transposed(self.weight)) / 2

    def kernel(self) -> Tensor:
        """The kernel of L `(c, c, k, k)`, differentiable; in training power iteration takes a step."""
        if self.formed:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            skew = self.skew()
            wide, square = self._iterate(skew, 1 if self.training else 0)
            return skew / torch.minimum(wide, square).clamp_min(_FLOOR)

    def _iterate(self, skew: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Estimate the norms of both unfolded kernels, kept warm from step to step."""
        wide, square = unfolded(skew)
        wide_norm, vector = estimate_dense_norm(wide, self.wide, steps)
        square_norm, other = estimate_dense_norm(square, self.square, steps)
        if steps:
            self.wide, self.square = vector, other
        return wide_norm, square_norm

    def forward(self, images: Tensor) -> Tensor:
        """Apply the layer: Horner's scheme, one convolution for each power."""
        check_size(images, self.input_size)
        kernel, spare = self.kernel(), self.channels_out - self.channels_in
        x = functional.pad(images, (0, 0, 0, 0, 0, spare)) if spare > 0 else images
        x = x.contiguous(memory_format=torch.channels_last)  # faster on CPUs and GPUs
        y = x
        for power in reversed(range(1, TRAINING_TERMS if self.training else TERMS)):
            y = x + functional.conv2d(y, kernel / power, padding=self.padding)
        return y[:, : self.channels_out] + self.bias.view(-1, 1, 1)

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove `||exp_T(L)|| <= 1 + ||L||^T / T!` with a proved bound of `||L||`.

        L is skew, hence `exp_T(L)` is normal with the eigenvalues `exp_T(i t)`, `|t| <= ||L||`, and by Taylor's theorem
        `|exp_T(i t) - exp(i t)| <= |t|^T / T!`.

        Raises:
            UnsoundError: if the stored kernel is not skew, number by number.
        """
        norm = Fraction(self._norm())
        return LipschitzBound(
            value=fraction_up(1 + norm**TERMS / math.factorial(TERMS)), norm=2.0, proof="skew-exponential"
        )

    def _norm(self) -> float:
        """Prove `||L||` of a kernel that is skew."""
        kernel = self.materialise().weight.detach()
        if not torch.equal(kernel, -transposed(kernel)):
            raise UnsoundError(
                "the kernel of a skew convolution is not skew, its exponential is not orthogonal; load a good bundle"
            )
        return convolution_bound(kernel, self.input_size, padding=self.padding).value

    def rounding(self, state: RoundingState) -> RoundingState:
        """The error of Horner's scheme at the computed input, and the input's own error, which the map does not enlarge.

        Each step is a product of the rounded kernel `L / i`, one more rounding of each term, and an addition.

        Raises:
            UnsoundError: where torch may not compute a convolution as sums of products.
        """
        refuse_fast_convolution(self.weight.device, state.dtype)
        kernel, norm, value = self.materialise().weight, self._norm(), self.lipschitz_bound().value
        absolute = absolute_convolution_bound(kernel, self.input_size, padding=self.padding)
        terms = math.prod(kernel.shape[1:]) + 1
        longest = add_up(state.norm, state.error)
        inner = RoundingState(norm=longest, error=0.0, unit=state.unit)
        for power in reversed(range(1, TERMS)):
            bound, size = (fraction_up(Fraction(n) / power) for n in (norm, absolute))
            inner = after_addition(after_product(inner, terms, bound, size), longest)
        after = RoundingState(
            norm=mul_up(value, state.norm),
            error=add_up(mul_up(value, state.error), inner.error),
            unit=state.unit,
        )
        return after_addition(after, norm_up(self.bias, copies=math.prod(self.input_size)))

    def materialise(self) -> Self:
        """Return a copy that stores the kernel of L, without the vectors of the power iteration."""
        layer = super().materialise().eval()
        with torch.no_grad():
            layer.weight = nn.Parameter(layer.kernel().detach().clone())
        layer.register_buffer("wide", None)
        layer.register_buffer("square", None)
        layer.formed = True
        return layer


def transposed(kernel: Tensor) -> Tensor:
    """The kernel of the adjoint of a zero-padded convolution of stride 1 with an odd kernel `(c, c, k, k)`."""
    return kernel.transpose(0, 1).flip(2, 3)


def unfolded(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices with the numbers of a kernel `(c, c, k, k)`: `(c k^2, c)` and `(c k, c k)`.

    Singla & Feizi ("Fantastic Four", ICLR 2021): a convolution's norm is at most k times the norm of either. Their four
    matrices are these and two more, which for a skew kernel are transposes of these with rows and columns permuted and signs
    changed.
    """
    c, _, k, _ = kernel.shape
    return kernel.permute(0, 2, 3, 1).reshape(c * k * k, c), kernel.transpose(1, 2).reshape(c * k, c * k)
