"""What one operation of a network does to values, to the Lipschitz constant and to rounding errors, image by image.

Three evaluations of a network are compared, all with exactly the stored weights: the *exact* one in real arithmetic,
the *centre*, computed here in float64 at the image itself, and the *executed* one, computed by the deployed program in
its own dtype at any representable point x' with ||x' - x|| <= r. After every operation a `State` holds, for each image,

    value     the centre
    K         the exact map from the image to here is K-Lipschitz
    c         ||value - exact(x)|| <= c
    a, b      ||executed(x') - exact(x')|| <= a + b r
    limit     nothing overflows in the executed program as long as r <= limit

with l2 norms over one image's activations. The error model of an operation `f` is `|fl(f(x)) - f(x)| <= gamma_m M(|x|) + t` in
norm, where `m` counts the roundings on the longest path, `M` (the *magnitude*) is what `f` would give if nothing cancelled, and
`t` collects underflow. For `f(x) = W x + w` it holds with `M(z) = |W| z + |w|` and `m = terms + 1`, for any order of summation,
with fused products or without (Higham, lemma 3.1). If `f` is s-Lipschitz and `M` A-Lipschitz and monotone, then

    c' = s c + gamma_m(2^-53) ||M(|value|)|| + t,
    a' = s a + gamma_m(u) (||M(|value|)|| + A (c + a)) + t,      b' = s b + gamma_m(u) A (K + b)

because `|executed(x') - value|` is at most `a + b r + K r + c` in norm. `||M(|value|)||` costs a second product in
float64 and is what keeps float32 radii of deep networks from vanishing.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lipnext.bounds.convolution import absolute_convolution_bound, convolution_bound
from lipnext.bounds.pooling import (
    adaptive_average_pooling_bound,
    average_pooling_bound,
    l2_pooling_bound,
    max_pooling_bound,
)
from lipnext.bounds.spectral import absolute_norm_bound, near_orthogonal_bound, spectral_bound
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import UnsoundError
from lipnext.core.guard import fast_convolution, refuse_fast_convolution
from lipnext.core.rounding import add_up, div_down, fraction_up, gamma, mul_up, sqrt_up, sum_up

Shape = tuple[int, ...]
Map = Callable[[Tensor], Tensor]

SAFE = 1.0 + 2.0**-40
"""Covers the roundings of a formula of fewer than 4,000 float64 operations on numbers that are not negative."""


@dataclass(frozen=True)
class Arithmetic:
    """A floating-point type: unit roundoff, smallest positive number, largest number, smallest normal number."""

    unit: float
    spacing: float
    largest: float
    normal: float


ARITHMETIC = {
    torch.float64: Arithmetic(2.0**-53, 2.0**-1074, torch.finfo(torch.float64).max, 2.0**-1022),
    torch.float32: Arithmetic(2.0**-24, 2.0**-149, torch.finfo(torch.float32).max, 2.0**-126),
    torch.float16: Arithmetic(2.0**-11, 2.0**-24, torch.finfo(torch.float16).max, 2.0**-14),
}
CENTRE = ARITHMETIC[torch.float64]


@dataclass(frozen=True)
class State:
    """The activations of a batch at one place of the network; the letters are those of the module's docstring.

    Attributes:
        value: float64 (n, ...).
        lipschitz: K.
        centre: c, float64 (n,).
        fixed: a, float64 (n,).
        slope: b, float64 (n,).
        limit: float64 (n,); may be negative, where even the image itself may overflow.
    """

    value: Tensor
    lipschitz: float
    centre: Tensor
    fixed: Tensor
    slope: Tensor
    limit: Tensor

    def norm(self) -> Tensor:
        """Bound the norm of the computed values from above, (n,)."""
        return norms_up(self.value)

    def spread(self) -> Tensor:
        """Bound the growth of `||executed(x') - value||` with r from above: `K + b`, (n,)."""
        return (self.lipschitz + self.slope) * SAFE


class Operation(ABC):
    """One step of a network, with constants proved when it was made.

    Attributes:
        label: what `lipnext doctor` shows.
    """

    label: str

    @abstractmethod
    def bound(self, *lipschitz: LipschitzBound) -> LipschitzBound:
        """Return the constant from the image to behind the operation, from those before it."""

    @abstractmethod
    def evaluate(self, *values: Tensor) -> Tensor:
        """Compute the operation in float64."""

    @abstractmethod
    def follow(self, states: Sequence[State], lipschitz: float, executed: Arithmetic) -> State:
        """Return the state behind the operation, whose constant is `lipschitz`.

        Raises:
            UnsoundError: where the sums are too long for the precision of `executed`.
        """

    def check(self, dtype: torch.dtype) -> None:
        """Refuse constants that the program, executed in `dtype`, would not use exactly.

        Raises:
            UnsoundError: saying which.
        """
        return  # most operations have none


@dataclass(frozen=True, kw_only=True)
class Step(Operation):
    """An operation with one input.

    Attributes:
        label: what `lipnext doctor` shows.
        factor: s, the operation's own constant.
        function: computes it, in the dtype of its input.
        linear: where it is affine, its linear part, whose matrix then has at most `terms` roundings in an entry; else None.
        magnitude: M, for inputs without negative entries; None where nothing is rounded.
        absolute: A.
        terms: m; 0 where nothing is rounded.
        stray: absolute error of one output that is not relative to M, in multiples of the smallest positive number.
        stray_root: the same, in multiples of the root of the smallest positive number.
        stray_unit: the same, in multiples of the unit roundoff.
        reach: what the inputs' norm is multiplied by, at most, in any number that the program forms on the way.
        offset: what is added to that.
        square: whether the program squares its inputs.
        tensors: stored constants, by name.
        scalars: Python numbers that the program rounds to its dtype (counted in `terms`).
        doubt: says for a dtype why its program cannot be followed, or nothing.
    """

    label: str
    factor: LipschitzBound
    function: Map
    linear: Map | None = None
    magnitude: Map | None = None
    absolute: float = 0.0
    terms: int = 0
    stray: float = 0.0
    stray_root: float = 0.0
    stray_unit: float = 0.0
    reach: float = 0.0
    offset: float = 0.0
    square: bool = False
    tensors: tuple[tuple[str, Tensor], ...] = ()
    scalars: tuple[float, ...] = ()
    doubt: Callable[[torch.dtype], str | None] = lambda dtype: None

    def bound(self, *lipschitz: LipschitzBound) -> LipschitzBound:
        """Multiply by the own constant."""
        (before,) = lipschitz
        return LipschitzBound.compose(before, self.factor)

    def evaluate(self, *values: Tensor) -> Tensor:
        """Compute the operation in float64."""
        (value,) = values
        return self.function(value)

    def check(self, dtype: torch.dtype) -> None:
        """Refuse tensors that the conversion to `dtype` would change, and scalars outside its normal numbers."""
        for name, tensor in self.tensors:
            if not bool((tensor.to(dtype).double() == tensor.double()).all()):
                raise UnsoundError(
                    f"its {name} is not exact in {dtype}, so that the program would use other numbers; round the "
                    f"weights first, net.to({dtype}).double(), and certify those"
                )
        kind = ARITHMETIC[dtype]
        for scalar in self.scalars:
            if scalar != 0 and not kind.normal <= abs(scalar) <= kind.largest:
                raise UnsoundError(f"its constant {scalar!r} is no normal number in {dtype}; rescale it")
        if reason := self.doubt(dtype):
            raise UnsoundError(reason)

    def size(self, value: Tensor) -> Tensor:
        """Return `M(|value|)` from above, computed in float64 with a relative error of at most `gamma_m`."""
        assert self.magnitude is not None
        return self.magnitude(value.abs()) * mul_up(add_up(1.0, gamma(2 * self.terms, CENTRE.unit)), SAFE)

    def follow(self, states: Sequence[State], lipschitz: float, executed: Arithmetic) -> State:
        """Apply the recursion of the module's docstring."""
        (before,) = states
        value = self.function(before.value)
        s, absolute = self.factor.value, self.absolute
        size = (
            before.fixed.new_zeros(len(value))
            if self.magnitude is None
            else norms_up(self.size(before.value))
        )
        outputs = sqrt_up(float(value[0].numel())) if len(value) else 0.0
        stray = [mul_up(outputs, self.stray_error(kind)) for kind in (CENTRE, executed)]
        rounding = [gamma(self.terms, kind.unit) for kind in (CENTRE, executed)]
        c, a, b = before.centre, before.fixed, before.slope
        return State(
            value=value,
            lipschitz=lipschitz,
            centre=(s * c + rounding[0] * size + stray[0]) * SAFE,
            fixed=(s * a + rounding[1] * (size + absolute * (c + a)) + stray[1]) * SAFE,
            slope=(s * b + rounding[1] * absolute * (before.lipschitz + b)) * SAFE,
            limit=_limit(before, self._largest_input(executed)),
        )

    def stray_error(self, kind: Arithmetic) -> float:
        """Bound the error of one output that is not relative to its magnitude."""
        root = mul_up(self.stray_root, sqrt_up(kind.spacing))
        return sum_up([mul_up(self.stray, kind.spacing), root, mul_up(self.stray_unit, kind.unit)])

    def _largest_input(self, executed: Arithmetic) -> float:
        """The norm of inputs for which no number on the way exceeds a quarter of the largest one."""
        if self.square:
            return math.sqrt(executed.largest) / 4
        if self.reach == 0:
            return math.inf
        return div_down(executed.largest / 4 - self.offset, self.reach)


