"""Distances, order statistics and lp norms of `x - w` for all pairs of rows, never all at once in memory.

On a CPU with a C compiler `sort_kernel.c` is compiled once a process, in a second; on a GPU where Triton is installed
`sort_triton` is taken; elsewhere torch computes the same in pieces. PyTorch's own `cdist` is no help: it is several times
slower at p = inf and much more at finite p, gives NaN for p = 1000, and at p = inf its gradient goes to all of several
equal maxima.
"""

import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.nn.triton_dispatch import usable

PIECE = 2**22
"""Numbers that torch holds at once."""
_BLOCK, _LANES = 64, 16  # of sort_kernel.c
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be had."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "sort_kernel.so"
        source = Path(__file__).with_suffix(".c")
        try:
            subprocess.run(
                [compiler, *_FLAGS, str(source), "-o", str(target), "-lm"], check=True, capture_output=True
            )
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.CalledProcessError):
            return None


def top(
    low: Tensor, high: Tensor, weight: Tensor, coefficients: Tensor, *, nearest: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the weighted sums of the largest distances between each box and each row of the weight, and where they are.

    The distance of the box `[low_i, high_i]` from `w_i` is that of its farthest point, or of its nearest one.

    Args:
        low: `(g, b, n)`.
        high: `(g, b, n)`, the same tensor for a point.
        weight: `(g, m, n)`.
        coefficients: `(t,)`, t at most n, of the largest distance, the second largest and so on.
        nearest: which point of the box.

    Returns:
        Sums `(g, b, m)`, and places `(g, b, m, t)`, int32; of equal distances exactly t places are told.
    """
    groups, batch, n = low.shape
    outputs, terms = weight.shape[1], len(coefficients)
    if usable(low, torch.float32):  # certificates are in float64, and take operations that have run on GPUs
        from lipnext.nn import sort_triton

        return sort_triton.top(low, high, weight, coefficients, nearest=nearest)
    compiled = library() if _fits(low, torch.float32, torch.float64) else None
    if compiled is not None:
        a, b, w = (_filled(t) for t in (low, high, weight))
        c, wide = coefficients.detach().to(low.dtype).contiguous(), a.shape[-1]
        sums = a.new_empty(groups, batch, outputs)
        places = torch.empty(groups, batch, outputs, terms, dtype=torch.int32)
        call = compiled.top_float if low.dtype == torch.float32 else compiled.top_double
        fixed = (*map(_pointer, (a, b, w, c, sums, places)), *map(ctypes.c_long, (batch, outputs, wide, n)))
        _share(groups * batch, 1, lambda i, j: call(*fixed, i, j, ctypes.c_int(terms), ctypes.c_int(nearest)))
        return sums, places

    def piece(g: int, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        w = weight[g, columns]
        below, above = w - low[g, rows, None], high[g, rows, None] - w
        far = torch.minimum(below, above).neg().clamp_min(0) if nearest else torch.maximum(below, above)
        largest, places = far.topk(terms, dim=-1)
        return largest @ coefficients, places.int()

    sums = low.new_empty(groups, batch, outputs)
    places = torch.empty(groups, batch, outputs, terms, dtype=torch.int32, device=low.device)
    for g, rows, columns in _pieces(groups, batch, outputs, n):
        sums[g, rows, columns], places[g, rows, columns] = piece(g, rows, columns)
    return sums, places


def power_distance(x: Tensor, weight: Tensor, exponent: float) -> Tensor:
    """Return `(sum_i |x_i - w_i|^p)^(1/p)` for rows `(g, b, n)` and `(g, m, n)`, shape `(g, b, m)`, finite p."""
    groups, batch, n = x.shape
    outputs = weight.shape[1]
    if usable(x, torch.float32):
        from lipnext.nn import sort_triton

        return sort_triton.power_distance(x, weight, exponent)
    y = x.new_empty(groups, batch, outputs)
    compiled = library() if _fits(x, torch.float32) else None
    if compiled is not None:
        a, w = _filled(x), _filled(weight)
        n = a.shape[-1]
        fixed = (*map(_pointer, (a, w, y)), *map(ctypes.c_long, (batch, outputs, n)))
        _share(groups * batch, 1, lambda i, j: compiled.power_forward(*fixed, i, j, ctypes.c_float(exponent)))
        return y
    for g, rows, columns in _pieces(groups, batch, outputs, n):
        d = (x[g, rows, None] - weight[g, columns]).abs()
        # Without the largest taken out, d^p overflows or vanishes.
        largest = d.amax(-1, keepdim=True).clamp_min(1e-10)
        y[g, rows, columns] = largest[..., 0] * (d / largest).pow(exponent).sum(-1).pow(1 / exponent)
    return y


def power_gradients(
    x: Tensor, weight: Tensor, exponent: float, y: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `sum(dy * y)` in x and in the weight, y from `power_distance`."""
    groups, batch, n = x.shape
    outputs = weight.shape[1]
    if usable(x, torch.float32):
        from lipnext.nn import sort_triton

        return sort_triton.power_gradients(x, weight, exponent, y, dy)
    compiled = library() if _fits(x, torch.float32) else None
    if compiled is not None:
        a, w, y, dy = _filled(x), _filled(weight), y.contiguous(), dy.contiguous()
        dx, dw, wide = torch.zeros_like(a), torch.zeros_like(w), a.shape[-1]
        fixed = (*map(_pointer, (a, w, y, dy, dx, dw)), *map(ctypes.c_long, (groups, batch, outputs, wide)))
        _share(wide, _BLOCK, lambda i, j: compiled.power_backward(*fixed, i, j, ctypes.c_float(exponent)))
        return dx[..., :n], dw[..., :n]
    dx, dw = torch.zeros_like(x), torch.zeros_like(weight)
    for g, rows, columns in _pieces(groups, batch, outputs, n):
        d = x[g, rows, None] - weight[g, columns]
        size = y[g, rows, columns, None].clamp_min(1e-30)  # 0 where x equals w
        share = (d.abs() / size).pow(exponent - 1) * d.sign() * dy[g, rows, columns, None]
        dx[g, rows] += share.sum(1)
        dw[g, columns] -= share.sum(0)
    return dx, dw


def _fits(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the kernels may read the memory of a tensor: subclasses, such as fake tensors, need not have any."""
    return (
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype in dtypes and x.numel() > 0
    )


def _filled(x: Tensor) -> Tensor:
    """Fill rows up to whole vectors with zeros, which add a distance of 0."""
    return functional.pad(x.detach(), (0, -x.shape[-1] % _LANES)).contiguous()


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _share(count: int, unit: int, call: Callable[[ctypes.c_long, ctypes.c_long], None]) -> None:
    """Call for consecutive parts of `range(count)`, one a thread of torch's; ctypes lets go of Python's lock."""
    threads = max(1, min(torch.get_num_threads(), math.ceil(count / unit)))
    step = math.ceil(count / threads / unit) * unit
    starts = range(0, count, step)
    if len(starts) == 1:
        call(ctypes.c_long(0), ctypes.c_long(count))
        return
    jobs = [
        _pool().submit(call, ctypes.c_long(start), ctypes.c_long(min(start + step, count)))
        for start in starts
    ]
    for job in jobs:
        job.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=64, thread_name_prefix="lipnext-sort")


def _pieces(groups: int, batch: int, outputs: int, n: int) -> list[tuple[int, slice, slice]]:
    """Cut `(g, b, m)` such that a piece times n has no more than `PIECE` numbers."""
    columns = max(1, min(outputs, PIECE // n))
    rows = max(1, PIECE // (n * columns))
    return [
        (g, slice(i, i + rows), slice(j, j + columns))
        for g in range(groups)
        for i in range(0, batch, rows)
        for j in range(0, outputs, columns)
    ]
