"""Layers that can be run backwards, so that a chain of them stores its last output and next to nothing else for training.

After RevNet (Gomez et al., NeurIPS 2017), where the blocks have two streams to be invertible. Here a block is orthogonal up to
the signs that it folds, so its input follows from its output and one bit for each folded entry. What is restored is used by the
gradient at once and handed to the block before, and no stored activation is left to grow with the depth.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lipnext.core.module import LipschitzModule

Weights = Mapping[str, Tensor]
"""The parameters of a layer, by name."""


class Reversible(LipschitzModule):
    """A layer whose input can be computed from its output and a few stored bits.

    Both methods are functions of their arguments alone and compute in the dtype of the tokens.
    """

    @abstractmethod
    def advance(self, tokens: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Return the output, the same as that of `forward`, and what `reverse` needs beside it."""

    @abstractmethod
    def reverse(
        self, output: Tensor, kept: Tensor, grad: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Go back through the layer and its gradient in one pass.

        Args:
            output: of `advance`; may be overwritten.
            kept: of `advance`.
            grad: gradient of the output; not to be overwritten.
            weights: those of `advance`.

        Returns:
            The input, its gradient, and the gradients of all weights.
        """


def run_reversibly(layers: Sequence[Reversible], tokens: Tensor) -> Tensor:
    """Apply layers in a row; the backward pass restores the input of each from the output of the last.

    Each layer is a node of the graph of its own, so the gradients of its weights are there as soon as it is done.
    """
    tokens = tokens.to(compute_dtype(tokens))
    tape: list[Tensor] = []
    with torch.autocast(tokens.device.type, enabled=False):
        for number, layer in enumerate(layers, 1):
            weights = dict(layer.named_parameters())
            is_last = number == len(layers)
            tokens = _Step.apply(tokens, layer, tape, is_last, tuple(weights), *weights.values())
    return tokens


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """The dtype in which products with `tokens` run: autocast's where it is on, else their own."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


class _Step(Function):
    """One layer of the chain. `tape` holds the output of the layer whose backward pass comes next."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        layer: Reversible,
        tape: list[Tensor],
        is_last: bool,
        names: tuple[str, ...],
        *weights: Tensor,
    ) -> Tensor:
        output, kept = layer.advance(tokens, dict(zip(names, weights, strict=True)))
        ctx.save_for_backward(kept, *weights, *([output] if is_last else []))
        ctx.layer, ctx.tape, ctx.is_last, ctx.names = layer, tape, is_last, names
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, *saved = ctx.saved_tensors
        output = saved.pop().clone() if ctx.is_last else ctx.tape.pop()
        weights = dict(zip(ctx.names, saved, strict=True))
        with torch.autocast(grad.device.type, enabled=False):
            tokens, grad, gradients = ctx.layer.reverse(output, kept, grad, weights)
        ctx.tape[:] = [tokens]
        return grad, None, None, None, None, *(gradients[name] for name in ctx.names)


# Eight bytes of 0 or 1 that are read as one integer: the product moves byte i to bit 56 + i, without carries.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_BIT_OF_BYTE = 0x8040201008040201 - 2**64


def pack_signs(values: Tensor) -> Tensor:
    """Return one bit for each entry, set where it is negative (or -0), eight to a byte: uint8 of `ceil(numel / 8)`."""
    bits = torch.signbit(values).flatten().view(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8))
    return (bits.view(torch.int64).mul_(_GATHER) >> 56).to(torch.uint8)


def unpack_signs(packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return what `pack_signs` packed as a tensor of `shape` with entries 1 and -1."""
    bits = (packed.to(torch.int64).mul_(_SPREAD) & _BIT_OF_BYTE).view(torch.uint8) != 0
    return bits[: shape[0] * shape[1]].view(shape).to(dtype).mul_(-2).add_(1)