@dataclass(frozen=True)
class Sum(Operation):
    """`x + sign y` of two branches: one rounding, relative to the computed sum."""

    label: str
    sign: int

    def bound(self, *lipschitz: LipschitzBound) -> LipschitzBound:
        """Add the branches' constants."""
        return LipschitzBound(value=sum_up(k.value for k in lipschitz), norm=2.0, proof="sum")

    def evaluate(self, *values: Tensor) -> Tensor:
        """Compute the sum in float64."""
        return values[0] + self.sign * values[1]

    def follow(self, states: Sequence[State], lipschitz: float, executed: Arithmetic) -> State:
        """Errors add; `||executed sum|| <= ||value|| + c + a + (K + b) r` is what the rounding is relative to."""
        left, right = states
        value = self.evaluate(left.value, right.value)
        size = norms_up(value)
        c, a, b = left.centre + right.centre, left.fixed + right.fixed, left.slope + right.slope
        unit = gamma(1, executed.unit)
        limits = [_limit(state, executed.largest / 8) for state in states]
        return State(
            value=value,
            lipschitz=lipschitz,
            centre=(c + gamma(1, CENTRE.unit) * size) * SAFE,
            fixed=(a + unit * (size + c + a)) * SAFE,
            slope=(b + unit * (lipschitz + b)) * SAFE,
            limit=torch.minimum(*limits),
        )


