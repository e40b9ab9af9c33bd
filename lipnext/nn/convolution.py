"""An unconstrained convolution: its constant is estimated for the loss and proved for the certificate."""

import math
import re
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.bounds.convolution import absolute_convolution_bound
from lipnext.bounds.factor import small_convolution_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import ConfigError
from lipnext.core.guard import refuse_fast_convolution
from lipnext.core.local import AffineModule
from lipnext.core.propagation import after_affine, norm_up
from lipnext.core.rounding import RoundingState
from lipnext.nn.power_iteration import estimate_convolution_norm

STEPS = 5
"""Power iterations a training step, from where the last step left off."""


class Convolution(AffineModule):
    """A zero-padded convolution on `(B, c_in, H, W)`; `weight (c_out, c_in, k, k)`, `bias (c_out,)` or None.

    Args:
        channels_in: c_in.
        channels_out: c_out.
        kernel: k.
        input_size: `(H, W)` of the images before padding: the norm depends on it.
        stride: in both directions.
        padding: zeros on all sides.
        bias: whether there is one.
        generator: source of randomness; the entries of the weight start with variance 1 / (c_in k^2).
    """

    image: Tensor

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        input_size: tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.stride, self.padding = input_size, stride, padding
        fan_in = channels_in * kernel**2
        start = torch.randn(channels_out, channels_in, kernel, kernel, generator=generator) / math.sqrt(
            fan_in
        )
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None
        image = torch.randn(1, channels_in, *input_size, generator=generator)
        self.register_buffer("image", image / torch.linalg.vector_norm(image))

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        kernel = self.weight.shape[-1]
        height, width = ((side + 2 * self.padding - kernel) // self.stride + 1 for side in self.input_size)
        return height, width

    def forward(self, images: Tensor) -> Tensor:
        """Apply the layer."""
        check_size(images, self.input_size)
        return functional.conv2d(images, self.weight, self.bias, stride=self.stride, padding=self.padding)

    @property
    def direction(self) -> Tensor:
        """Where the power iteration stands, `(1, c_in, H, W)`."""
        return self.image

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with a kernel and no bias."""
        return functional.conv2d(x, weight, stride=self.stride, padding=self.padding)

    def adjoint(self, y: Tensor, weight: Tensor) -> Tensor:
        """Convolve back; pixels that the stride never meets get zero."""
        kernel = weight.shape[-1]
        height, width = (
            side - ((out - 1) * self.stride - 2 * self.padding + kernel)
            for side, out in zip(self.input_size, y.shape[2:], strict=True)
        )
        return functional.conv_transpose2d(
            y, weight, stride=self.stride, padding=self.padding, output_padding=(height, width)
        )

    def estimate_lipschitz(self) -> Tensor:
        """Power iteration on the kernel, kept warm from step to step."""
        norm, image = estimate_convolution_norm(
            self.weight, self.image, STEPS, stride=self.stride, padding=self.padding
        )
        self.image = image
        return norm

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove the norm of the convolution at this input size, by its matrix or its transfer matrices."""
        return small_convolution_bound(self.weight, self.input_size, stride=self.stride, padding=self.padding)

    def rounding(self, state: RoundingState) -> RoundingState:
        """Return the state behind `after_convolution`."""
        return after_convolution(
            state,
            self.weight,
            self.bias,
            self.lipschitz_bound().value,
            self.input_size,
            self.output_size,
            stride=self.stride,
            padding=self.padding,
        )

    def materialise(self) -> Self:
        """Return a copy whose image of the power iteration is not saved with it."""
        layer = super().materialise()
        layer.register_buffer("image", layer.image, persistent=False)
        return layer


def read_convolution(text: str) -> tuple[int, int, int, int]:
    """Read "32x4/2p1" as channels, kernel, stride and padding; both of the latter are 1 where they are left out.

    Raises:
        ConfigError: for any other form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:/([1-9]\d*))?(?:p(\d+))?", text.strip())
    if match is None:
        raise ConfigError(
            f"model.convolutions: '{text}' cannot be read; write channels x kernel / stride p padding, such as "
            "'32x4/2p1'"
        )
    channels, kernel, stride, padding = match.groups(default="1")
    return int(channels), int(kernel), int(stride), int(padding)


def check_size(images: Tensor, input_size: tuple[int, int]) -> None:
    """Refuse images `(B, c, H, W)` of another size than the one whose norm is proved: a larger one may have a larger norm."""
    if tuple(images.shape[2:]) != tuple(input_size):
        raise ValueError(
            f"`images` must have the sides {tuple(input_size)} for which the norm is proved, got {tuple(images.shape)}."
        )


def after_convolution(
    state: RoundingState,
    kernel: Tensor,
    bias: Tensor | None,
    bound: float,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 0,
) -> RoundingState:
    """Sums of `c_in k^2` products, and the bias, which repeats at every position; `bound` is that of the convolution.

    Raises:
        UnsoundError: where torch may not compute them as sums of products.
    """
    refuse_fast_convolution(kernel.device, state.dtype)
    absolute = absolute_convolution_bound(kernel, input_size, stride=stride, padding=padding)
    shift = 0.0 if bias is None else norm_up(bias, copies=math.prod(output_size))
    return after_affine(state, math.prod(kernel.shape[1:]), bound, absolute, shift)
