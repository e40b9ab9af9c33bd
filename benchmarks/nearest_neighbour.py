"""The nearest-neighbour certificate: the row that no system may fall below.

    python benchmarks/nearest_neighbour.py fashion-mnist-cpu --data DIR

With `f_k(x) = -min ||x - x_i||` over the training images of class k every logit is 1-Lipschitz, so the radius is half the gap
between the two best classes. Computed on bytes: squared distances are exact integers.
"""

import argparse
import json

import torch
from quality import CURVE, RESULTS
from timing import environment
from torch import Tensor

from lipnext import runs
from lipnext.data.dataset import Dataset, load


def class_distances(train: Dataset, images: Tensor, chunk: int = 250) -> Tensor:
    """Distance of each image to the nearest training image of each class, float64 `(n, K)`, in units of [0, 1]."""
    # Products of bytes summed over 3,072 pixels stay below 2^53: float64 is exact here.
    points = train.images.flatten(1).double()
    squares = points.square().sum(1)
    found = torch.full((len(images), len(train.classes)), float("inf"), dtype=torch.float64)
    members = [train.labels == k for k in range(len(train.classes))]
    for start in range(0, len(images), chunk):
        x = images[start : start + chunk].flatten(1).double()
        square = x.square().sum(1, keepdim=True) + squares - 2 * x @ points.T
        for k, mask in enumerate(members):
            found[start : start + chunk, k] = square[:, mask].min(1).values
    return found.clamp_min(0).sqrt() / 255


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="whose data set is taken")
    parser.add_argument("--data")
    args = parser.parse_args()
    experiment = runs.resolve(args.experiment, args.data)
    splits = load(experiment.data)
    distance = class_distances(splits.train, splits.test.images)
    best, label = distance.min(1)
    second = distance.scatter(1, label[:, None], float("inf")).min(1).values
    # Half the gap, less what a few roundings of numbers below 64 can have added.
    radius = ((second - best) / 2 - 1e-12).clamp_min(0)
    right = label == splits.test.labels
    shares = [(right & (radius > r)).double().mean().item() for r in CURVE]
    document = {
        "preset": f"nearest-neighbour-{experiment.preset}",
        "system": "nearest neighbour",
        "norm": "l2",
        "kind": "deterministic",
        "n": len(radius),
        "clean": right.double().mean().item(),
        "cra": {
            e: (right & (radius > int(e.split("/")[0]) / 255)).double().mean().item()
            for e in experiment.certify.eps
        },
        "acr": (radius * right).mean().item(),
        "curve": {"radius": CURVE, "accuracy": shares},
        **environment(),
    }
    path = RESULTS / f"nearest-neighbour-{experiment.preset}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: document[k] for k in ("clean", "cra", "acr")}))


if __name__ == "__main__":
    main()