@dataclass(frozen=True)
class Concatenation(Operation):
    """Branches side by side: squares of norms add, nothing is rounded."""

    label: str
    dim: int

    def bound(self, *lipschitz: LipschitzBound) -> LipschitzBound:
        """`||(f(x), g(x)) - (f(x'), g(x'))||^2 <= (K_f^2 + K_g^2) ||x - x'||^2`."""
        squares = sum_up(mul_up(k.value, k.value) for k in lipschitz)
        return LipschitzBound(value=sqrt_up(squares), norm=2.0, proof="root-sum-square")

    def evaluate(self, *values: Tensor) -> Tensor:
        """Join the branches."""
        return torch.cat(values, dim=self.dim)

    def follow(self, states: Sequence[State], lipschitz: float, executed: Arithmetic) -> State:
        """`sqrt(sum (a_i + b_i r)^2) <= sqrt(sum a_i^2) + r sqrt(sum b_i^2)`, by the triangle inequality."""
        return State(
            value=self.evaluate(*(state.value for state in states)),
            lipschitz=lipschitz,
            centre=norms_up(torch.stack([state.centre for state in states], dim=1)),
            fixed=norms_up(torch.stack([state.fixed for state in states], dim=1)),
            slope=norms_up(torch.stack([state.slope for state in states], dim=1)),
            limit=torch.stack([state.limit for state in states]).amin(0),
        )


