"""Proved bounds against exact norms over random layers, and the cost of proving large orthogonal matrices.

    python benchmarks/bounds.py --json --out benchmarks/results/bounds.json

The exact norm is the SVD of the whole operator in float64, materialised by running torch's own layer on the unit vectors;
for max pooling it is the response to a bright pixel, which attains the bound. A bound counts as below only beyond the error
of the SVD itself, 1e-13 relative.
"""

import argparse
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from timing import report
from torch import Tensor, nn

from lipnext.bounds.convolution import convolution_bound
from lipnext.bounds.pooling import average_pooling_bound, max_pooling_bound
from lipnext.bounds.spectral import near_orthogonal_bound, nonnegative_bound, spectral_bound
from lipnext.core.bound import LipschitzBound
from lipnext.manifold.haar import haar

SVD_ERROR = 1e-13
Case = tuple[LipschitzBound, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    # The cost comes first: the peak of memory is one of the whole process.
    cost = proving_cost(args.size, args.count)
    report(
        {
            "what": "proved l2 bounds against exact norms of random layers; cost of proving near-orthogonal matrices",
            **comparison(args.cases),
            "cost": cost,
        },
        args.json,
        args.out,
    )


def proving_cost(size: int, count: int) -> dict[str, Any]:
    """Time and memory of proving `count` float32 matrices near the orthogonal group, and the excess of some."""
    generator = torch.Generator().manual_seed(0)
    weights = [haar(size, generator=generator, dtype=torch.float32) for _ in range(count)]
    before = _peak_memory()
    start = time.perf_counter()
    bounds = [near_orthogonal_bound(weight) for weight in weights]
    seconds = time.perf_counter() - start
    after = _peak_memory()
    excess = [bound.value / _norm(w) - 1 for bound, w in zip(bounds[:4], weights, strict=False)]
    return {
        "matrices": f"{count} of {size} x {size}, float32",
        "squarings": 2,
        "seconds": round(seconds, 2),
        "peak_memory_mib": round(after / 2**20),
        "peak_memory_growth_mib": round((after - before) / 2**20),
        "largest_bound_minus_one": max(bound.value for bound in bounds) - 1,
        "largest_excess_of_4": max(excess),
    }


def comparison(cases: int) -> dict[str, Any]:
    """Draw layers of all families in turn; count bounds below the norm, and gather the excess by proof and by family."""
    by_proof, by_family = defaultdict(list), defaultdict(list)
    below = 0
    for index in range(cases):
        family, draw = list(FAMILIES.items())[index % len(FAMILIES)]
        bound, norm = draw(_Draw(index))
        below += bound.value < norm * (1 - SVD_ERROR)
        excess = bound.value / norm - 1
        by_proof[bound.proof].append(excess)
        by_family[family].append(excess)
    return {
        "layers": cases,
        "below": below,
        "excess_by_proof": {name: _excess(values) for name, values in sorted(by_proof.items())},
        "excess_by_family": {name: _excess(values) for name, values in by_family.items()},
    }


class _Draw:
    """Random numbers of one case."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=self.generator))

    def gaussian(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def near_orthogonal(draw: _Draw) -> Case:
    """Haar matrices in float32, cut to a random width, with noise from nothing to a few per cent."""
    n = draw.integer(2, 256)
    noise = [0.0, 1e-6, 1e-3, 0.02][draw.integer(0, 3)]
    weight = haar(n, generator=draw.generator, dtype=torch.float32)[:, : draw.integer(1, n)]
    weight = weight + noise * draw.gaussian(*weight.shape) / n**0.5
    return near_orthogonal_bound(weight), _norm(weight)


def dense(draw: _Draw) -> Case:
    """Gaussian matrices of any shape, from dense to nearly empty."""
    weight = draw.gaussian(draw.integer(1, 256), draw.integer(1, 256))
    kept = torch.rand(weight.shape, generator=draw.generator) < [1.0, 0.3, 0.05][draw.integer(0, 2)]
    weight = weight * kept
    weight[0, 0] = 1.0
    return spectral_bound(weight), _norm(weight)


def nonnegative(draw: _Draw) -> Case:
    """Absolute values of Gaussian matrices."""
    weight = draw.gaussian(draw.integer(1, 256), draw.integer(1, 256)).abs()
    return nonnegative_bound(weight), _norm(weight)


def circular(draw: _Draw) -> Case:
    """Circular convolutions whose output is as large as the image."""
    half = draw.integer(0, 2)
    size = (draw.integer(max(half, 2), 10), draw.integer(max(half, 2), 10))
    options = {"padding": half, "padding_mode": "circular"}
    return _convolution(draw, size, (2 * half + 1, 2 * half + 1), options)


def zero_padded(draw: _Draw) -> Case:
    """Zero-padded convolutions at stride 1."""
    kernel = draw.integer(1, 5)
    size = (draw.integer(4, 12), draw.integer(4, 12))
    return _convolution(draw, size, (kernel, kernel), {"padding": kernel // 2})


def orthogonal_convolution(draw: _Draw) -> Case:
    """Rotation, shift of each channel by up to one pixel, rotation: orthogonal kernels in float32, zero-padded."""
    n = draw.integer(2, 8)
    shifts = torch.zeros(n, n, 3, 3)
    for channel in range(n):
        shifts[channel, channel, draw.integer(0, 2), draw.integer(0, 2)] = 1.0
    first, second = haar(n, 2, generator=draw.generator, dtype=torch.float32)
    weight = torch.einsum("ij,jkab,kl->ilab", first, shifts, second)
    return _bound_and_norm(weight, (8, 8), {"padding": 1})


def strided(draw: _Draw) -> Case:
    """Strided convolutions, zero-padded or circular, also where the stride does not divide the image."""
    kernel, stride = draw.integer(1, 5), draw.integer(2, 4)
    size = (draw.integer(5, 12), draw.integer(5, 12))
    mode = ["zeros", "circular"][draw.integer(0, 1)]
    options = {"padding": kernel // 2, "stride": stride, "padding_mode": mode}
    return _convolution(draw, size, (kernel, kernel), options)


def grouped_and_dilated(draw: _Draw) -> Case:
    """Groups, dilation and kernels that are no squares."""
    groups, dilation = draw.integer(1, 4), draw.integer(1, 2)
    kernel = (draw.integer(1, 3), draw.integer(1, 3))
    size = (draw.integer(6, 10), draw.integer(6, 10))
    return _convolution(draw, size, kernel, {"padding": 1, "groups": groups, "dilation": dilation})


def average_pooling(draw: _Draw) -> Case:
    """Average pooling, disjoint or overlapping, with and without padding."""
    kernel, stride = draw.integer(1, 4), draw.integer(1, 4)
    size = (draw.integer(4, 16), draw.integer(4, 16))
    options: dict[str, Any] = {"stride": stride, "padding": draw.integer(0, kernel // 2)}
    options |= {"count_include_pad": bool(draw.integer(0, 1)), "ceil_mode": bool(draw.integer(0, 1))}
    operator = _materialise(nn.AvgPool2d(kernel, **options), 1, size)
    return average_pooling_bound(size, kernel, **options), _norm(operator)


def max_pooling(draw: _Draw) -> Case:
    """Max pooling against its response to one bright pixel."""
    kernel, stride = draw.integer(1, 4), draw.integer(1, 4)
    size = (draw.integer(4, 16), draw.integer(4, 16))
    responses = _materialise(nn.MaxPool2d(kernel, stride), 1, size)
    return max_pooling_bound(size, kernel, stride=stride), responses.norm(dim=0).max().item()


FAMILIES: dict[str, Callable[[_Draw], Case]] = {
    "near-orthogonal": near_orthogonal,
    "dense": dense,
    "non-negative": nonnegative,
    "circular convolution": circular,
    "zero-padded convolution": zero_padded,
    "orthogonal convolution": orthogonal_convolution,
    "strided convolution": strided,
    "grouped, dilated convolution": grouped_and_dilated,
    "average pooling": average_pooling,
    "max pooling": max_pooling,
}


def _convolution(
    draw: _Draw, size: tuple[int, int], kernel: tuple[int, int], options: dict[str, Any]
) -> Case:
    weight = draw.gaussian(options.get("groups", 1) * draw.integer(1, 6), draw.integer(1, 6), *kernel)
    return _bound_and_norm(weight, size, options)


def _bound_and_norm(weight: Tensor, size: tuple[int, int], options: dict[str, Any]) -> Case:
    channels = weight.shape[1] * options.get("groups", 1)
    layer = nn.Conv2d(channels, weight.shape[0], tuple(weight.shape[2:]), bias=False, **options).double()
    layer.weight = nn.Parameter(weight.double(), requires_grad=False)
    return convolution_bound(weight, size, **options), _norm(_materialise(layer, channels, size))


@torch.no_grad()
def _materialise(layer: nn.Module, channels: int, size: tuple[int, int]) -> Tensor:
    """The matrix of a layer, column by column."""
    units = torch.eye(channels * size[0] * size[1], dtype=torch.float64).view(-1, channels, *size)
    return layer(units).flatten(1).mT


def _norm(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix.double(), 2).item()


def _excess(values: list[float]) -> dict[str, Any]:
    return {"layers": len(values), "median": statistics.median(values), "largest": max(values)}


def _peak_memory() -> int:
    """Peak of the resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
