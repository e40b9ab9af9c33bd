"""LiResNet's linear residual block: a 3 x 3 convolution near the identity, centred, its constant measured as one map.

The block `x + conv(x)` is itself one convolution, whose norm is that of `I + W`: much less than the `1 + ||W||` of a residual
block with something nonlinear inside.
"""

from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState
from lipnext.core.world import batch_mean
from lipnext.nn.convolution import Convolution, check_size
from lipnext.nn.power_iteration import estimate_convolution_norm

STEPS = 10
"""Power iterations a training step, from where the last step left off, as published."""
MOMENTUM = 0.1
"""Share of a batch's mean in the running mean."""


class LinearResidual(LipschitzModule):
    """`x -> K * x + b - mean`, zero-padded, on images `(B, c, H, W)`, with the kernel `K = I + D^-1/2 gamma theta`.

    The mean is that of `(K - I) * x` over the batch and the positions in training, a running one in evaluation: the block is
    centred, and never divided by a deviation. Parameters: `theta (c, c, 3, 3)`, `gamma (c, 1, 1, 1)`, `bias (c,)`. A
    materialised block stores `weight` K in place of the first two, and the running mean within `bias`.

    Args:
        channels: c.
        input_size: `(H, W)`.
        depth: D, the number of such blocks in a row.
        generator: source of randomness; the entries of theta start with deviation 1 / (9 c).
    """

    batch_parts: ClassVar[Literal["any", "processes", "none"]] = "processes"
    image: Tensor
    mean: Tensor | None

    def __init__(
        self,
        channels: int,
        input_size: tuple[int, int],
        depth: int,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.input_size, self.depth = channels, input_size, depth
        start = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels)
        self.theta: nn.Parameter | None = nn.Parameter(start)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.weight: nn.Parameter | None = None
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        image = torch.randn(1, channels, *input_size, generator=generator)
        self.register_buffer("image", image / torch.linalg.vector_norm(image))

    def residual(self) -> Tensor:
        """The kernel less the identity."""
        assert self.theta is not None
        assert self.gamma is not None
        return self.depth**-0.5 * self.gamma * self.theta

    def kernel(self) -> Tensor:
        """The kernel K, `(c, c, 3, 3)`."""
        if self.weight is not None:
            return self.weight
        kernel = self.residual()
        identity = torch.zeros_like(kernel)
        identity[:, :, 1, 1].fill_diagonal_(1.0)
        return identity + kernel

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block; in training it follows the running mean."""
        check_size(images, self.input_size)
        if self.weight is not None or not self.training:
            bias = self.bias if self.mean is None else self.bias - self.mean
            return functional.conv2d(images, self.kernel(), bias, padding=1)
        # the faster layout; what is there already is not copied
        images = images.contiguous(memory_format=torch.channels_last)
        out = functional.conv2d(images, self.residual(), padding=1)
        # half precision would lose the mean of a few thousand numbers
        mean = batch_mean(out, (0, 2, 3), torch.promote_types(out.dtype, torch.float32))
        assert self.mean is not None
        with torch.no_grad():
            self.mean.lerp_(mean.to(self.mean.dtype), MOMENTUM)
        shift = (self.bias - mean).to(out.dtype)
        return images + out + shift[:, None, None]

    def estimate_lipschitz(self) -> Tensor:
        """Power iteration on the kernel, kept warm from step to step."""
        norm, image = estimate_convolution_norm(self.kernel(), self.image, STEPS, padding=1)
        self.image = image
        return norm

    def convolution(self) -> Convolution:
        """The plain convolution that is applied in evaluation; what bound and rounding are derived from."""
        block = self.materialise()
        assert block.weight is not None
        # a generator of its own: a start that nobody sees must not advance the global one
        layer = Convolution(1, 1, 3, self.input_size, padding=1, generator=torch.Generator())
        layer.weight, layer.bias = block.weight, block.bias
        return layer

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove the norm of the convolution with K at this input size."""
        return self.convolution().lipschitz_bound()

    def rounding(self, state: RoundingState) -> RoundingState:
        """As for any convolution.

        Raises:
            UnsoundError: where torch may not compute it as sums of products.
        """
        return self.convolution().rounding(state)

    def materialise(self) -> Self:
        """Return a copy that stores K and the shift, formed in the dtype of the weights."""
        block = super().materialise()
        with torch.no_grad():
            block.weight = nn.Parameter(self.kernel().detach().clone())
            if self.mean is not None:
                block.bias = nn.Parameter((self.bias - self.mean).detach().clone())
        block.theta, block.gamma = None, None
        block.register_buffer("mean", None)
        block.register_buffer("image", None)
        return block