def start(images: Tensor, dtype: torch.dtype) -> State:
    """The state of float64 images `(n, c, h, w)`, which the program receives in `dtype`.

    Where an image is exact in `dtype` nothing is rounded: the points of the ball that the program can be given are
    representable ones. Otherwise the conversion counts, for the image and for every point of its ball.
    """
    kind = ARITHMETIC[dtype]
    exact = (images.to(dtype).double() == images).flatten(1).all(1)
    zero = images.new_zeros(len(images))
    underflow = mul_up(sqrt_up(float(images[0].numel())), kind.spacing) if len(images) else 0.0
    return State(
        value=images,
        lipschitz=1.0,
        centre=zero,
        fixed=torch.where(exact, zero, (kind.unit * norms_up(images) + underflow) * SAFE),
        slope=torch.where(exact, zero, kind.unit),
        limit=torch.full_like(zero, kind.largest / 4),
    )


def norms_up(values: Tensor) -> Tensor:
    """Norms of float64 `(n, ...)` from above, `(n,)`.

    A sum of k squares and a root have a relative error below `gamma_(k + 3)`; squares that underflow add at most
    `sqrt(k) 2^-511`. NaN and infinity stay what they are.
    """
    flat = values.flatten(1)
    count = flat.shape[1]
    relative = mul_up(add_up(1.0, gamma(2 * count + 6, CENTRE.unit)), SAFE)
    return torch.linalg.vector_norm(flat, dim=1) * relative + sqrt_up(float(count)) * 2.0**-500


def _limit(state: State, largest: float) -> Tensor:
    """The radius up to which `||value|| + c + a + (K + b) r <= largest`, from below, and up to the limit before."""
    if largest == math.inf:
        return state.limit
    room = largest - (state.norm() + state.centre + state.fixed) * SAFE
    return torch.minimum(state.limit, room / state.spread() * (2 - SAFE) - 1e-300)


@dataclass(frozen=True, kw_only=True)
class Linear(Step):
    """A matrix; where it gives the logits, its rows tell how far each pair of them can drift apart."""

    rows: Tensor


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """`x W^T + w` along the last dimension; `weight (out, in)`.

    Several vectors in one image share the matrix, whose constants then hold for all of them together.
    """
    w, shift = weight.double(), None if bias is None else bias.double()
    absolute = absolute_norm_bound(w)
    return Linear(
        rows=w,
        label=f"Linear({weight.shape[1]}, {weight.shape[0]})",
        factor=dense_bound(w),
        function=lambda x: functional.linear(x, w, shift),
        linear=lambda x: functional.linear(x, w),
        magnitude=lambda x: functional.linear(x, w.abs(), None if shift is None else shift.abs()),
        absolute=absolute,
        terms=weight.shape[1] + 1,
        stray=float(weight.shape[1] + 1),
        reach=add_up(absolute, 1.0),
        offset=_largest(shift),
        tensors=_named(weight=weight, bias=bias),
    )


def dense_bound(weight: Tensor) -> LipschitzBound:
    """The smaller one of the bounds for nearly orthogonal and for any matrices."""
    return min(near_orthogonal_bound(weight), spectral_bound(weight), key=lambda bound: bound.value)


