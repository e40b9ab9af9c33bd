"""LipNeXt's block, `Z = act(M R^T shift(R (X + p)) + b)`, as one differentiable operation.

`M R^T` is formed once per step, which leaves two products per token instead of three. Forward and backward are written by
hand: a shift's adjoint is the opposite shift, beta-Abs needs one sign per folded channel, and nothing else is copied.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lipnext.bounds.spectral import absolute_norm_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_affine, norm_up
from lipnext.core.rounding import RoundingState
from lipnext.manifold.haar import haar
from lipnext.nn.activation import BetaAbs
from lipnext.nn.mixing import OrthogonalMixing
from lipnext.nn.position import ChannelBias, PositionalEncoding
from lipnext.nn.shift import CircularShift, shift_


class ShiftBlock(LipschitzModule):
    """`Z = act(M R^T shift(R (X + p)) + b)` on tokens `(B, H, W, C)` (LipNeXt, block equation).

    Parameters: `rotation` R and `mixing` M, orthogonal `C x C`; `position` p, shape `(H, W, 1)`; `bias` b, shape `(C,)`. A
    materialised block stores `product` = M R^T in place of `mixing`.

    Args:
        channels: width C.
        grid: positions `(H, W)`.
        group: channels shifted each way, at most C / 4.
        folded: channels that beta-Abs folds, at most C.
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
        self.position = nn.Parameter(torch.zeros(*grid, 1))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the block; under autocast both token products run in the autocast dtype."""
        dtype = _compute_dtype(tokens)
        product = self.product if self.mixing is None else _outer_product(self.mixing, self.rotation)
        assert product is not None
        with torch.autocast(tokens.device.type, enabled=False):
            return _ShiftBlockFunction.apply(
                tokens.to(dtype),
                self.position.to(dtype),
                self.rotation.to(dtype),
                product.to(dtype),
                self.bias.to(dtype),
                self.group,
                self.folded,
            )

    def layers(
        self,
    ) -> tuple[PositionalEncoding, OrthogonalMixing, CircularShift, OrthogonalMixing, ChannelBias, BetaAbs]:
        """The block as a chain of elementary layers with the same weights; what bounds and rounding are derived from."""
        block = self.materialise()
        assert block.product is not None
        position = PositionalEncoding(*self.grid, self.channels)
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


def _compute_dtype(tokens: Tensor) -> torch.dtype:
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


class _ShiftBlockFunction(Function):
    """The fused forward and backward; all tensors share one dtype."""

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
        shape = tokens.shape
        x = (tokens + position).reshape(-1, shape[-1])
        u = x @ rotation.mT
        shift_(u.view(shape), group)
        v = torch.addmm(bias, u, product.mT)
        # The slope of |v|, +1 or -1 (at v = 0 either is in the subdifferential). Kept in the compute dtype: a product
        # with it in the backward pass is several times faster than a masked copy.
        slope = torch.copysign(v.new_ones(()), v[:, :folded])
        v[:, :folded].abs_()
        ctx.save_for_backward(x, u, rotation, product, slope)
        ctx.shape, ctx.group, ctx.folded = shape, group, folded
        return v.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, rotation, product, slope = ctx.saved_tensors
        shape = ctx.shape
        gv = grad.reshape(-1, shape[-1]).clone()
        gv[:, : ctx.folded].mul_(slope)
        gu = gv @ product
        gproduct = gv.mT @ u
        gbias = gv.sum(0)
        shift_(gu.view(shape), ctx.group, -1)
        gx = (gu @ rotation).view(shape)
        grotation = gu.mT @ x
        # The sum of gx over channels, as one matrix-vector product instead of a pass over gx.
        gposition = (gu @ rotation.sum(1)).view(shape[:3]).sum(0).unsqueeze(-1)
        return gx, gposition, grotation, gproduct, gbias, None, None
