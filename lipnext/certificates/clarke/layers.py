"""A sequential network as matrices with activations between them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lipnext.certificates.graph import Graph, Place
from lipnext.certificates.operations import Step, unchanged
from lipnext.core.errors import UnsoundError

LARGEST = 2**24
"""Numbers in a layer's matrix, up to which it is formed: 128 MiB."""
ACTIVATIONS = {torch.relu: "relu", torch.tanh: "tanh", torch.sigmoid: "sigmoid"}


@dataclass(frozen=True)
class Layer:
    """`h' = sigma(W h + b)` on flattened activations, in float64.

    Attributes:
        weight: W, (out, in); entry by entry within `terms` roundings of the exact matrix.
        bias: b, (out,).
        size: what b would be if nothing cancelled, (out,): b is within `terms` roundings, relative to it.
        terms: as above.
        activation: "relu", "tanh", "sigmoid" or "identity".
    """

    weight: Tensor
    bias: Tensor
    size: Tensor
    terms: int
    activation: str

    @cached_property
    def transposed(self) -> Tensor:
        """`W^T`, in rows of its own."""
        return self.weight.T.contiguous()


def read_layers(graph: Graph) -> list[Layer]:
    """Form the matrices of a traced network; convolutions and whatever else is affine become matrices, too.

    Affine operations are joined as long as no two numbers are added in an entry of the product; otherwise the identity stands
    between them as an activation.

    Raises:
        UnsoundError: naming the place that is neither affine nor such an activation, branches, or is too large.
    """
    layers: list[Layer] = []
    current = _identity(graph.input_shape)
    for slot, place in enumerate(graph.places):
        step = place.operation
        if place.inputs != (slot,) or not isinstance(step, Step):
            raise UnsoundError(
                f"cannot analyse {place.path}: it joins branches; the analysis takes sequential networks, each operation "
                "applied to the result of the one before"
            )
        if step.linear is None:
            if step.function not in ACTIVATIONS:
                raise UnsoundError(
                    f"cannot analyse {place.path} ({step.label}); the analysis takes affine layers with zero padding, ReLU, "
                    "Tanh and Sigmoid"
                )
            layers.append(current.closed(ACTIVATIONS[step.function]))
            current = _identity(place.shape)
        elif step.function is not unchanged:
            before = graph.shape(slot)
            if step.terms and not current.joins():
                layers.append(current.closed("identity"))
                current = _identity(before)
            current = current.then(step, place, before)
    return [*layers, current.closed("identity")]


@dataclass(frozen=True)
class _Affine:
    """An affine map under construction; the attributes are those of `Layer`."""

    weight: Tensor
    bias: Tensor
    size: Tensor
    terms: int

    def joins(self) -> bool:
        """Whether a matrix that is applied next meets at most one number in each column: nothing is added."""
        return bool(((self.weight != 0).sum(dim=0) <= 1).all())

    def then(self, step: Step, place: Place, shape: tuple[int, ...]) -> "_Affine":
        """Apply an affine operation to the columns and to the bias."""
        assert step.linear is not None
        outputs = torch.Size(place.shape).numel()
        if outputs * self.weight.shape[1] > LARGEST:
            raise UnsoundError(
                f"cannot analyse {place.path} ({step.label}): its matrix would have {outputs} x {self.weight.shape[1]} "
                f"numbers, at most {LARGEST} are formed; take smaller images or a smaller layer"
            )
        columns = step.linear(self.weight.T.reshape(-1, *shape)).flatten(1)
        bias, size = self.bias.view(1, *shape), self.size.view(1, *shape)
        magnitude = step.magnitude(size) if step.magnitude is not None else step.linear(size).abs()
        return _Affine(
            columns.T.contiguous(),
            step.function(bias).flatten(),
            magnitude.flatten() * (1 + 2.0**-30),  # more than its own roundings, of which there are as few
            self.terms + step.terms,
        )

    def closed(self, activation: str) -> Layer:
        return Layer(self.weight, self.bias, self.size, self.terms, activation)


def _identity(shape: tuple[int, ...]) -> _Affine:
    count = torch.Size(shape).numel()
    if count * count > LARGEST:
        raise UnsoundError(
            f"cannot analyse activations of {count} numbers, a matrix of {count} x {count} is too large; "
            "take smaller images or a smaller layer"
        )
    zero = torch.zeros(count, dtype=torch.float64)
    return _Affine(torch.eye(count, dtype=torch.float64), zero, zero, 0)
