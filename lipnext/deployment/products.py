"""Operations that onnxruntime lacks in float64, spelled out as sums and matrix products.

The sums have the same terms, and zeros, so that every bound for any order of summation holds for them too. What is not
spelled out here stays as it is (`NotImplemented`), and the runtime refuses it by name.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def convolution(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d` as one matrix product."""
    outputs, _, *kernel = weight.shape
    padded = functional.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    windows = _windows(padded, kernel, stride, dilation)
    rows, columns = windows.shape[3:]
    # (batch, groups, terms of a sum, positions), ordered as the weight is: channel, row, column
    terms = windows.reshape(images.shape[0], groups, -1, rows * columns)
    sums = weight.reshape(groups, outputs // groups, -1) @ terms
    result = sums.reshape(images.shape[0], outputs, rows, columns)
    return result if bias is None else result + bias[:, None, None]


def transposed_convolution(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """`torch.conv_transpose2d` without a stride or groups: a convolution with the kernel turned round."""
    if any(step != 1 for step in stride) or any(output_padding) or groups != 1:
        return NotImplemented
    turned = weight.transpose(0, 1).flip(2, 3)
    around = [step * (k - 1) - p for step, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    return convolution(images, turned, bias, padding=around, dilation=dilation)


def average_pooling(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`avg_pool2d` of windows that lie inside the image."""
    if any(padding) or ceil_mode or divisor_override is not None:
        return NotImplemented
    return _windows(images, kernel, stride or kernel, (1, 1)).sum(2) / (kernel[0] * kernel[1])


def _windows(images: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """All windows of images (B, c, H, W), shape (B, c, pixels of a window, rows, columns)."""
    reach = [step * (k - 1) + 1 for step, k in zip(dilation, kernel, strict=True)]
    last = [(images.shape[2 + d] - reach[d]) // stride[d] * stride[d] + 1 for d in (0, 1)]
    return torch.stack(
        [
            images[:, :, top : top + last[0] : stride[0]][..., left : left + last[1] : stride[1]]
            for top in range(0, reach[0], dilation[0])
            for left in range(0, reach[1], dilation[1])
        ],
        dim=2,
    )


PRODUCTS = {
    torch.ops.aten.conv2d.default: convolution,
    torch.ops.aten.conv_transpose2d.input: transposed_convolution,
    torch.ops.aten.avg_pool2d.default: average_pooling,
}
"""What `ExportedProgram.run_decompositions` takes."""
