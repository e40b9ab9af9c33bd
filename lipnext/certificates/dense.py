"""Rounding errors of dense ReLU layers, followed through the pattern of active units of each image.

Norms of layers multiply, whether or not their worst directions meet; after ten dense layers the product is a thousand times
what an error can grow to. Here two vectors are enclosed in ellipsoids instead, for all points x' within distance R of the
image x: how far the exact activations move, `d = exact(x') - exact(x)`, and what rounding does, `e = executed(x') - exact(x')`.
That v lies in the ellipsoid of C means `(u v)^2 <= u^T C u` for all u. One layer `relu(W x + w)` moves them as follows.

- `W v` lies in the ellipsoid of `W C W^T`, so that `|W v|_i <= sqrt((W C W^T)_ii)`.
- `W e` is joined by the roundings of the product, `|delta_i| <= delta_i^*` (Higham, lemma 3.1).
- `relu(p + q) - relu(p) = t q` with t in [0, 1], unit by unit. With h_i for how far the exact p_i moves from the computed
  value v_i, and tau_i for the largest error, t is 1 where `v_i > h_i + tau_i` and 0 where `v_i < -h_i - tau_i`. Elsewhere
  it is 1/2 up to 1/2: half the vector passes, and up to half of it in any direction of each such unit is added.
- Additions `|b_i| <= beta_i` lie in the ellipsoid of `diag(beta_i sum(beta))` (Cauchy-Schwarz), those of a norm of at most s
  in that of `s^2 I`. A sum of points of the ellipsoids of A and B lies in that of `(1 + 1/p) A + (1 + p) B` for every
  p > 0, and `p = sqrt(trace A / trace B)` makes the trace smallest (Kurzhanski and Valyi, "Ellipsoidal Calculus", 1997).

Rounding errors of the matrices themselves, computed in float64, are covered by adding to the diagonal of C.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lipnext.certificates.graph import Graph
from lipnext.certificates.operations import (
    CENTRE,
    SAFE,
    Arithmetic,
    Linear,
    State,
    Step,
    norms_up,
    unchanged,
)
from lipnext.core.rounding import gamma


@dataclass(frozen=True)
class _Layer:
    """A matrix of the tail: `before` and `behind` are the slots of its input and result."""

    matrix: Linear
    before: int
    behind: int
    row_norms: Tensor

    def roundings(self, value: Tensor, away: Tensor, executed: Arithmetic) -> Tensor:
        """Bound the roundings of every output; executed inputs differ from `value` by at most `away` in norm."""
        size = self.matrix.size(value[None])[0] + self.row_norms * away
        return (gamma(self.matrix.terms, executed.unit) * size + self.matrix.stray_error(executed)) * SAFE


@dataclass(frozen=True)
class _Enclosure:
    """Where a vector may lie: the ellipsoid of `shape`, over the coordinates `live`; all others are 0.

    Without a shape it is a ball of radius `norm`, over all coordinates; otherwise `norm` bounds the vector's length.
    """

    norm: Tensor
    shape: Tensor | None = None
    live: Tensor | None = None


class _Product:
    """`W v` for v in an enclosure.

    A matrix `W C W^T` has an error below `gamma_2n || |W| ||^2 ||C||_F` in norm when computed in float64.
    """

    def __init__(self, layer: _Layer, vector: _Enclosure, gram: Tensor) -> None:
        self.layer, self.vector, self.gram = layer, vector, gram
        if vector.shape is None:
            n = layer.matrix.rows.shape[1]
            self.units = layer.row_norms * vector.norm * SAFE
            size = math.sqrt(n) * vector.norm.square()
        else:
            n = len(vector.shape)
            self.rows = layer.matrix.rows[:, vector.live]
            self.half = self.rows @ vector.shape
            size = vector.shape.norm()
        self.off = gamma(2 * n + 16, CENTRE.unit) * layer.matrix.absolute**2 * size * SAFE
        if vector.shape is not None:
            squares = (self.half * self.rows).sum(1) + self.off
            self.units = squares.clamp_min(0).sqrt() * SAFE

    def shape(self, outputs: Tensor) -> Tensor:
        """Return the matrix of the ellipsoid of some outputs, exactly symmetric."""
        if self.vector.shape is None:
            matrix = self.gram[outputs][:, outputs] * self.vector.norm.square()
        else:
            matrix = self.half[outputs] @ self.rows[outputs].mT
        matrix = (matrix + matrix.mT) / 2
        matrix.diagonal().add_(self.off * SAFE)
        return matrix

    def pairs(self, label: int) -> Tensor:
        """Bound `|(w_label - w_j) v|` for all j."""
        rows = self.layer.matrix.rows
        length = norms_up(rows[label] - rows) * SAFE
        if self.vector.shape is None:
            return length * self.vector.norm * SAFE
        pair = self.rows[label] - self.rows
        off = gamma(2 * pair.shape[1] + 16, CENTRE.unit) * length.square() * self.vector.shape.norm() * SAFE
        return (((pair @ self.vector.shape) * pair).sum(1) + off).clamp_min(0).sqrt() * SAFE


@dataclass(frozen=True)
class DenseTail:
    """The longest end of a network that alternates matrices and ReLU, the last matrix giving the logits.

    Attributes:
        layers: its matrices in order; at least two.
        gram: `W W^T` of the first one.
    """

    layers: tuple[_Layer, ...]
    gram: Tensor

    @property
    def slots(self) -> set[int]:
        """The places whose states `errors` reads."""
        return {slot for layer in self.layers for slot in (layer.before, layer.behind)}

    @torch.no_grad()
    def errors(
        self, states: Mapping[int, State], label: Tensor, radius: Tensor, executed: Arithmetic
    ) -> Tensor:
        """Bound the rounding errors of the margins of `label` over all logits anywhere in a ball.

        Args:
            states: by slot, for the slots of `slots`.
            label: int64 (n,).
            radius: R, float64 (n,), finite.
            executed: the deployed arithmetic.

        Returns:
            Float64 (n, K), from above; infinite where the radius is not positive.
        """
        errors = label.new_full((len(label), len(self.layers[-1].row_norms)), 0).double() + math.inf
        for k in (radius > 0).nonzero().flatten().tolist():
            errors[k] = self._image(states, k, int(label[k]), float(radius[k]), executed)
        return errors

    def _image(
        self, states: Mapping[int, State], k: int, label: int, reach: float, executed: Arithmetic
    ) -> Tensor:
        """Follow both enclosures of image k over the units that are not certain to be cut off."""
        first = states[self.layers[0].before]
        error = _Enclosure((first.fixed[k] + first.slope[k] * reach) * SAFE)
        move = _Enclosure(torch.full_like(error.norm, first.lipschitz * reach * SAFE))
        for layer in self.layers:
            before, behind = states[layer.before], states[layer.behind]
            moved = torch.minimum(move.norm, torch.full_like(move.norm, before.lipschitz * reach * SAFE))
            away = (error.norm + moved + before.centre[k]) * SAFE
            roundings = layer.roundings(before.value[k], away, executed)
            errors = _Product(layer, error, self.gram)
            if layer is self.layers[-1]:
                return (errors.pairs(label) + roundings + roundings[label]) * SAFE
            moves = _Product(layer, move, self.gram)
            # Either enclosure of a move holds; the norms of layers are the better one at times.
            far = torch.minimum(moves.units, layer.row_norms * moved)
            edge = (far + behind.centre[k] + errors.units + roundings) * SAFE
            value = behind.value[k]
            live = (~(value < -edge)).nonzero().squeeze(1)
            sure = value[live] > edge[live]
            error = _relu(errors, roundings, live, sure)
            move = _relu(moves, torch.zeros_like(roundings), live, sure)
        raise AssertionError("the last layer returns")


def _relu(product: _Product, added: Tensor, live: Tensor, sure: Tensor) -> _Enclosure:
    """Enclose `t (W v + b)` for `|b_i| <= added_i`, with t = 1 where sure and in [0, 1] elsewhere."""
    before = product.shape(live)
    slope = torch.where(sure, 1.0, 0.5).double()
    passed = before * slope[:, None] * slope  # exact: slopes are 1 or 1/2
    b = added[live]
    shape = _sum(passed, _box(slope * b))
    if not bool(sure.all()):
        unsure = ~sure
        length = (_largest(before[unsure][:, unsure]).sqrt() + b[unsure].norm()) / 2 * SAFE
        ball = torch.diag(unsure.double() * length.square() * SAFE)
        box = _box(torch.where(sure, 0.0, (product.units[live] + b) / 2) * SAFE)
        shape = _sum(shape, ball if ball.trace() < box.trace() else box)
    # Not more than 16 roundings acted on an entry; the diagonal makes up for their Frobenius norm.
    shape.diagonal().add_(2.0**-46 * shape.norm() + 1e-290)
    return _Enclosure(norm=_largest(shape).sqrt() * SAFE, shape=shape, live=live)


def _box(beta: Tensor) -> Tensor:
    """The ellipsoid of all b with `|b_i| <= beta_i`."""
    return torch.diag(beta * beta.sum() * SAFE)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """The ellipsoid of all sums of points of two ellipsoids, with the smallest trace of its family."""
    if not bool(b.trace() > 0):
        return a + b
    p = (a.trace() / b.trace()).sqrt().clamp(1e-9, 1e9)
    return (a * (1 + 1 / p) + b * (1 + p)) * SAFE


def _largest(matrix: Tensor) -> Tensor:
    """Bound the largest eigenvalue of a symmetric matrix, `||M||^4 <= ||fl(M^2)^2||_F` and rounding, both relative."""
    size = matrix.norm()
    if not bool(size > 0):
        return size
    scaled = matrix / size  # of norm at most 1, up to one rounding of each entry
    for _ in range(2):
        scaled = scaled @ scaled
        scaled = (scaled + scaled.mT) / 2
    # Every product is off by at most gamma_n < 2^-30 in Frobenius norm, which the second square no more than doubles.
    return ((scaled.norm() + 2.0**-28) ** 0.25 * size * SAFE).clamp_max(size * (1 + 2.0**-20))


def find_tail(graph: Graph) -> DenseTail | None:
    """Return the dense end of a network, None where it is shorter than two matrices."""
    layers: list[_Layer] = []
    slot = len(graph.places)
    while slot > 0 and isinstance(matrix := graph.places[slot - 1].operation, Linear):
        before = graph.places[slot - 1].inputs[0]
        if len(graph.shape(before)) != 1:
            break
        layers.insert(0, _Layer(matrix, before, slot, norms_up(matrix.rows)))
        slot = _through(graph, before, unchanged)
        behind = _through(graph, slot, torch.relu)
        if behind == slot:
            break
        slot = _through(graph, behind, unchanged)
    if len(layers) < 2:
        return None
    rows = layers[0].matrix.rows
    return DenseTail(tuple(layers), rows @ rows.mT)


def _through(graph: Graph, slot: int, function: object) -> int:
    """Go back through places that apply `function`."""
    while (
        slot > 0 and isinstance(step := graph.places[slot - 1].operation, Step) and step.function is function
    ):
        slot = graph.places[slot - 1].inputs[0]
    return slot
