"""LipNeXt's block in training on a GPU: what stands between its products, each in one pass, in Triton.

The order is shift, product, bias, beta-Abs. The product lies between the shift and the bias, so the two cannot be one
kernel; the bias is added by the product itself (`addmm`), which costs nothing and rounds once. There remain three kernels:

- the shift, in place, reads and writes only what moves, once, where copies do it twice;
- beta-Abs, in place, also writes the slopes, one byte each;
- the backward pass of beta-Abs, one pass over the gradient, also adds up the gradient of the bias.

The values are bit for bit those of `block`; the gradient of the bias is summed in another order.
Checked in Triton's interpreter alone (`tests/nn/test_shift_triton.py`); these kernels have never run on a GPU.
"""

from __future__ import annotations  # the annotations of kernels name Triton, which may be missing

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lipnext.nn.block import below_rotation
from lipnext.nn.shift import DIRECTIONS
from lipnext.nn.triton_language import jit, tiles, tl

_TILE = 64  # rows, and channels, of a tile of tokens
_LINE = 4096  # numbers of the line of pixels that one program shifts


class ShiftBlockFunction(Function):
    """The block's forward and backward pass, arguments as in `block`; all tensors share float32 or bfloat16."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        position: Tensor,
        rotation: Tensor,
        product: Tensor,
        bias: Tensor,
        group: int,
        folded: int,
    ) -> Tensor:
        """Return the tokens behind beta-Abs."""
        shape = tokens.shape
        x = (tokens + position).reshape(-1, shape[-1])
        u = x @ rotation.mT
        shift_(u.view(shape), group)
        v = torch.addmm(bias, u, product.mT)
        slope = fold_(v, folded)
        ctx.save_for_backward(x, u, rotation, product, slope)
        ctx.shape, ctx.columns, ctx.group = shape, position.shape[-1], group
        return v.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, position, rotation, product and bias."""
        x, u, rotation, product, slope = ctx.saved_tensors
        gv, gbias = unfolded(grad.reshape(-1, ctx.shape[-1]), slope)
        gu, gproduct = gv @ product, gv.mT @ u
        shift_(gu.view(ctx.shape), ctx.group, -1)
        gx, grotation, gposition = below_rotation(gu, x, rotation, ctx.shape, ctx.columns)
        return gx, gposition, grotation, gproduct, gbias, None, None


def shift_(tokens: Tensor, group: int, sign: int = 1) -> None:
    """Shift in place, as `lipnext.nn.shift.shift_`.

    Args:
        tokens: contiguous `(B, H, W, C)`, overwritten.
        group: channels per direction.
        sign: 1, or -1 for the inverse.

    Raises:
        ValueError: if the tokens are not contiguous.
    """
    _require_contiguous(tokens)
    if group == 0:
        return
    batch, height, width, channels = tokens.shape
    # Lines along the height begin at every column of an image, those along the width at every row of one.
    lines = {
        1: (height, width * channels, batch * width, width, height * width * channels, channels),
        2: (width, channels, batch * height, height, height * width * channels, width * channels),
    }
    with torch.cuda.device_of(tokens):
        for i, (dim, step) in enumerate(DIRECTIONS):
            length, stride, number, per_image, image, line = lines[dim]
            padded = _power_of_two(length)
            wide = min(_TILE, _power_of_two(group), max(1, _LINE // padded))
            _shift_kernel[tiles((number, 1), (group, wide))](
                tokens,
                length,
                stride,
                per_image,
                image,
                line,
                i * group,
                group,
                step * sign,
                padded,
                wide,
            )


def fold_(v: Tensor, folded: int) -> Tensor:
    """Fold the first channels of contiguous rows `(N, C)` in place; return their slopes, `(N, folded)`, int8.

    The slope is -1 below 0, otherwise 1: at 0 either is in the subdifferential.

    Raises:
        ValueError: if the rows are not contiguous.
    """
    _require_contiguous(v)
    rows, channels = v.shape
    slope = torch.empty(rows, folded, dtype=torch.int8, device=v.device)
    if slope.numel():
        with torch.cuda.device_of(v):
            _fold_kernel[tiles((rows, _TILE), (folded, _TILE))](
                v, slope, rows, channels, folded, _TILE, _TILE
            )
    return slope


def unfolded(grad: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient before the fold, `(N, C)`, and its sum over the rows, `(C,)`, which is added up in float32.

    Args:
        grad: behind the fold, `(N, C)`, left as it is.
        slope: from `fold_`.
    """
    rows, channels = grad.shape
    grad, gv = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
    sums = torch.empty(-(-rows // _TILE), channels, dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        _unfold_kernel[tiles((rows, _TILE), (channels, _TILE))](
            grad, slope, gv, sums, rows, channels, slope.shape[1], _TILE, _TILE
        )
    return gv, sums.sum(0).to(grad.dtype)


@jit
def _shift_kernel(
    tokens,
    length,
    stride,
    per_image,
    image,
    line,
    first,
    group,
    step,
    LENGTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Shift one line of pixels. No other program touches it, so reading all of it before writing is all it takes."""
    tile, across = tl.program_id(0), tl.cdiv(group, WIDE)
    number = (tile // across).to(tl.int64)
    channel = tile % across * WIDE + tl.arange(0, WIDE)
    start = tokens + number // per_image * image + number % per_image * line + first + channel
    at = tl.arange(0, LENGTH)
    exists = (at < length)[:, None] & (channel < group)[None, :]
    values = tl.load(start[None, :] + at[:, None] * stride, mask=exists)
    tl.debug_barrier()  # other threads of this program may still be reading
    to = (at + step + length) % length
    tl.store(start[None, :] + to[:, None] * stride, values, mask=exists)


@jit
def _fold_kernel(v, slope, rows, channels, folded, ROWS: tl.constexpr, WIDE: tl.constexpr):
    tile, across = tl.program_id(0), tl.cdiv(folded, WIDE)
    i = (tile // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tile % across * WIDE + tl.arange(0, WIDE)
    exists = (i < rows)[:, None] & (c < folded)[None, :]
    at = v + i[:, None] * channels + c[None, :]
    value = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    tl.store(at, tl.abs(value), mask=exists)
    sign = tl.where(value < 0, -1, 1).to(tl.int8)
    tl.store(slope + i[:, None] * folded + c[None, :], sign, mask=exists)


@jit
def _unfold_kernel(grad, slope, gv, sums, rows, channels, folded, ROWS: tl.constexpr, WIDE: tl.constexpr):
    tile, across = tl.program_id(0), tl.cdiv(channels, WIDE)
    i = (tile // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tile % across * WIDE + tl.arange(0, WIDE)
    exists = (i < rows)[:, None] & (c < channels)[None, :]
    at = i[:, None] * channels + c[None, :]
    g = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32)
    is_folded = exists & (c < folded)[None, :]
    g *= tl.load(slope + i[:, None] * folded + c[None, :], mask=is_folded, other=1).to(tl.float32)
    tl.store(gv + at, g, mask=exists)
    tl.store(sums + (tile // across).to(tl.int64) * channels + c, tl.sum(g, axis=0), mask=c < channels)


def _power_of_two(number: int) -> int:
    """The next power of two, which the sides of a tile must be."""
    return 1 << (number - 1).bit_length()


def _require_contiguous(x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"the tensor must be contiguous, got the strides {x.stride()} for {tuple(x.shape)}")