def convolution(
    weight: Tensor,
    bias: Tensor | None,
    input_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    padding_mode: str = "zeros",
) -> Step:
    """`torch.nn.Conv2d` on images of `input_size`, before padding."""
    if padding_mode not in ("zeros", "circular"):
        raise UnsoundError(f"padding_mode '{padding_mode}' has no proved bound; use 'zeros' or 'circular'")
    refuse_fast_convolution(weight.device, torch.float64)
    w, shift = weight.double(), None if bias is None else bias.double()
    settings = {
        "stride": stride,
        "padding": padding,
        "padding_mode": padding_mode,
        "dilation": dilation,
        "groups": groups,
    }
    absolute = absolute_convolution_bound(w, input_size, **settings)  # type: ignore[arg-type]

    rows, columns = _around(padding, weight, dilation)

    def convolve(x: Tensor, kernel: Tensor, constant: Tensor | None) -> Tensor:
        mode = "constant" if padding_mode == "zeros" else "circular"
        padded = functional.pad(x, (*columns, *rows), mode=mode)
        return functional.conv2d(padded, kernel, constant, stride, 0, dilation, groups)

    terms = weight[0].numel() + 1
    out, per_group, *taps = weight.shape
    return Step(
        label=f"Conv2d({per_group * groups}, {out}, {taps[0]}x{taps[1]})",
        factor=convolution_bound(w, input_size, **settings),  # type: ignore[arg-type]
        function=lambda x: convolve(x, w, shift),
        # Around a torus a pixel may meet several weights, which add up in an entry of the matrix.
        linear=(lambda x: convolve(x, w, None)) if padding_mode == "zeros" else None,
        magnitude=lambda x: convolve(x, w.abs(), None if shift is None else shift.abs()),
        absolute=absolute,
        terms=terms,
        stray=float(terms),
        reach=add_up(absolute, 1.0),
        offset=_largest(shift),
        tensors=_named(weight=weight, bias=bias),
        doubt=_no_fast_convolution,
    )


