"""Networks whose distance to the decision boundary is known exactly, and a small trained one."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

Case = tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]
"""Logits, images, their predicted labels, and the true distances to the boundary."""

PIXELS = 27


def linear_case(seed: int, norm: float = 2.0, n: int = 12, classes: int = 5) -> Case:
    """A linear classifier: the distance to the rival j is (z_y - z_j) / ||w_y - w_j|| in the dual norm."""
    noise = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, PIXELS, generator=noise, dtype=torch.float64)
    bias = 0.1 * torch.randn(classes, generator=noise, dtype=torch.float64)
    images = torch.rand(n, 3, 3, 3, generator=noise, dtype=torch.float64)

    def logits(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.to(x.dtype).T + bias.to(x.dtype)

    values = logits(images)
    labels = values.argmax(1)
    truth = []
    for value, label in zip(values, labels.tolist(), strict=True):
        dual = 1.0 if norm == math.inf else 2.0
        rivals = [j for j in range(classes) if j != label]
        truth.append(
            min(float((value[label] - value[j]) / (weight[label] - weight[j]).norm(dual)) for j in rivals)
        )
    return logits, images, labels, torch.tensor(truth, dtype=torch.float64)


def sphere_case(seed: int, norm: float = 2.0) -> Case:
    """Concentric shells of class 0, 1, 2 around a centre with boundaries at l2 radius 1 and 2."""
    noise = torch.Generator().manual_seed(seed)
    centre = torch.full((PIXELS,), 0.5, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(12, PIXELS, generator=noise, dtype=torch.float64))
    radius = torch.tensor(
        [0.3, 0.7, 0.95, 1.1, 1.3, 1.45, 1.55, 1.8, 1.95, 2.1, 2.5, 3.0], dtype=torch.float64
    )
    images = (centre + radius[:, None] * direction).reshape(-1, 3, 3, 3)

    def logits(x: Tensor) -> Tensor:
        r = (x.flatten(1) - centre.to(x.dtype)).norm(dim=1)
        return torch.stack([1.5 - r, 0.5 + 0 * r, r - 1.5], dim=1)

    if norm == 2.0:
        truth = torch.minimum((radius - 1).abs(), (radius - 2).abs())
    else:
        offsets = radius[:, None] * direction
        truth = torch.tensor([min(linf_to_sphere(v, 1.0), linf_to_sphere(v, 2.0)) for v in offsets])
    return logits, images, logits(images).argmax(1), truth


def linf_to_sphere(v: Tensor, radius: float) -> float:
    """The smallest linf change of `v` that brings its l2 norm to `radius`, by bisection.

    Outwards every |v_i| grows by t; inwards it shrinks by t, down to 0.
    """
    outwards = bool(v.norm() < radius)
    low, high = 0.0, 10.0
    for _ in range(100):
        t = (low + high) / 2
        moved = (v.abs() + t if outwards else (v.abs() - t).clamp_min(0)).norm()
        reached = moved >= radius if outwards else moved <= radius
        low, high = (low, t) if reached else (t, high)
    return high


@cache
def trained_digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A ReLU network on half of the digits, and 100 others with their predicted labels, float64."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float64).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).double()
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(images[:900]), labels[:900]).backward()
        optimiser.step()
    net.requires_grad_(False).eval()
    rest = images[900:1000]
    return net, rest, net(rest).argmax(1)
