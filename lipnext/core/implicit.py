"""What an implicit network is made of, as its certificate sees it: an affine map, one equation, a head, and reshapes.

The features are the solution of `z = relu(A z + B x + b)`; an `AffineModule` gives `v = B x + b`, an `ImplicitModule` solves.
"""

from abc import abstractmethod
from typing import TypeGuard

from torch import Tensor, nn

from lipnext.core.errors import UnsoundError
from lipnext.core.local import AffineModule, ReshapeModule
from lipnext.core.module import LipschitzModule
from lipnext.core.network import LipschitzNetwork


class ImplicitModule(LipschitzModule):
    """`v -> z`, the solution of `z = relu(A z + v)`, computed by a number of steps that depends on A alone."""

    weight: nn.Parameter

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return A as it is applied: `(n, n)`, or a kernel `(c, c, k, k)` whose centre taps are the diagonal."""

    @abstractmethod
    def product(self, z: Tensor, matrix: Tensor) -> Tensor:
        """Return `M z` for a matrix of the form of A: A itself, or its sizes."""

    @abstractmethod
    def adjoint(self, p: Tensor, matrix: Tensor) -> Tensor:
        """Return `M^T p`."""


def implicit_parts(network: LipschitzNetwork) -> tuple[list[ReshapeModule], AffineModule, ImplicitModule]:
    """Return the reshapes before the affine map, the affine map, and the implicit layer.

    Raises:
        UnsoundError: if the body is anything but an affine and an implicit layer with reshapes around them.
    """
    layers = [layer for _, layer in network.named_layers()]
    counting = [layer for layer in layers if not isinstance(layer, ReshapeModule)]
    if not _is_pair(counting):
        names = ", ".join(type(layer).__name__ for layer in layers) or "nothing"
        raise UnsoundError(
            f"an implicit network needs a body of one affine and one implicit layer, with reshapes around them, got {names}; "
            "use the margin certificate for other networks"
        )
    affine, implicit = counting
    if layers.index(implicit) != layers.index(affine) + 1:
        raise UnsoundError("an implicit network cannot reshape between the affine and the implicit layer")
    before = [layer for layer in layers[: layers.index(affine)] if isinstance(layer, ReshapeModule)]
    return before, affine, implicit


def _is_pair(layers: list[LipschitzModule]) -> TypeGuard[tuple[AffineModule, ImplicitModule]]:
    return len(layers) == 2 and isinstance(layers[0], AffineModule) and isinstance(layers[1], ImplicitModule)
