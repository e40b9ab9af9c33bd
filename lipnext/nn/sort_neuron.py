"""Sort neurons: `y_o = sum_k c_k d_(k)`, the largest distances `d_i = |x_i - w_oi|` in descending order, weighted.

Zhang et al., "Rethinking Lipschitz Neural Networks and Certified Robustness" (NeurIPS 2022). The weights are the first T terms
of a geometric series, `c_k ~ q (1 - q)^(k - 1)`, scaled such that they add up to 1: the neuron is 1-Lipschitz in the l-infinity
norm, because no order statistic moves by more than the largest move of a distance. q = 1 is the l-infinity-distance
neuron.

While training, a random subset of the inputs that keeps a share q takes the place of the weights: for independent choices
`E[max_i m_i d_i] = sum_k q (1 - q)^(k - 1) d_(k)`. Subsets of one size are drawn here, which differs by O(1 / n), and the
maximum is an lp norm whose exponent grows. No lp norm with p < inf is 1-Lipschitz in l-infinity: nothing trained is
certified before it is evaluated with the deployed neuron.
"""

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import ConfigError, UnsoundError
from lipnext.core.interval import IntervalHead, IntervalModule, outward, relative_error
from lipnext.core.rounding import (
    UNIT_ROUNDOFF,
    RoundingState,
    add_up,
    fraction_up,
    gamma,
    tensor_down,
    tensor_up,
)
from lipnext.nn.sort_kernel import power_distance, power_gradients, top

_GRID = 2**24  # coefficients are whole multiples of 1 / _GRID, hence exact in float32 and float64
_CURVE = 64.0  # units of roundoff that a library's tanh is assumed to stay within, absolutely


def coefficients(keep: float, terms: int) -> Tensor:
    """Return `q (1 - q)^(k - 1) / (1 - (1 - q)^T)`, k = 1..T, `(T,)`, as multiples of 2^-24 that add up to exactly 1.

    Raises:
        ConfigError: if q is not in (0, 1] or T below 1.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep must lie in (0, 1], got {keep}")
    if terms < 1:
        raise ConfigError(f"terms must be at least 1, got {terms}")
    series = [keep * (1 - keep) ** k for k in range(terms)]
    rest = [math.floor(c / math.fsum(series) * _GRID) for c in series[1:]]
    return (
        torch.tensor([_GRID - sum(rest), *rest], dtype=torch.float64).div(_GRID).to(torch.get_default_dtype())
    )


class _Top(Function):
    """The deployed neuron; its gradient goes to the T inputs whose distances were taken, however many are equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
        y, places = top(x, x, weight, coefficients)
        ctx.save_for_backward(x, weight, coefficients, places)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, coefficients, places = ctx.saved_tensors
        dx, dw = torch.zeros_like(x), torch.zeros_like(weight)
        for k, c in enumerate(coefficients):
            at = places[..., k].long()
            sign = (x.gather(2, at) - weight.mT.gather(1, at)).sign()
            share = c * dy * sign
            dx.scatter_add_(2, at, share)
            dw.mT.scatter_add_(1, at, -share)
        return dx, dw, None


