"""How much of the radius a plain dense ReLU network keeps when the executed float32 program is what is certified.

    python benchmarks/dense_float32.py --data /usr/share/datasets/fashion-mnist --json --out benchmarks/results/dense.json

Networks without any Lipschitz constraint, biases everywhere, trained briefly by Adam; their real radii are tiny, because norms
of layers multiply. `kept` is the deployed radius over the real one, `by_norms` the rounding error of a margin that the
norms of layers alone would prove, `by_pattern` the one used.
"""

import argparse
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from timing import report
from torch import nn

from lipnext.certificates.module import CertifiedModule, certify_module
from lipnext.core.experiment import DataSpec
from lipnext.core.seed import generator
from lipnext.data.dataset import Splits, load
from lipnext.data.detect import detect


def network(inputs: int, width: int, depth: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = [inputs, *[width] * (depth - 1), 10]
    parts: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layer = nn.Linear(before, after)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def train(net: nn.Module, splits: Splits, steps: int, seed: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)
    order = generator("dense", seed)
    for _ in range(steps):
        index = torch.randint(len(splits.train), (128,), generator=order)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(splits.train.float_images(index)), splits.train.labels[index])
        loss.backward()
        optimizer.step()
    net.eval()


def measure(net: nn.Module, splits: Splits, count: int) -> dict[str, Any]:
    images, shape = splits.test.float_images(slice(count)), splits.test.shape
    real = certify_module(net, shape, 10).certify(images)
    start = time.perf_counter()
    model = certify_module(net, shape, 10, semantics="deployed", dtype=torch.float32)
    proved = time.perf_counter()
    deployed = model.certify(images)
    seconds = time.perf_counter() - proved
    positive = real.radius > 0
    kept = (deployed.radius / real.radius)[positive]
    assert real.lipschitz is not None
    return {
        "clean": real.clean_accuracy(splits.test.labels[:count]),
        "K": real.lipschitz.value,
        "median_margin": real.margin.median().item(),
        "median_real_radius": real.radius.median().item(),
        "deployed_positive": (deployed.radius > 0).double().mean().item(),
        "kept_median": kept.median().item(),
        "kept_10th_percentile": kept.quantile(0.1).item(),
        "by_norms": _by_norms(model, images),
        "by_pattern": deployed.slack[deployed.radius > 0].median().item()
        if bool((deployed.radius > 0).any())
        else None,
        "seconds_proof": proved - start,
        "seconds_per_image": seconds / count,
    }


def _by_norms(model: CertifiedModule, images: torch.Tensor) -> float:
    with torch.no_grad():
        states = model.certifier._follow(images.double())
    return states[len(model.certifier.graph.places)].fixed.median().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder with a data set; default the embedded digits")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 500])
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # that a bound is vacuous is what is counted here
    spec = DataSpec() if args.data is None else DataSpec(name=detect(Path(args.data)), path=args.data)
    splits = load(spec)
    rows = []
    for width in args.widths:
        for depth in args.depths:
            for steps in args.steps:
                net = network(splits.test.images[0].numel(), width, depth, args.seed)
                train(net, splits, steps, args.seed)
                rows.append(
                    {"width": width, "depth": depth, "steps": steps} | measure(net, splits, args.images)
                )
    document = {"data": spec.name, "inputs": list(splits.test.shape), "n": args.images, "rows": rows}
    report(document, args.json, args.out)


if __name__ == "__main__":
    main()
