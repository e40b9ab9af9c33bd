"""A convolution whose kernel is formed from a parameter at every step, and stored once for inference."""

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.bounds.factor import small_convolution_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState
from lipnext.nn.convolution import after_convolution, check_size


class FormedConvolution(LipschitzModule):
    """A zero-padded convolution of stride 1 on `(B, c_in, H, W)`, sizes kept; `bias (c_out,)`.

    `weight` is the parameter until the layer is materialised, and from then on the kernel `(c_out, c_in, k, k)` itself: what
    is certified is the stored kernel, whatever formed it.

    Args:
        start: first value of the parameter.
        channels_out: c_out.
        kernel: k, odd.
        input_size: `(H, W)`.
    """

    def __init__(self, start: Tensor, channels_out: int, kernel: int, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.input_size, self.padding, self.formed = input_size, kernel // 2, False
        self.weight = nn.Parameter(start.to(torch.get_default_dtype()))
        self.bias = nn.Parameter(torch.zeros(channels_out))

    @abstractmethod
    def form(self) -> Tensor:
        """Form the kernel `(c_out, c_in, k, k)` from `weight`, differentiable."""

    def kernel(self) -> Tensor:
        """The kernel as it is used, formed in the dtype of the weight, autocast or not."""
        if self.formed:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.form()

    def forward(self, images: Tensor) -> Tensor:
        """Apply the layer."""
        check_size(images, self.input_size)
        return functional.conv2d(images, self.kernel(), self.bias, padding=self.padding)

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove the norm of the convolution at this input size, by its matrix or its transfer matrices."""
        return small_convolution_bound(self.kernel(), self.input_size, padding=self.padding)

    def rounding(self, state: RoundingState) -> RoundingState:
        """As for any convolution with the kernel that is used."""
        size, bound = self.input_size, self.lipschitz_bound().value
        return after_convolution(state, self.kernel(), self.bias, bound, size, size, padding=self.padding)

    def materialise(self) -> Self:
        """Return a copy that stores the kernel."""
        layer = super().materialise()
        layer.weight, layer.formed = nn.Parameter(self.kernel().detach().clone()), True
        return layer
