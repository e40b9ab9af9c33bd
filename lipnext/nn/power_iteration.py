"""Power iteration on the weights of a layer: the training constant of most published systems. It approaches from below.

What comes out is differentiable in the weights and belongs into losses and progress figures; no certificate accepts it. Both
functions switch autocast off, since bfloat16 loses the iteration.
"""

import torch
from torch import Tensor
from torch.nn import functional


def estimate_dense_norm(weight: Tensor, vector: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Estimate `||W||_2`.

    Args:
        weight: `(m, n)`.
        vector: where to start, `(n,)`, not zero; pass the returned one on to go on from there.
        steps: at least 0; the gradient flows through the last product alone.

    Returns:
        The estimate, a scalar, and the vector `(n,)`, detached.
    """
    with torch.autocast(weight.device.type, enabled=False):
        with torch.no_grad():
            for _ in range(steps):
                vector = _unit(weight.mT @ (weight @ vector), vector)
        return torch.linalg.vector_norm(weight @ vector), vector


def estimate_convolution_norm(
    kernel: Tensor, image: Tensor, steps: int, *, stride: int = 1, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """Estimate the l2 norm of a zero-padded convolution (LiResNet, equation of the Lipschitz constant; A.1 of the analysis).

    Args:
        kernel: `(c_out, c_in, k, k)`.
        image: where to start, `(1, c_in, H, W)`, not zero; its size is that of the layer's input.
        steps: at least 0; the gradient flows through the last convolution alone.
        stride: of the convolution.
        padding: of the convolution, zeros on all sides.

    Returns:
        The estimate, a scalar, and the image, detached.
    """
    with torch.autocast(kernel.device.type, enabled=False):
        with torch.no_grad():
            for _ in range(steps):
                output = functional.conv2d(image, kernel, stride=stride, padding=padding)
                # without it the adjoint of a strided convolution is smaller than the image
                rest = tuple(
                    side - ((out - 1) * stride - 2 * padding + size)
                    for side, out, size in zip(
                        image.shape[2:], output.shape[2:], kernel.shape[2:], strict=True
                    )
                )
                adjoint = functional.conv_transpose2d(
                    output, kernel, stride=stride, padding=padding, output_padding=rest
                )
                image = _unit(adjoint, image)
        return torch.linalg.vector_norm(
            functional.conv2d(image, kernel, stride=stride, padding=padding)
        ), image


def _unit(vector: Tensor, otherwise: Tensor) -> Tensor:
    """Normalise, with no small number added to the norm; where the products have vanished the iteration stays where it is.

    The largest entry goes first: squares of entries beyond 1e19 would overflow in float32, those below 1e-23 vanish.
    """
    largest = vector.abs().amax()
    scaled = vector / largest
    return torch.where(
        largest > torch.finfo(vector.dtype).tiny, scaled / torch.linalg.vector_norm(scaled), otherwise
    )
