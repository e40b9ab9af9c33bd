"""What a bound around one image asks of layers: they are affine, or monotone and exact.

Then a box around the activations is followed by interval arithmetic, and an activation whose box has shrunk to a point is
constant in the neighbourhood of the image: it can be masked out of the norms of the layers around it.
"""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from lipnext.core.errors import UnsoundError
from lipnext.core.module import LipschitzModule
from lipnext.core.network import LipschitzNetwork


class AffineModule(LipschitzModule):
    """`y = A(W) x + b`: `A` is linear in the stored `weight` W as well; `bias` b or None, one number a channel."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def terms(self) -> int:
        """How many products are summed into an output, at most."""
        return self.weight[0].numel()

    @property
    @abstractmethod
    def direction(self) -> Tensor:
        """Where power iteration stands, one input with a batch dimension of 1; not there once materialised."""

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return `A(weight) x` without the bias, for a weight of the stored shape: W itself, its sizes or its squares."""

    @abstractmethod
    def adjoint(self, y: Tensor, weight: Tensor) -> Tensor:
        """Return `A(weight)^T y`."""


class MonotoneModule(LipschitzModule):
    """Each output grows or stays as an input grows; 1-Lipschitz; it compares and moves numbers, exact in floating point.

    So the corners of a box are mapped to the corners of a box, and an output that is equal at both corners is constant.
    """

    @abstractmethod
    def feeds(self, varying: Tensor) -> Tensor:
        """Return the inputs that matter: `||f(a) - f(b)|| <= ||feeds * (a - b)||` where no other output differs.

        Args:
            varying: bool, of the shape of the outputs.

        Returns:
            Bool, of the inputs' number in their order.
        """


class ReshapeModule(MonotoneModule):
    """Hands on every number once, in an order that does not depend on them."""


@dataclass(frozen=True)
class Stage:
    """An affine layer, its name, and the monotone layers behind it."""

    name: str
    affine: AffineModule
    monotone: tuple[MonotoneModule, ...]

    def activate(self, x: Tensor) -> Tensor:
        """Apply the monotone layers."""
        for layer in self.monotone:
            x = layer(x)
        return x

    def feeds(self, varying: Tensor, like: Tensor) -> Tensor:
        """Return which outputs of the affine layer matter, of the shape of `like`, its outputs."""
        shapes = [like.shape]
        for layer in self.monotone:
            like = layer(like)
            shapes.append(like.shape)
        for layer, shape in zip(reversed(self.monotone), reversed(shapes[:-1]), strict=True):
            varying = layer.feeds(varying).reshape(shape)
        return varying


def stages(network: LipschitzNetwork) -> tuple[tuple[MonotoneModule, ...], list[Stage]]:
    """Return the monotone layers before the first affine one, and everything behind them in stages.

    Raises:
        UnsoundError: for a layer that is neither affine nor monotone, or no affine layer at all.
    """
    first: list[MonotoneModule] = []
    found: list[Stage] = []
    for name, layer in network.named_layers():
        if isinstance(layer, AffineModule):
            found.append(Stage(name, layer, ()))
        elif not isinstance(layer, MonotoneModule):
            raise UnsoundError(
                f"{name} is a {type(layer).__name__}, for which there is no bound around an image; use layers that "
                "are affine or monotone, or the global margin certificate"
            )
        elif found:
            last = found[-1]
            found[-1] = Stage(last.name, last.affine, (*last.monotone, layer))
        else:
            first.append(layer)
    if not found:
        raise UnsoundError("a bound around an image needs an affine layer in the body, such as a Convolution")
    return tuple(first), found
