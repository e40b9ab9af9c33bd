"""Proved bounds of two-dimensional convolutions, for the map that `torch.nn.functional.conv2d` computes.

A zero-padded convolution is part of a circular one: the image is embedded into a torus at least as large as the padded
image, an isometry, and the output is cropped, a projection. A stride `s` that divides the torus makes the circular
convolution one of stride 1 whose input channels are the `s x s` phases of the image (space-to-depth). In the Fourier basis
such a convolution is block diagonal, and its norm is that of the largest transfer matrix `M(w) = sum_q W_q exp(i w.q)`
(Sedghi, Gupta & Long 2019). Real weights give conjugate matrices at `w` and `-w`, so that half of the frequencies suffice.

Circular padding lives on the torus of the image itself. Where torch's output is larger than that torus allows, outputs
repeat; where the stride does not divide the torus, the outputs lie among those of the stride `gcd(stride, torus)`.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lipnext.bounds.geometry import Pair, as_pair, is_integer
from lipnext.bounds.spectral import absolute_norm_bound
from lipnext.bounds.stack import largest_norm_up
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import ConfigError, UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, add_up, gamma, mul_up, sqrt_up

_U = UNIT_ROUNDOFF[torch.float64]
# Error of a cosine or sine in the table. The angle 2 pi j / N < 2 pi has three roundings, 6 pi 2^-53 in all; the assumption
# is that the math library is right within 2^-50 absolute (glibc and others are within 2^-53).
_TABLE_ERROR = 2.0**-48
_TINY = 1e-290  # covers every underflow in the sums that form a transfer matrix
_CHUNK_BYTES = 2**24  # of transfer matrices at once; their products take about ten times that


def convolution_bound(
    weight: Tensor,
    input_size: tuple[int, int],
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    padding_mode: str = "zeros",
    dilation: Pair = 1,
    groups: int = 1,
    squarings: int = 7,
) -> LipschitzBound:
    """Bound the l2 norm of a convolution: the smaller one of its transfer matrices' bound and the Schur test.

    For circular padding at stride 1 with an output as large as the input, the former is the norm itself up to the excess of
    Gram iteration; for zero padding the torus exceeds the image and the bound is larger by what its frequencies add.

    Args:
        weight: shape `(c_out, c_in / groups, k_h, k_w)`, any floating dtype; taken as exact.
        input_size: height and width of the images, before padding.
        stride: as in `torch.nn.Conv2d`, like the four below.
        padding: pixels on both sides, "same" or "valid".
        padding_mode: "zeros" or "circular".
        dilation: distance between the taps of the kernel.
        groups: channels are convolved group by group; the bound is the largest of the groups'.
        squarings: how many times each Gram matrix is squared; the bound of the transfer matrices is too large by less than
            a factor `n^(1/2^(squarings + 2))`, where `n` is their smaller side, or 0.1 %, whichever is more.

    Raises:
        ConfigError: for settings that torch refuses, or a padding mode without a proof here.
        UnsoundError: if the weight is no floating tensor, holds NaN or infinity, or its norm overflows.
    """
    kernel = _fold(weight, input_size, stride, padding, padding_mode, dilation, groups)
    schur = _schur_up(kernel)
    transfer = add_up(_transfer_norm_up(kernel, squarings), _formation_error(kernel, schur))
    value, proof = min((transfer, "transfer-matrix"), (schur, "schur"))
    return LipschitzBound(value=mul_up(value, kernel.repeats), norm=2.0, proof=proof)


def schur_convolution_bound(
    weight: Tensor,
    input_size: tuple[int, int],
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    padding_mode: str = "zeros",
    dilation: Pair = 1,
    groups: int = 1,
) -> LipschitzBound:
    """Bound the l2 norm of a convolution by `sqrt(max row sum * max column sum)` of absolute values (Schur test).

    It costs next to nothing and is far too large for most kernels; exact for permutations of pixels.

    All arguments and errors are those of `convolution_bound`.
    """
    kernel = _fold(weight, input_size, stride, padding, padding_mode, dilation, groups)
    return LipschitzBound(value=mul_up(_schur_up(kernel), kernel.repeats), norm=2.0, proof="schur")


def absolute_convolution_bound(
    weight: Tensor,
    input_size: tuple[int, int],
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    padding_mode: str = "zeros",
    dilation: Pair = 1,
    groups: int = 1,
    steps: int = 4,
) -> float:
    """Bound the l2 norm of the convolution with `|W|`: it measures how the rounding errors of a convolution can add up.

    The transfer matrices of a non-negative kernel are largest at frequency zero, entry by entry and therefore in norm, where
    they are the sum of the taps; that is bounded by Collatz-Wielandt (`lipnext.bounds.spectral.absolute_norm_bound`).

    All arguments but `steps`, the number of power iterations, and all errors are those of `convolution_bound`.
    """
    kernel = _fold(weight, input_size, stride, padding, padding_mode, dilation, groups)
    norm = max(absolute_norm_bound(group, steps) for group in _absolute_sum(kernel))
    # The exact sum of `taps` terms exceeds the computed one by a factor below 1 / (1 - gamma) <= 1 + gamma_(2 taps).
    norm = mul_up(norm, add_up(1.0, gamma(2 * kernel.taps, _U)))
    return mul_up(add_up(norm, _TINY), kernel.repeats)


@dataclass(frozen=True)
class _Axis:
    """One axis of a convolution as a circular one of stride 1 on the phases of a torus.

    Attributes:
        cells: positions of the folded torus.
        phases: for each phase that the kernel meets, its taps as (index in the kernel, shift in cells).
        repeats: how many outputs of torch can be one output of the torus.
    """

    cells: int
    phases: list[list[tuple[int, int]]]
    repeats: int


@dataclass(frozen=True)
class _Kernel:
    """A folded kernel: an output channel at a cell is a sum over the phases, their channels and their taps.

    Attributes:
        phases: for each phase `W (groups, c_out / groups, c_in / groups, taps)`, float64, and the shifts `(taps, 2)` in cells.
        cells: height and width of the folded torus.
        repeats: factor that repeated outputs cost, rounded up.
    """

    phases: list[tuple[Tensor, Tensor]]
    cells: tuple[int, int]
    repeats: float

    @property
    def taps(self) -> int:
        """The largest number of taps that are summed into one entry."""
        return max(weights.shape[-1] for weights, _ in self.phases)


def _fold(
    weight: Tensor,
    input_size: tuple[int, int],
    stride: Pair,
    padding: Pair | str,
    padding_mode: str,
    dilation: Pair,
    groups: int,
) -> _Kernel:
    w = _as_exact(weight, groups)
    if padding_mode not in ("zeros", "circular"):
        raise ConfigError(
            f"padding_mode must be 'zeros' or 'circular', got {padding_mode!r}; no other one has a proved bound"
        )
    strides, dilations = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
    sizes = as_pair("input_size", input_size, 1)
    pads = _pads(padding, w.shape[3:], strides, dilations)
    circular = padding_mode == "circular"
    rows, columns = (
        _axis(size, kernel, step, pad, spread, circular)
        for size, kernel, step, pad, spread in zip(sizes, w.shape[3:], strides, pads, dilations, strict=True)
    )
    phases = []
    for row_taps, column_taps in product(rows.phases, columns.phases):
        taps = list(product(row_taps, column_taps))
        weights = w[..., [a for (a, _), _ in taps], [b for _, (b, _) in taps]]
        phases.append((weights, torch.tensor([(p, q) for (_, p), (_, q) in taps], device=w.device)))
    if not phases:  # no tap ever meets the image, the map is zero
        phases = [(0.0 * w[..., :1, 0], torch.zeros(1, 2, dtype=torch.int64, device=w.device))]
    repeats = sqrt_up(float(rows.repeats * columns.repeats))
    return _Kernel(phases=phases, cells=(rows.cells, columns.cells), repeats=repeats)


def _axis(size: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int, circular: bool) -> _Axis:
    padded = size + sum(pad)
    outputs = (padded - dilation * (kernel - 1) - 1) // stride + 1
    if outputs < 1:
        raise ConfigError(
            f"a kernel of {kernel} taps with dilation {dilation} does not fit into {padded} padded pixels; "
            "pass the size of the images, before padding"
        )
    if circular and max(pad) > size:
        raise ConfigError(f"circular padding must not exceed the image, got {max(pad)} for {size} pixels")
    torus = size if circular else stride * math.ceil(padded / stride)
    # The stride means nothing where there is one output: one cell then makes a single exact matrix of the whole.
    fold = torus if outputs == 1 else math.gcd(stride, torus)
    phases: dict[int, list[tuple[int, int]]] = {}
    for tap in range(kernel):
        reads = (stride * j + dilation * tap - pad[0] for j in range(outputs))
        if circular or any(0 <= pixel < size for pixel in reads):  # other taps only ever meet zeros
            shift, phase = divmod(dilation * tap, fold)
            phases.setdefault(phase, []).append((tap, shift))
    # torch computes the outputs at 0, stride, 2 stride, ..., which come back to a cell after `torus / fold` of them.
    return _Axis(torus // fold, list(phases.values()), math.ceil(outputs * fold / torus))


def _transfer_norm_up(kernel: _Kernel, squarings: int) -> float:
    """Bound the largest norm of the computed transfer matrices, chunk by chunk of frequencies."""
    height, width = kernel.cells
    frequencies = torch.cartesian_prod(torch.arange(height), torch.arange(width // 2 + 1))
    groups, c_out, c_in, _ = kernel.phases[0][0].shape
    per_frequency = 16 * groups * c_out * c_in * len(kernel.phases)
    tables = _tables(math.lcm(height, width), kernel.phases[0][0].device)
    largest = 0.0
    for chunk in frequencies.split(max(1, _CHUNK_BYTES // per_frequency)):
        matrices = _transfer_matrices(kernel, chunk, tables)
        largest = max(largest, largest_norm_up(matrices, squarings, floor=largest))
    return largest


def _transfer_matrices(kernel: _Kernel, frequencies: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Return the transfer matrices at `frequencies (f, 2)`, one for each frequency and group, smaller side last.

    Shape `(f groups, 2 m, n)`, real parts above imaginary ones. The angles `2 pi (j / height + k / width)` are reduced to
    one turn in integers.
    """
    height, width = kernel.cells
    turn = len(tables[0])
    steps = frequencies * torch.tensor([turn // height, turn // width])
    parts = []
    for table in tables:
        phases = []
        for weights, shifts in kernel.phases:
            angles = (steps.to(shifts.device)[:, None] * shifts).sum(-1) % turn
            entries = table[angles] @ weights.flatten(0, 2).mT
            phases.append(entries.reshape(-1, *weights.shape[1:3]))
        parts.append(torch.cat(phases, dim=2))
    tall = parts[0].shape[1] >= parts[0].shape[2]
    return torch.cat([part if tall else part.mT for part in parts], dim=1)


def _tables(turn: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `2 pi j / turn`, each within `_TABLE_ERROR`."""
    angles = [2.0 * math.pi * j / turn for j in range(turn)]
    table = torch.tensor([[f(angle) for angle in angles] for f in (math.cos, math.sin)], dtype=torch.float64)
    cos, sin = table.to(device)
    return cos, sin


def _formation_error(kernel: _Kernel, schur: float) -> float:
    """Bound the l2 norm of the error of a computed transfer matrix.

    Its real and its imaginary part err in every entry by at most `d sum_t |W_t|`, with `d` from the table and from a sum of
    `taps` products; the norm of the matrix `sum_t |W_t|` is at most its Schur bound, and the complex error at most `2 d` times
    that.
    """
    relative = add_up(_TABLE_ERROR, mul_up(gamma(kernel.taps, _U), add_up(1.0, _TABLE_ERROR)))
    return add_up(mul_up(2.0 * relative, schur), _TINY)


def _schur_up(kernel: _Kernel) -> float:
    """The Schur test of the folded kernel at frequency zero: an output meets one row, a pixel of a phase one column."""
    sums = _absolute_sum(kernel)
    rows, columns = sums.sum(2), sums.sum(1)
    squared = max(mul_up(r, c) for r, c in zip(rows.amax(1).tolist(), columns.amax(1).tolist(), strict=True))
    if not math.isfinite(squared):
        raise UnsoundError("the entries of a convolution are so large that their sums overflow; rescale it")
    terms = 2 * (kernel.taps + max(sums.shape[1:]))  # of either sum; 1 / (1 - gamma_n) <= 1 + gamma_(2 n)
    return mul_up(sqrt_up(squared), add_up(1.0, gamma(terms, _U)))


def _absolute_sum(kernel: _Kernel) -> Tensor:
    """`sum_t |W_t|`, computed, shape `(groups, c_out / groups, phases c_in / groups)`."""
    sums = torch.cat([weights.abs().sum(-1) for weights, _ in kernel.phases], dim=2)
    if not bool(torch.isfinite(sums).all()):
        raise UnsoundError("the entries of a convolution are so large that their sums overflow; rescale it")
    return sums


def _as_exact(weight: Tensor, groups: int) -> Tensor:
    """Check a weight and return it as `(groups, c_out / groups, c_in / groups, k_h, k_w)` in float64."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise UnsoundError(f"the weight of a convolution must be a floating-point tensor, got {what}")
    if weight.dim() != 4 or weight.numel() == 0:
        raise ConfigError(
            "the weight of a convolution must have the shape (c_out, c_in / groups, k_h, k_w), "
            f"got {tuple(weight.shape)}"
        )
    if not is_integer(groups) or groups < 1 or weight.shape[0] % groups:
        raise ConfigError(f"groups must divide the {weight.shape[0]} output channels, got {groups!r}")
    if not bool(torch.isfinite(weight).all()):
        raise UnsoundError(
            "the weight of a convolution holds NaN or infinity; nothing can be proved about it, train again or reload"
        )
    return weight.detach().double().unflatten(0, (groups, -1))


def _pads(
    padding: Pair | str, kernel: tuple[int, ...], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding before and after, for both axes; the odd pixel of "same" comes after, as in torch."""
    if not isinstance(padding, str):
        row, column = as_pair("padding", padding, 0)
        return (row, row), (column, column)
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same":
        raise ConfigError(f"padding must be a number, a pair, 'same' or 'valid', got {padding!r}")
    if stride != (1, 1):
        raise ConfigError(f"padding 'same' needs stride 1, got {stride}; pass the padding in pixels")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    rows, columns = ((t // 2, t - t // 2) for t in total)
    return rows, columns