class _Power(Function):
    """The lp norm, for training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, exponent: float) -> Tensor:
        y = power_distance(x, weight, exponent)
        ctx.save_for_backward(x, weight, y)
        ctx.exponent = exponent
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, y = ctx.saved_tensors
        return *power_gradients(x, weight, ctx.exponent, y, dy), None


class _Chosen(Function):
    """Some rows and columns of a matrix, `(g, l, k)`; several times as fast as indexing with both at once."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, columns: Tensor, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(columns, rows)
        ctx.shape = weight.shape
        taken = weight.expand(len(columns), -1, -1) if rows is None else weight[rows]
        if columns.shape[1] == weight.shape[1]:
            return taken.contiguous()
        return taken.gather(2, columns[:, None].expand(-1, taken.shape[1], -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        columns, rows = ctx.saved_tensors
        dw = dy.new_zeros(ctx.shape)
        for g, part in enumerate(dy):
            if columns.shape[1] < ctx.shape[1]:
                part = part.new_zeros(len(part), ctx.shape[1]).index_copy(1, columns[g], part)
            dw = dw.add(part) if rows is None else dw.index_add_(0, rows[g], part)
        return dw, None, None


def sort_neurons(x: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
    """Return `sum_k c_k d_(k)` for rows `(g, b, n)` and `(g, m, n)`, shape `(g, b, m)`."""
    return _Top.apply(x, weight, coefficients)


def distances(x: Tensor, weight: Tensor, exponent: float) -> Tensor:
    """Return `||x - w||_p` for rows `(g, b, n)` and `(g, m, n)`, shape `(g, b, m)`; p = inf has one arg-max."""
    if exponent == math.inf:
        return sort_neurons(x, weight, x.new_ones(1))
    return _Power.apply(x, weight, exponent)


class _SortNeurons(nn.Module):
    """What a layer and a head of sort neurons share."""

    weight: nn.Parameter
    coefficients: Tensor
    keep: float
    exponent: float

    def start(
        self,
        features_in: int,
        features_out: int,
        *,
        keep: float,
        terms: int,
        centre: float,
        spread: float,
        generator: torch.Generator | None,
    ) -> None:
        """Make the weight, normal around `centre`, and the coefficients."""
        self.keep, self.exponent = keep, math.inf
        weight = centre + spread * torch.randn(features_out, features_in, generator=generator)
        self.weight = nn.Parameter(weight)
        # The coefficients follow from two numbers of the configuration: they are not saved with the weights.
        self.register_buffer("coefficients", coefficients(keep, min(terms, features_in)), persistent=False)

    @property
    def kept(self) -> int:
        """Inputs that a training step looks at."""
        return max(1, round(self.keep * self.weight.shape[1]))

    def respond(self, x: Tensor) -> Tensor:
        """Return the neurons of rows `(B, n)`: lp norms while training, else sorted distances."""
        if x.dim() != 2:
            raise ValueError(f"`x` must have the shape (B, n), got {tuple(x.shape)}; flatten it first.")
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            if self.training:
                return distances(x[None], self.weight[None], self.exponent)[0]
            return sort_neurons(x[None], self.weight[None], self.coefficients)[0]

    def respond_masked(self, x: Tensor, columns: Tensor, rows: Tensor | None) -> Tensor:
        """Return the lp norms over some inputs, of some neurons (None: all).

        Args:
            x: `(g, b, k)`, the inputs that `columns (g, k)` names.
            columns: of the weight, one subset a group.
            rows: `(g, l)`.
        """
        chosen = _Chosen.apply(self.weight, columns, rows)
        return distances(x, chosen, self.exponent)

    def sorted_box(self, lower: Tensor, upper: Tensor, unit: float | None) -> tuple[Tensor, Tensor]:
        """Return a box around the neurons: the farthest and the nearest points of the box give both sides.

        A subtraction, a product and T additions of non-negative numbers: all errors are relative.
        """
        weight, c = self.weight.detach(), self.coefficients
        high, _ = top(lower[None], upper[None], weight[None], c)
        low, _ = top(lower[None], upper[None], weight[None], c, nearest=True)
        error = relative_error(len(c) + 2, unit)
        return outward(low[0], high[0], error * low[0], error * high[0], unit)

    def total(self) -> float:
        """Return the sum of the sizes of the stored coefficients, rounded up: the constant of each neuron."""
        return fraction_up(sum((abs(Fraction(c)) for c in self.coefficients.tolist()), Fraction(0)))


class SortDense(_SortNeurons, IntervalModule):
    """A layer of sort neurons on features `(B, n)`; `weight (m, n)`, no bias. 1-Lipschitz in the l-infinity norm.

    Args:
        features_in: n.
        features_out: m.
        keep: q, the share of inputs that a training step keeps; 1 for l-infinity-distance neurons.
        terms: T, order statistics that count, at most n.
        centre: around which the weights start.
        spread: their standard deviation.
        identity: v; where given, neuron o starts at `w_o,(o mod n) = centre - v`: it is near `x_o + v - centre`.
        generator: source of randomness.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        keep: float = 1.0,
        terms: int = 10,
        centre: float = 0.0,
        spread: float = 1.0,
        identity: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.start(
            features_in,
            features_out,
            keep=keep,
            terms=terms,
            centre=centre,
            spread=spread,
            generator=generator,
        )
        if identity:
            rows = torch.arange(features_out)
            with torch.no_grad():
                self.weight[rows, rows % features_in] = centre - identity

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.respond(x)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return the sum of the coefficients: by how much an output can move if no input moves by more than 1."""
        return LipschitzBound(value=self.total(), norm=math.inf, proof="one-lipschitz")

    def box(self, lower: Tensor, upper: Tensor, unit: float | None) -> tuple[Tensor, Tensor]:
        """Sort the distances of the corners."""
        return self.sorted_box(lower, upper, unit)

    def rounding(self, state: RoundingState) -> RoundingState:
        """Refuse: errors are followed in the l-infinity norm here, by another certificate.

        Raises:
            UnsoundError: always.
        """
        raise _no_rounding()


class SortHead(_SortNeurons, IntervalHead):
    """Logits `z_k = s (b_k - y_k)`, y_k a sort neuron: the nearer the features are to class k, the larger. s is learned.

    Args:
        channels: features C.
        classes: K, at least 2.
        keep: q, as for `SortDense`.
        terms: T, as for `SortDense`.
        spread: standard deviation of the weights; s starts at its inverse.
        generator: source of randomness.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        keep: float = 1.0,
        terms: int = 10,
        spread: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.start(channels, classes, keep=keep, terms=terms, centre=0.0, spread=spread, generator=generator)
        self.bias = nn.Parameter(torch.zeros(classes))
        self.scale = nn.Parameter(torch.tensor(1 / spread))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits."""
        return self.logits(self.respond(features))

    def logits(self, y: Tensor) -> Tensor:
        """Return the logits of what the neurons say."""
        return self.scale * (self.bias - y)

    def distances(self) -> Tensor:
        """`2 |s|` for all pairs, `(K, K)`: both logits may move; for losses."""
        classes = len(self.bias)
        return (2 * self.scale.abs()).expand(classes, classes)

    def constants(self) -> Tensor:
        """Return `2 |s|` times the sum of the coefficients, rounded up."""
        largest = fraction_up(2 * abs(Fraction(self.scale.item())) * Fraction(self.total()))
        return torch.full((len(self.bias), len(self.bias)), largest, dtype=torch.float64)

    def margins(self, lower: Tensor, upper: Tensor, labels: Tensor, unit: float | None) -> Tensor:
        """Compare the smallest logit of the label with the largest of each rival."""
        low, high = self.sorted_box(lower, upper, unit)
        error = relative_error(1, unit)
        low, high = self.bias - high, self.bias - low
        low, high = outward(low, high, error * low.abs(), error * high.abs(), unit)
        both = torch.stack([self.scale * low, self.scale * high])  # s may be negative
        low, high = both.amin(0), both.amax(0)
        low, high = outward(low, high, error * low.abs(), error * high.abs(), unit)
        return tensor_down(low.gather(1, labels[:, None]) - high)

    def lipschitz_bound(self) -> LipschitzBound:
        """Return `|s|` times the sum of the coefficients, rounded up."""
        value = fraction_up(abs(Fraction(self.scale.item())) * Fraction(self.total()))
        return LipschitzBound(value=value, norm=math.inf, proof="scaling")

    def rounding(self, state: RoundingState) -> RoundingState:
        """Refuse, as `SortDense`. Raises UnsoundError."""
        raise _no_rounding()


class TanhHead(IntervalHead):
    """Logits `z = V tanh(U y + a) + c`, on top of sort neurons (SortNet + MLP). No weight is constrained.

    `inner (m, C)`, `inner_bias (m,)`, `weight (K, m)` and `bias (K,)` are U, a, V and c.

    Args:
        channels: features C.
        classes: K, at least 2.
        hidden: m.
        spread: standard deviation of the features, about; U starts with entries of variance `1 / (C spread^2)`.
        generator: source of randomness.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        hidden: int,
        *,
        spread: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        inner = torch.randn(hidden, channels, generator=generator) / (channels**0.5 * spread)
        self.inner = nn.Parameter(inner)
        self.inner_bias = nn.Parameter(torch.zeros(hidden))
        self.weight = nn.Parameter(torch.randn(classes, hidden, generator=generator) / hidden**0.5)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits in the dtype of the weights, autocast or not."""
        with torch.autocast(features.device.type, enabled=False):
            hidden = torch.tanh(
                functional.linear(features.to(self.weight.dtype), self.inner, self.inner_bias)
            )
            return functional.linear(hidden, self.weight, self.bias)

    def distances(self) -> Tensor:
        """`|v_i - v_j|` times the row sums of |U|, `(K, K)`, differentiable: tanh is 1-Lipschitz; for losses."""
        reach = self.inner.abs().sum(1)
        return torch.stack([(self.weight - row).abs() @ reach for row in self.weight]).clamp_min(1e-12)

    def constants(self) -> Tensor:
        """Return `distances` of the stored weights, rounded up."""
        terms = self.inner.shape[1] + len(self.inner)
        factor = add_up(1.0, gamma(2 * terms + 16, UNIT_ROUNDOFF[torch.float64]))
        return tensor_up(self.distances().detach().double() * factor)

    def worst(self, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
        """Bound `z_j - z_y` over a box of features for the loss, `(n, K)`: nothing is rounded, gradients flow."""
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        hidden = functional.linear(middle, self.inner, self.inner_bias)
        spread = functional.linear(half, self.inner.abs())
        low, high = torch.tanh(hidden - spread), torch.tanh(hidden + spread)
        return worst_differences(self.weight, self.bias, low, high, labels)

    def margins(self, lower: Tensor, upper: Tensor, labels: Tensor, unit: float | None) -> Tensor:
        """Intervals through the hidden layer; differences of rows in the last one, so that no logit is bounded alone."""
        error = relative_error(self.inner.shape[1] + 8, unit)
        middle, half = _middle(lower, upper)
        sizes = functional.linear(middle.abs() + half, self.inner.abs()) + self.inner_bias.abs()
        hidden = functional.linear(middle, self.inner, self.inner_bias)
        spread = functional.linear(half, self.inner.abs())
        low, high = outward(hidden - spread, hidden + spread, error * sizes, error * sizes, unit)
        own = UNIT_ROUNDOFF[torch.float64]
        curve = torch.full_like(low, _CURVE * (own if unit is None else own + unit))
        low, high = outward(torch.tanh(low), torch.tanh(high), curve, curve, unit)

        middle, half = _middle(low, high)
        error = relative_error(self.weight.shape[1] + 12, unit)
        margins = []
        for row, constant in zip(self.weight, self.bias, strict=True):
            difference = self.weight[labels] - row
            least = (difference * middle - difference.abs() * half).sum(1) + (self.bias[labels] - constant)
            # The program's logits are rounded one by one: their own sizes count, not those of the difference.
            size = ((self.weight[labels].abs() + row.abs()) * (middle.abs() + half)).sum(1)
            size = size + self.bias[labels].abs() + constant.abs()
            margins.append(outward(least, least, error * size, error * size, unit)[0])
        return torch.stack(margins, dim=1)

    def lipschitz_bound(self) -> LipschitzBound:
        """Bound the whole head in the l-infinity norm: row sums of |V| times those of |U|."""
        terms = self.inner.shape[1] + len(self.inner)
        factor = add_up(1.0, gamma(2 * terms + 16, UNIT_ROUNDOFF[torch.float64]))
        reach = self.weight.detach().double().abs() @ self.inner.detach().double().abs().sum(1)
        return LipschitzBound(value=float(tensor_up(reach.max() * factor)), norm=math.inf, proof="row-sum")

    def rounding(self, state: RoundingState) -> RoundingState:
        """Refuse, as `SortDense`. Raises UnsoundError."""
        raise _no_rounding()


def worst_differences(weight: Tensor, bias: Tensor, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
    """Return the maximum of `z_j - z_y` over a box, `z = W h + c`, `(n, K)`, exactly 0 for the label.

    The rows are subtracted first (elision of the last layer): both logits see the same h.
    """
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    logits = functional.linear(middle, weight, bias)
    spread = torch.stack([((weight[labels] - row).abs() * half).sum(1) for row in weight], dim=1)
    return logits - logits.gather(1, labels[:, None]) + spread


def _middle(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return a point of the box and the distance that covers it from there, rounded up."""
    middle = (lower + upper) / 2
    return middle, tensor_up(torch.maximum(upper - middle, middle - lower))


def _no_rounding() -> UnsoundError:
    return UnsoundError(
        "sort neurons have no rounding bound in l2; certify with lipnext.certificates.interval.IntervalCertifier"
    )
