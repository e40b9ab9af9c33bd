"""Certified accuracy that neighbouring libraries claim, and what a proved bound leaves of it.

    pip install --no-deps deel-torchlip orthogonium
    python benchmarks/neighbours.py --json --out benchmarks/results/neighbours.json

One small network of each is trained on the embedded digits with the library's own layers and loss. The claim is theirs: the
constant is 1, the radius `margin / sqrt(2)`, in float32. The proof is `lipnext.certify_module` of the materialised layers,
as real-arithmetic network and as executed float32 program.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.metadata import version
from typing import Any

import torch
from timing import report
from torch import Tensor, nn

from lipnext import certify_module
from lipnext.certificates.adapters import plain
from lipnext.core.certificate import Certificate
from lipnext.core.experiment import DataSpec
from lipnext.core.seed import generator
from lipnext.data.dataset import Dataset, load

EPS = ("36/255", "72/255", "108/255")
Loss = Callable[[Tensor, Tensor], Tensor]


def torchlip_network() -> tuple[nn.Module, Loss]:
    import deel.torchlip as tl

    net = tl.Sequential(
        tl.SpectralConv2d(1, 16, 3, padding=1, padding_mode="circular"),
        tl.GroupSort2(),
        tl.ScaledL2NormPool2d((2, 2)),
        tl.SpectralConv2d(16, 32, 3, padding=1, padding_mode="circular"),
        tl.GroupSort2(),
        nn.Flatten(),
        tl.SpectralLinear(512, 128),
        tl.GroupSort2(),
        tl.SpectralLinear(128, 10),
    )
    loss = tl.SoftHKRMulticlassLoss(alpha=0.97, min_margin=0.5, temperature=50.0)
    return net, lambda logits, labels: loss(logits, nn.functional.one_hot(labels, 10))


def orthogonium_network() -> tuple[nn.Module, Loss]:
    from orthogonium.layers import AdaptiveOrthoConv2d, MaxMin, OrthoLinear
    from orthogonium.losses import LossXent

    net = nn.Sequential(
        AdaptiveOrthoConv2d(1, 16, 3),
        MaxMin(),
        AdaptiveOrthoConv2d(16, 32, 2, stride=2, padding=0),
        MaxMin(),
        nn.Flatten(),
        OrthoLinear(512, 128),
        MaxMin(),
        OrthoLinear(128, 10),
    )
    return net, LossXent(10, offset=0.5 * math.sqrt(2), temperature=0.25)


NETWORKS = {"deel-torchlip": torchlip_network, "orthogonium": orthogonium_network}


def train(net: nn.Module, loss: Loss, data: Dataset, epochs: int, seed: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    order = generator("neighbours", seed)
    steps = epochs * (len(data) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for images, labels in _batches(data, epochs, order):
        optimizer.zero_grad()
        loss(net(images), labels).backward()
        optimizer.step()
        schedule.step()
    net.eval()


def _batches(data: Dataset, epochs: int, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        for index in torch.randperm(len(data), generator=order)[: len(data) // 128 * 128].split(128):
            yield data.float_images(index), data.labels[index]


def claim(net: nn.Module, test: Dataset) -> dict[str, Any]:
    """What the libraries would report."""
    with torch.no_grad():
        logits = net(test.float_images())
    best, second = logits.topk(2).values.unbind(1)
    radius, right = (best - second) / math.sqrt(2), logits.argmax(1) == test.labels
    shares = {name: (right & (radius > float(Fraction(name)))).double().mean().item() for name in EPS}
    return {"constant": 1.0, "clean": right.double().mean().item(), "cra": shares}


def proof(certificate: Certificate, labels: Tensor) -> dict[str, Any]:
    assert certificate.lipschitz is not None
    return {
        "features_constant": certificate.lipschitz.value,
        "clean": certificate.clean_accuracy(labels),
        "cra": {name: certificate.accuracy_at(name, labels) for name in EPS},
        "acr": certificate.acr(labels),
        "float_error": certificate.slack.max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # theirs, about each other's layers
    splits = load(DataSpec())
    document: dict[str, Any] = {
        "data": "digits",
        "n": len(splits.test),
        "epochs": args.epochs,
        "seed": args.seed,
    }
    for name, build in NETWORKS.items():
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        net, loss = build()
        train(net, loss, splits.train, args.epochs, args.seed)
        trained = time.perf_counter()
        copied = plain(net, splits.test.shape)
        shape, classes, images = splits.test.shape, splits.test.classes, splits.test.float_images()
        real = certify_module(copied, shape, classes)
        deployed = certify_module(copied, shape, classes, semantics="deployed", dtype=torch.float32)
        places = real.certifier.describe()["layers"]
        document[name] = {
            "version": version(name),
            "claimed": claim(net, splits.test),
            "proved": {
                "constant": places[-1]["lipschitz"],
                **proof(real.certify(images), splits.test.labels),
            },
            "proved_float32": proof(deployed.certify(images), splits.test.labels),
            "layers": {f"{p['name']} {p['operation']}": p["bound"] for p in places},
            "seconds_training": trained - start,
            "seconds_proof": time.perf_counter() - trained,
        }
    report(document, args.json, args.out)


if __name__ == "__main__":
    main()
