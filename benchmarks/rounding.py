"""What rounding alone does to a certificate: label flips at float resolution inside certified balls, decided exactly.

    python benchmarks/rounding.py runs/fashion-mnist-cpu --json --out benchmarks/results/rounding.json

Images are of three kinds: ordinary ones of the test part, points on the decision boundary between two of them, and
points so far before it that a `deployed` radius is just positive. Each is certified and the program is searched in
its own type. A certificate with semantics `real` makes no promise about a program that rounds: flips in its rows show
why `deployed` exists.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from timing import report
from torch import Tensor

from lipnext import runs
from lipnext.auditing.rounding_search import images_near_boundary, rounding_search
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.certificate import Semantics
from lipnext.core.errors import ViolationError
from lipnext.core.rounding import ARITHMETIC
from lipnext.data.dataset import load as load_data
from lipnext.deployment.bundle import load_experiment

CASES: tuple[tuple[Semantics, str], ...] = (
    ("real", "float32"),
    ("deployed", "float32"),
    ("real", "float64"),
    ("deployed", "float64"),
)


def search(run: Path, data: str | None, count: int, directions: int, rounds: int) -> list[dict[str, Any]]:
    """Search around `count` images of each kind, for each semantics and each type that a program may run in."""
    net = runs.load(run).net
    test = load_data(runs.data_of(load_experiment(run), data)).test
    images = test.float_images(slice(4 * count))
    rows = []
    for semantics, arithmetic in CASES:
        dtype = ARITHMETIC[arithmetic]
        certifier = MarginCertifier(net, semantics, arithmetic if semantics == "deployed" else "float64")
        executed = net.materialise().to(dtype)
        for kind, chosen in pictures(certifier, images, count, dtype).items():
            certificate = certifier(chosen)
            flips = rounding_search(
                executed, chosen, certificate, boundary=towards(chosen), directions=directions, rounds=rounds
            )
            rows.append(
                {
                    "semantics": semantics,
                    "program": arithmetic,
                    "images": kind,
                    "n": len(chosen),
                    "with_radius": int((certificate.radius > 0).sum()),
                    "flips": len(flips),
                }
            )
            print(rows[-1], file=sys.stderr)
    return rows


def pictures(certifier: MarginCertifier, images: Tensor, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Ordinary images, points on the boundary, and points where the certifier's radius is just positive."""
    labels = certifier(images).label
    partner = labels.roll(1)
    first, second = images[labels != partner][:count], images.roll(1, 0)[labels != partner][:count]
    network = certifier.network
    distances = certifier.evidence.distances
    closest = distances[~torch.eye(len(distances), dtype=torch.bool)].min().item()
    before = 2 * certifier.error.max().item() / closest
    return {
        "ordinary": images[:count].to(dtype),
        "on the boundary": images_near_boundary(network, first, second, dtype=dtype),
        "just before it": images_near_boundary(network, first, second, dtype=dtype, offset=before),
    }


def towards(images: Tensor) -> Tensor:
    """The next image of the batch: where the boundary was found, for all but the ordinary ones."""
    return images.roll(1, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", help="folder with the data set; default the run's own")
    parser.add_argument("--images", type=int, default=1000, help="of each kind")
    parser.add_argument("--directions", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = search(args.run, args.data, args.images, args.directions, args.rounds)
    document = {
        "run": args.run.name,
        "rows": rows,
        "directions": args.directions,
        "rounds": args.rounds,
    }
    report(document, args.json, args.out)
    if any(row["flips"] for row in rows if row["semantics"] == "deployed"):
        sys.exit(ViolationError.exit_code)


if __name__ == "__main__":
    main()