def _around(
    padding: tuple[int, int] | str, weight: Tensor, dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels before and after, for rows and columns; the odd one of "same" comes after, as in torch."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        rows, columns = ((t // 2, t - t // 2) for t in total)
        return rows, columns
    height, width = (0, 0) if isinstance(padding, str) else padding
    return (height, height), (width, width)


def _no_half(dtype: torch.dtype) -> str | None:
    half = dtype == torch.float16
    return "how programs compute it in float16 differs; use dtype=torch.float32" if half else None


def _no_fast_convolution(dtype: torch.dtype) -> str | None:
    return fast_convolution(torch.device("cpu"), dtype) or _no_half(dtype)


def batch_norm(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dim: int
) -> Step:
    """Batch norm with stored statistics: `x alpha + beta`, `alpha = weight / sqrt(variance + eps)`.

    Programs form alpha and beta first or subtract the mean first. Either way at most 16 roundings act on an output, each
    relative to `|alpha| (|x| + |mean|) + |bias|`: eps rounded to the dtype, the sum, the root and the reciprocal, up to two
    units each, the products and the sums.

    Args:
        mean: running mean, (C,).
        variance: running variance, (C,).
        weight: (C,) or None.
        bias: (C,) or None.
        eps: as in `torch.nn.BatchNorm2d`.
        dim: number of dimensions of the input, the batch included.
    """
    v = variance.double()
    if not bool((v >= 0).all()) or not bool((v + eps > 1e-30).all()) or not 0 <= eps < 1e30:
        raise UnsoundError(f"its running variance must be at least 0, and above 1e-30 with eps {eps!r} added")
    if eps and eps < 1e-30:
        raise UnsoundError(f"its eps must be 0 or at least 1e-30, got {eps!r}")
    shape = [1, -1] + [1] * (dim - 2)
    ones, zeros = torch.ones_like(v), torch.zeros_like(v)
    gain, shift = (ones if weight is None else weight.double()), (zeros if bias is None else bias.double())
    inverse = (v + eps).rsqrt()
    alpha = gain * inverse
    if (
        bool(((alpha != 0) & ((alpha.abs() < 2.0**-60) | (alpha.abs() > 2.0**60))).any())
        or _largest(gain) > 2.0**60
    ):
        raise UnsoundError("its scale lies outside of 2^-60 ... 2^60, where numbers underflow; rescale it")
    # alpha is computed here with at most 8 roundings
    largest = mul_up(alpha.abs().max().item(), add_up(1.0, gamma(16, CENTRE.unit)))
    factors, centre, constant = alpha.view(shape), mean.double().view(shape), shift.view(shape)
    spread = add_up(1.0, mul_up(2.0, inverse.max().item()))
    reach = mul_up(spread, add_up(1.0, _largest(gain)))
    return Step(
        label=f"BatchNorm({len(v)})",
        factor=LipschitzBound(value=largest, norm=2.0, proof="scaling"),
        function=lambda x: (x - centre) * factors + constant,
        linear=lambda x: x * factors,
        magnitude=lambda x: (x + centre.abs()) * factors.abs() + constant.abs(),
        absolute=largest,
        terms=16,
        stray=mul_up(16.0, add_up(1.0, add_up(largest, _largest(gain)))),
        reach=reach,
        offset=add_up(mul_up(reach, _largest(mean)), _largest(shift)),
        tensors=_named(running_mean=mean, running_var=variance, weight=weight, bias=bias),
        doubt=_no_half,
    )


def scale(constant: float | Tensor, divide: bool = False) -> Step:
    """`constant x` or `x / constant`, with a number or a stored tensor that broadcasts to one image's shape.

    At most four roundings: the constant to the dtype, a reciprocal, the product.
    """
    tensor = _as_tensor(constant)
    if divide and bool((tensor == 0).any()):
        raise UnsoundError("it divides by zero")
    size = tensor.abs()
    if bool(((size != 0) & ((size < 2.0**-60) | (size > 2.0**60))).any()):
        raise UnsoundError(
            "its constant lies outside of 2^-60 ... 2^60, where products underflow; rescale it"
        )
    largest = fraction_up(1 / Fraction(size.min().item())) if divide else size.max().item()
    function: Map = (lambda x: x / tensor) if divide else (lambda x: x * tensor)
    return Step(
        label=("divide by " if divide else "multiply by ") + _text(constant),
        factor=LipschitzBound(value=largest, norm=2.0, proof="scaling"),
        function=function,
        linear=function,
        magnitude=(lambda x: x / size) if divide else (lambda x: x * size),
        absolute=largest,
        terms=4,
        stray=mul_up(4.0, add_up(1.0, largest)),
        reach=add_up(largest, 1.0),
        **_constant(constant),
    )


def shift(constant: float | Tensor, sign: int = 1, mirror: bool = False) -> Step:
    """`x + sign constant`, `-x + sign constant` where mirrored: rounded relative to `|x| + |constant|` at most twice."""
    tensor = _as_tensor(constant)
    name = "subtract from " if mirror else "add " if sign == 1 else "subtract "
    return Step(
        label=name + _text(constant),
        factor=LipschitzBound(value=1.0, norm=2.0, proof="translation"),
        function=lambda x: (-x if mirror else x) + sign * tensor,
        linear=lambda x: -x if mirror else x,
        magnitude=lambda x: x + tensor.abs(),
        absolute=1.0,
        terms=2,
        stray=1.0,
        reach=1.0,
        offset=_largest(tensor),
        **_constant(constant),
    )


def one_lipschitz(label: str, function: Map, proof: str = "one-lipschitz") -> Step:
    """A map that compares, moves or mirrors numbers: 1-Lipschitz, and nothing is rounded."""
    linear = (
        function if proof == "isometry" else None
    )  # those that are not linear are folds, of proof "one-lipschitz"
    return Step(
        label=label, factor=LipschitzBound(value=1.0, norm=2.0, proof=proof), function=function, linear=linear
    )


def unchanged(value: Tensor) -> Tensor:
    """The identity, as one object that can be recognised."""
    return value


def leaky_relu(slope: float) -> Step:
    """`x` where positive, `slope x` elsewhere: the constant is `max(1, |slope|)`, at most two roundings."""
    if not math.isfinite(slope):
        raise UnsoundError(f"its slope {slope!r} is not finite; mend it")
    largest = max(1.0, abs(slope))
    return Step(
        label=f"LeakyReLU({slope:g})",
        factor=LipschitzBound(value=largest, norm=2.0, proof="steepest-slope"),
        function=lambda x: functional.leaky_relu(x, slope),
        magnitude=lambda x: largest * x,
        absolute=largest,
        terms=2,
        stray=1.0,
        reach=largest,
        scalars=(slope,),
    )


def saturating(label: str, function: Map, steepest: float) -> Step:
    """Tanh (steepness 1) and sigmoid (1/4).

    Assumed, not proved: the program computes them within 64 units of roundoff, absolutely. The libraries in use document a
    few units in the last place of a result of at most 1.
    """
    return Step(
        label=label,
        factor=LipschitzBound(value=steepest, norm=2.0, proof="steepest-slope"),
        function=function,
        stray_unit=64.0,
    )


def max_pooling(
    input_size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Step:
    """`torch.nn.MaxPool2d`: compares numbers, rounds none."""
    return Step(
        label=f"MaxPool2d({kernel[0]}x{kernel[1]})",
        factor=max_pooling_bound(
            input_size, kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode
        ),
        function=lambda x: functional.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode),
    )


def average_pooling(
    input_size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Step:
    """`torch.nn.AvgPool2d`: a sum over the window and a division, as a quotient or a product with a reciprocal."""

    def pool(x: Tensor) -> Tensor:
        return functional.avg_pool2d(
            x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
        )

    factor = average_pooling_bound(
        input_size,
        kernel,
        stride=stride,
        padding=padding,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor_override=divisor_override,
    )
    return _averaging(f"AvgPool2d({kernel[0]}x{kernel[1]})", factor, pool, kernel[0] * kernel[1])


def global_average_pooling(input_size: tuple[int, int]) -> Step:
    """`torch.nn.AdaptiveAvgPool2d(1)`: the mean of every channel."""
    return _averaging(
        "AdaptiveAvgPool2d(1)",
        adaptive_average_pooling_bound(input_size, 1),
        lambda x: functional.adaptive_avg_pool2d(x, 1),
        input_size[0] * input_size[1],
    )


def _averaging(label: str, factor: LipschitzBound, pool: Map, window: int) -> Step:
    """The matrix has entries of one sign, so that its bound by row and column sums holds for their sizes, too."""
    return Step(
        label=label,
        factor=factor,
        function=pool,
        linear=pool,
        magnitude=lambda x: pool(x).abs(),
        absolute=factor.value,
        terms=window + 3,
        stray=2.0,
        reach=mul_up(float(window), add_up(1.0, factor.value)),
    )


def l2_pooling(input_size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int]) -> Step:
    """`torch.nn.LPPool2d(2, ...)`: roots of sums of squares, by way of an average that is multiplied again.

    Squares, sum, average, product and root: below `window + 8` roundings relative to the result. A square that underflows
    loses at most the smallest number, and so does the average before it is multiplied: `sqrt(2 window)` roots of it.
    """
    window = kernel[0] * kernel[1]
    factor = l2_pooling_bound(input_size, kernel, stride=stride)

    def pool(x: Tensor) -> Tensor:
        return functional.lp_pool2d(x, 2.0, kernel, stride)

    return Step(
        label=f"LPPool2d(2, {kernel[0]}x{kernel[1]})",
        factor=factor,
        function=pool,
        magnitude=pool,
        absolute=factor.value,
        terms=window + 8,
        stray_root=sqrt_up(2.0 * window),
        square=True,
    )


def _as_tensor(constant: float | Tensor) -> Tensor:
    if isinstance(constant, Tensor):
        tensor = constant.double()
    else:
        if isinstance(constant, int) and abs(constant) > 2**53:
            raise UnsoundError(f"its constant {constant} is no float64 number; write a smaller one")
        tensor = torch.tensor(float(constant), dtype=torch.float64)
    if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
        raise UnsoundError(f"its constant {_text(constant)} is not finite; mend it")
    return tensor


def _constant(constant: float | Tensor) -> dict[str, Any]:
    return (
        {"tensors": (("constant", constant),)}
        if isinstance(constant, Tensor)
        else {"scalars": (float(constant),)}
    )


def _text(constant: float | Tensor) -> str:
    return f"a tensor {tuple(constant.shape)}" if isinstance(constant, Tensor) else f"{constant:g}"


def _largest(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None or tensor.numel() == 0 else tensor.double().abs().max().item()


def _named(**tensors: Tensor | None) -> tuple[tuple[str, Tensor], ...]:
    return tuple((name, tensor) for name, tensor in tensors.items() if tensor is not None)
