"""Local Lipschitz constants by three methods against sampled gradients, and l-infinity radii, on two trained networks.

    python benchmarks/clarke.py --data DIR --json --out benchmarks/results/clarke.json

`ordered`: whether the sampled maximum, joint, RecurJac and interval bounds stand in this order for every image and rival.
`recurjac_over_joint`: median over all images of the ratio of their largest constants. `seconds`: for all images together.
`global`: twice the product of row sums, which no margin's constant exceeds. `refined`: the joint bound of the first image's
nearest rival before and after branch and bound.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from timing import report
from torch import Tensor, nn

from lipnext.certificates.clarke.certifier import ClarkeCertifier
from lipnext.core.experiment import DataSpec
from lipnext.core.seed import generator, seeded
from lipnext.data.dataset import Dataset
from lipnext.data.dataset import load as load_data
from lipnext.data.detect import detect

METHODS = ("joint", "recurjac", "interval")


def dense(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Three hidden layers of 100 units."""
    widths = [shape[0] * shape[1] * shape[2], 100, 100, 100]
    hidden = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, classes))


def convolutional(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Two convolutions of stride 2 and a hidden layer."""
    body = [nn.Conv2d(shape[0], 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 4, 2, 1), nn.ReLU(), nn.Flatten()]
    width = 8 * (shape[1] // 4) * (shape[2] // 4)
    return nn.Sequential(*body, nn.Linear(width, 50), nn.ReLU(), nn.Linear(50, classes))


def train(net: nn.Sequential, data: Dataset, epochs: int) -> None:
    """Plain training: Adam and the cross-entropy, nothing that keeps constants small."""
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    order = generator(0, "clarke", "train")
    for _ in range(epochs):
        for index in torch.randperm(len(data), generator=order).split(128):
            loss = nn.functional.cross_entropy(net(data.float_images(index)), data.labels[index])
            adam.zero_grad()
            loss.backward()
            adam.step()
    net.eval()


def sampled(net: nn.Module, x: Tensor, eps: float, label: Tensor, rivals: Tensor, points: int) -> Tensor:
    """The largest gradient norm of every margin at random points and corners of the box, (n, K - 1)."""
    best = torch.zeros(rivals.shape, dtype=torch.float64)
    draws = generator(0, "clarke", "points")
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: net(image[None])[0]))
    for k in range(points):
        noise = 2 * torch.rand(x.shape, generator=draws, dtype=torch.float64) - 1
        rows = jacobian(x + eps * (noise.sign() if k % 2 else noise)).flatten(2).detach()
        margins = rows[torch.arange(len(x)), label][:, None] - rows
        norms = margins.abs().sum(2).gather(1, rivals)
        best = torch.maximum(best, norms)
    return best


def timed(action: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result, and seconds of wall time and of all cores together; the latter does not depend on what else runs."""
    wall, cores = time.perf_counter(), time.process_time()
    result = action()
    return result, {
        "wall": round(time.perf_counter() - wall, 2),
        "cores": round(time.process_time() - cores, 2),
    }


def compare(net: nn.Module, certifier: ClarkeCertifier, images: Tensor, eps: float, points: int) -> dict:
    """All methods at one eps."""
    found, seconds = {}, {}
    for method in METHODS:
        found[method], seconds[method] = timed(partial(certifier.constants, images, eps, method))
    joint = found["joint"]
    below = sampled(net, images.double(), eps, joint.label, joint.rivals, points)
    ladder = [below, *(found[method].values for method in METHODS)]
    largest = [values.amax(1) for values in ladder]

    def ratio(above: int, under: int) -> float:
        return round((largest[above] / largest[under]).median().item(), 4)

    return {
        "eps": eps,
        "ordered": all(bool((a <= b * (1 + 1e-12)).all()) for a, b in pairwise(ladder)),
        "joint_over_sampled": ratio(1, 0),
        "recurjac_over_joint": ratio(2, 1),
        "interval_over_joint": ratio(3, 1),
        "median_constant": {
            method: round(values.median().item(), 4)
            for method, values in zip(("sampled", *METHODS), largest, strict=True)
        },
        "seconds": seconds,
    }


def measure(name: str, net: nn.Sequential, test: Dataset, args: argparse.Namespace) -> dict:
    """Everything about one trained network."""
    with torch.no_grad():
        clean = (net(test.float_images()).argmax(1) == test.labels).double().mean().item()
    images = test.float_images(slice(0, args.images))
    certifier = ClarkeCertifier(net, test.shape)
    certificate, seconds = timed(partial(certifier, images))
    right = certificate.label == test.labels[: args.images]
    eps = [float(text) for text in args.eps.split(",")]
    refined = certifier.refine(images[:1], int(certificate.rival[0]), eps[0], 10.0)
    net = net.double()
    return {
        "network": name,
        "clean": round(clean, 4),
        "images": args.images,
        "methods": [compare(net, certifier, images, size, args.points) for size in eps],
        "global": 2 * certifier.lipschitz.value,
        "radii": {
            "median_of_right": round(statistics.median(certificate.radius[right].tolist()), 6),
            "seconds": seconds,
        },
        "refined": {
            "eps": eps[0],
            "seconds": 10.0,
            "before": refined.history[0],
            "after": refined.bound,
            "parts": refined.parts,
            "falling": all(a >= b for a, b in pairwise(refined.history)),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with a data set; default the embedded digits")
    parser.add_argument("--eps", default="0.02,0.05,0.1", help="linf distances")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    spec = DataSpec() if args.data is None else DataSpec(name=detect(args.data), path=str(args.data))
    splits = load_data(spec)
    rows = []
    for name, make in (("3 x 100", dense), ("convolutional", convolutional)):
        with seeded(0):
            net = make(splits.train.shape, len(splits.train.classes))
        train(net, splits.train, args.epochs)
        rows.append(measure(name, net, splits.test, args))
    report({"what": "local linf constants and radii", "networks": rows}, args.json, args.out)


if __name__ == "__main__":
    main()
