"""LipNeXt's block, `Z = act(M R^T shift(R (X + p)) + b)`, as one differentiable operation.

`M R^T` is formed once per step, which leaves two products per token instead of three. Forward and backward are written by
hand: a shift's adjoint is the opposite shift, beta-Abs needs one sign per folded channel, and nothing else is copied. All but
beta-Abs is invertible, so the block can also be run backwards from its output and those signs.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lipnext.bounds.spectral import absolute_norm_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.propagation import after_affine, norm_up
from lipnext.core.rounding import RoundingState
from lipnext.manifold.haar import haar
from lipnext.nn.activation import BetaAbs
from lipnext.nn.mixing import OrthogonalMixing
from lipnext.nn.position import ChannelBias, PositionalEncoding
from lipnext.nn.reversible import Reversible, Weights, compute_dtype, pack_signs, unpack_signs
from lipnext.nn.shift import CircularShift, shift_
from lipnext.nn.triton_dispatch import usable


class ShiftBlock(Reversible):
    """`Z = act(M R^T shift(R (X + p)) + b)` on tokens `(B, H, W, C)` (LipNeXt, block equation).

    Parameters: `rotation` R and `mixing` M, orthogonal `C x C`; `position` p, shape `(H, W, 1)` or `(H, W, C)`; `bias` b,
    shape `(C,)`. A materialised block stores `product` = M R^T in place of `mixing`.

    Args:
        channels: width C.
        grid: positions `(H, W)`.
        group: channels shifted each way, at most C / 4.
        folded: channels that beta-Abs folds, at most C.
        each: learn a number for each channel of a position in p, instead of one for all of them as published.
        generator: source of randomness for the Haar start of `rotation`; `mixing` starts equal to it, so
            that the block starts as shift and fold in a rotated basis.
    """

    orthogonal: ClassVar[tuple[str, ...]] = ("rotation", "mixing", "product")

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        group: int,
        folded: int,
        each: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= 4 * group <= channels:
            raise ValueError(
                f"`group` must be between 0 and a quarter of the {channels} channels, got {group}."
            )
        if not 0 <= folded <= channels:
            raise ValueError(f"`folded` must be between 0 and the {channels} channels, got {folded}.")
        self.channels, self.grid, self.group, self.folded = channels, grid, group, folded
        self.rotation = nn.Parameter(haar(channels, generator=generator, dtype=torch.get_default_dtype()))
        self.mixing: nn.Parameter | None = nn.Parameter(self.rotation.detach().clone())
        self.product: nn.Parameter | None = None
        self.position = nn.Parameter(torch.zeros(*grid, channels if each else 1))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the block; under autocast both token products run in the autocast dtype.

        A network whose weights are being trained takes `shift_triton` on a GPU where Triton is installed; what is evaluated,
        and so what is certified, takes torch's operations.
        """
        dtype = compute_dtype(tokens)
        product = self.product if self.mixing is None else _outer_product(self.mixing, self.rotation)
        assert product is not None
        tokens = tokens.to(dtype)
        function: type[Function] = _ShiftBlockFunction
        if self.training and product.requires_grad and usable(tokens, torch.float32, torch.bfloat16):
            from lipnext.nn.shift_triton import ShiftBlockFunction

            function = ShiftBlockFunction
        with torch.autocast(tokens.device.type, enabled=False):
            return function.apply(
                tokens,
                self.position.to(dtype),
                self.rotation.to(dtype),
                product.to(dtype),
                self.bias.to(dtype),
                self.group,
                self.folded,
            )

    def advance(self, tokens: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Apply the block; the signs of the folded channels are kept, one bit each."""
        dtype = tokens.dtype
        product = weights["product"] if "product" in weights else weights["mixing"] @ weights["rotation"].mT
        _, _, v = _unfolded(
            tokens,
            weights["position"].to(dtype),
            weights["rotation"].to(dtype),
            product.to(dtype),
            weights["bias"].to(dtype),
            self.group,
        )
        kept = pack_signs(v[:, : self.folded])
        v[:, : self.folded].abs_()
        return v.view(tokens.shape), kept

    def reverse(
        self, output: Tensor, kept: Tensor, grad: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Undo fold, bias, product, shift, rotation and position; the gradient of each on the way."""
        shape, dtype = output.shape, output.dtype
        rotation = weights["rotation"].to(dtype)
        product = weights["product"] if "product" in weights else weights["mixing"] @ weights["rotation"].mT
        stored, product = product.dtype, product.to(dtype)
        v, gv = output.reshape(-1, shape[-1]), grad.reshape(-1, shape[-1]).clone()
        slope = unpack_signs(kept, (len(v), self.folded), dtype)
        v[:, : self.folded].mul_(slope)
        gv[:, : self.folded].mul_(slope)
        del slope
        back = _undone(product)
        u = torch.addmm(-(weights["bias"].to(dtype) @ back), v, back)
        del output, v
        gu, gproduct, gbias = _below_product(gv, u, product)
        del gv
        shift_(u.view(shape), self.group, -1)
        shift_(gu.view(shape), self.group, -1)
        x = u @ _undone(rotation)
        del u
        gx, grotation, gposition = below_rotation(gu, x, rotation, shape, weights["position"].shape[-1])
        gradients = {"rotation": grotation, "product": gproduct, "position": gposition, "bias": gbias}
        gradients = {name: value.to(stored) for name, value in gradients.items()}
        if "mixing" in weights:
            gproduct = gradients.pop("product")
            gradients["mixing"] = gproduct @ weights["rotation"]
            gradients["rotation"] += gproduct.mT @ weights["mixing"]
        return x.view(shape).sub_(weights["position"].to(dtype)), gx, gradients

    def layers(
        self,
    ) -> tuple[PositionalEncoding, OrthogonalMixing, CircularShift, OrthogonalMixing, ChannelBias, BetaAbs]:
        """The block as a chain of elementary layers with the same weights; what bounds and rounding are derived from."""
        block = self.materialise()
        assert block.product is not None
        position = PositionalEncoding(*self.grid, self.channels, each=self.position.shape[-1] > 1)
        position.weight = block.position
        # identity: no random start, which would advance the global generator
        rotation, mixing = OrthogonalMixing(1, identity=True), OrthogonalMixing(1, identity=True)
        rotation.weight, mixing.weight = block.rotation, block.product
        bias = ChannelBias(self.channels, self.grid[0] * self.grid[1])
        bias.weight = block.bias
        shift = CircularShift(self.channels, self.group)
        return position, rotation, shift, mixing, bias, BetaAbs(self.folded)

    def unfused(self) -> nn.Sequential:
        """Return `layers()` in a row: the fused forward works in place, which other runtimes do not."""
        return nn.Sequential(*self.layers())

    def lipschitz_bound(self) -> LipschitzBound:
        """The product of the proved bounds of R and of the stored M R^T; everything else is an isometry or 1-Lipschitz."""
        return LipschitzBound.compose(*(layer.lipschitz_bound() for layer in self.layers()))

    def rounding(self, state: RoundingState) -> RoundingState:
        """Follow the fused forward: as `layers()`, but with the bias inside the second product."""
        position, rotation, _, mixing, bias, _ = self.layers()
        state = rotation.rounding(position.rounding(state))
        bound, absolute = mixing.lipschitz_bound().value, absolute_norm_bound(mixing.weight)
        shift_norm = norm_up(bias.weight, copies=self.grid[0] * self.grid[1])
        return after_affine(state, self.channels, bound, absolute, shift_norm)

    def materialise(self) -> Self:
        """Return a copy that stores M R^T, formed in the weights' own dtype: bit for bit the same function."""
        block = self._copy()
        if block.mixing is not None:
            with torch.no_grad():
                block.product = nn.Parameter(_outer_product(block.mixing, block.rotation))
            block.mixing = None
        return block

    def _copy(self) -> Self:
        return super().materialise()


def _outer_product(mixing: Tensor, rotation: Tensor) -> Tensor:
    with torch.autocast(mixing.device.type, enabled=False):
        return mixing @ rotation.mT


def _undone(matrix: Tensor) -> Tensor:
    """The matrix Q with `(x W^T) Q = x`, up to the square of W's distance from orthogonal: `Q = 2 W - W W^T W`.

    W itself would do for an exactly orthogonal one. Weights drift off between two retractions, and over a deep chain that
    would add up. In half precision W is taken: its rounding adds less than that of the tokens, and products of weights in
    float32 would cost a GPU more than those of the tokens.
    """
    if matrix.dtype.itemsize < 4:
        return matrix
    return 2 * matrix - matrix @ (matrix.mT @ matrix)


def _unfolded(
    tokens: Tensor, position: Tensor, rotation: Tensor, product: Tensor, bias: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens as rows `(N, C)` behind the position, behind the shift, and before the fold."""
    shape = tokens.shape
    x = (tokens + position).reshape(-1, shape[-1])
    u = x @ rotation.mT
    shift_(u.view(shape), group)
    return x, u, torch.addmm(bias, u, product.mT)


def _below_product(gv: Tensor, u: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, of the product and of the bias."""
    return gv @ product, gv.mT @ u, gv.sum(0)


def below_rotation(
    gu: Tensor, x: Tensor, rotation: Tensor, shape: torch.Size, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the tokens, of the rotation and of the position, `(H, W, columns)`; `gu` is shifted back already."""
    gx = (gu @ rotation).view(shape)
    # For one column the sum of gx over channels, as one matrix-vector product instead of a pass over gx.
    each = gx if columns > 1 else (gu @ rotation.sum(1)).view(*shape[:3], 1)
    return gx, gu.mT @ x, each.sum(0)


class _ShiftBlockFunction(Function):
    """The fused forward and backward; all tensors share one dtype.

    With frozen weights, as under an attack, the backward pass is that of the tokens alone: half of the products.
    """

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
        x, u, v = _unfolded(tokens, position, rotation, product, bias, group)
        ctx.frozen = not any(ctx.needs_input_grad[1:])
        # The slope of |v|, +1 or -1 (at v = 0 either is in the subdifferential). Kept in the compute dtype: a product
        # with it in the backward pass is several times faster than a masked copy.
        slope = torch.copysign(v.new_ones(()), v[:, :folded])
        v[:, :folded].abs_()
        # The gradients of the weights alone need the first two.
        ctx.save_for_backward(*((None, None) if ctx.frozen else (x, u)), rotation, product, slope)
        ctx.shape, ctx.columns, ctx.group, ctx.folded = tokens.shape, position.shape[-1], group, folded
        return v.view(tokens.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, rotation, product, slope = ctx.saved_tensors
        shape = ctx.shape
        gv = grad.reshape(-1, shape[-1]).clone()
        gv[:, : ctx.folded].mul_(slope)
        if ctx.frozen:
            gu = gv @ product
            shift_(gu.view(shape), ctx.group, -1)
            return (gu @ rotation).view(shape), None, None, None, None, None, None
        gu, gproduct, gbias = _below_product(gv, u, product)
        shift_(gu.view(shape), ctx.group, -1)
        gx, grotation, gposition = below_rotation(gu, x, rotation, shape, ctx.columns)
        return gx, gposition, grotation, gproduct, gbias, None, None
