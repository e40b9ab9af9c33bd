"""One step of our optimisers on the orthogonal group against geoopt, geotorch and exact matrix exponentials.

    python benchmarks/manifold_step.py --json

All move the same 64 matrices of 512 x 512 with the same gradients. `exact` is the same Adam written plainly, all
matrices in one batch and torch.linalg.matrix_exp; `exact_in_stacks` is ours with that exponential in place of
FastExp; geoopt is RiemannianAdam on its default Stiefel manifold (canonical metric), and on the Euclidean one;
geotorch is a parametrised SO(n) with Adam, where the cost is the forward and backward pass through the
parametrisation.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from timing import alternate, ratio, report
from torch import Tensor, nn

from lipnext.manifold.exponential import fast_exp
from lipnext.manifold.haar import haar
from lipnext.manifold.polar import residual
from lipnext.manifold.skew import skew
from lipnext.optim.muon import ManifoldMuon
from lipnext.optim.orthogonal_adam import OrthogonalAdam


class ExactAdam(OrthogonalAdam):
    """Our Adam, stacks that fit the cache included, with the full matrix exponential."""

    def move(self, step: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.linalg.matrix_exp(step)


class ClosedFormMuon(ManifoldMuon):
    """Muon with the step `X (cos t - sin t J)`, exact where `J^2 = -I` and only there."""

    def move(self, step: Tensor, group: dict[str, Any]) -> Tensor:
        angle = group["lr"]
        eye = torch.eye(step.shape[-1], dtype=step.dtype)
        return eye * math.cos(angle) + step * (math.sin(angle) / angle)


def ours(kind: type, points: Tensor, gradients: Tensor, **options: float) -> Callable[[], object]:
    params = [nn.Parameter(p.clone()) for p in points]
    optimizer = kind(params, **options)
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    return optimizer.step  # type: ignore[no-any-return]


def exact_step(points: Tensor, gradients: Tensor, lr: float) -> Callable[[], object]:
    x, first, second = points.clone(), torch.zeros_like(points), torch.zeros_like(points)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        direction = skew(x.mT @ gradients)
        first.lerp_(direction, 0.1)
        second.mul_(0.999).addcmul_(direction, direction, value=0.001)
        update = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        x.copy_(x @ torch.linalg.matrix_exp(-lr * update))

    return step


def geoopt_step(points: Tensor, gradients: Tensor, canonical: bool) -> Callable[[], object]:
    import geoopt

    manifold = geoopt.Stiefel(canonical=canonical)
    params = [geoopt.ManifoldParameter(p.clone(), manifold=manifold) for p in points]
    optimizer = geoopt.optim.RiemannianAdam(params, lr=1e-3)

    def step() -> None:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()  # geoopt writes into the gradient
        optimizer.step()

    return step


def geotorch_step(size: int, count: int, gradients: Tensor) -> Callable[[], object]:
    import geotorch

    layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(count))
    for layer in layers:
        geotorch.orthogonal(layer, "weight")
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        for layer, g in zip(layers, gradients, strict=True):
            layer.weight.backward(g)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(0)
    points = haar(args.size, args.count, dtype=torch.float32)
    gradients = torch.randn_like(points) / args.size
    small = skew(torch.randn_like(points)) * (
        0.04 / args.size * 2**0.5
    )  # ||A||_F about 0.04, the paper's usual step
    actions = {
        "adam": ours(OrthogonalAdam, points, gradients, lr=1e-3),
        "muon": ours(ManifoldMuon, points, gradients, lr=0.02),
        "muon_closed_form": ours(ClosedFormMuon, points, gradients, lr=0.02),
        "exact": exact_step(points, gradients, lr=1e-3),
        "exact_in_stacks": ours(ExactAdam, points, gradients, lr=1e-3),
        "geoopt": geoopt_step(points, gradients, canonical=True),
        "geoopt_euclidean": geoopt_step(points, gradients, canonical=False),
        "fast_exp": lambda: fast_exp(small),
        "matrix_exp": lambda: torch.linalg.matrix_exp(small),
    }
    seconds = alternate(actions, args.repeats, warmup=1)
    # geotorch is slow enough to be timed on a few matrices and scaled.
    few = min(args.count, 4)
    geotorch_seconds = alternate(
        {"geotorch": geotorch_step(args.size, few, gradients[:few])}, args.repeats, warmup=1
    )
    geotorch_median = statistics.median(geotorch_seconds["geotorch"]) * args.count / few
    report(
        {
            "what": f"one manifold step, {args.count} matrices {args.size} x {args.size}, float32",
            "speedup_vs_geoopt": round(ratio(seconds, "geoopt", "adam"), 3),
            "speedup_vs_geoopt_euclidean": round(ratio(seconds, "geoopt_euclidean", "adam"), 3),
            "speedup_vs_matrix_exp": round(ratio(seconds, "exact", "adam"), 3),
            "speedup_vs_matrix_exp_in_stacks": round(ratio(seconds, "exact_in_stacks", "adam"), 3),
            "speedup_vs_geotorch": round(geotorch_median / statistics.median(seconds["adam"]), 3),
            "muon_speedup_vs_geoopt": round(ratio(seconds, "geoopt", "muon"), 3),
            "muon_speedup_vs_matrix_exp": round(ratio(seconds, "exact", "muon"), 3),
            "fast_exp_speedup": round(ratio(seconds, "matrix_exp", "fast_exp"), 3),
            "seconds": {
                **{name: round(statistics.median(values), 4) for name, values in seconds.items()},
                "geotorch_scaled": round(geotorch_median, 4),
            },
            "orthogonality": orthogonality(args.size),
        },
        args.json,
        args.out,
    )


def orthogonality(size: int, steps: int = 1000) -> dict[str, Any]:
    """Residual ||X^T X - I||_F of one float32 matrix after 1,000 steps without retraction, and after it."""
    found: dict[str, Any] = {"size": size, "steps": steps}
    kinds = (
        ("adam", OrthogonalAdam, 1e-3),
        ("muon", ManifoldMuon, 0.02),
        ("muon_closed_form", ClosedFormMuon, 0.02),
    )
    for name, kind, lr in kinds:
        generator = torch.Generator().manual_seed(1)
        point = nn.Parameter(haar(size, generator=generator, dtype=torch.float32))
        optimizer = kind([point], lr=lr)
        for _ in range(steps):
            point.grad = torch.randn(size, size, generator=generator)
            optimizer.step()
        drift = residual(point.detach()).item()
        optimizer.retract()
        found[name] = {"lr": lr, "without": drift, "after_retraction": residual(point.detach()).item()}
    return found


if __name__ == "__main__":
    main()
