"""Certified accuracy by votes: SPLITZ with LipNeXt's body against Cohen's smoothing, at equal training time.

    python benchmarks/smoothing.py --data DIR [--seeds 2] --json --out benchmarks/results/smoothing.json

Each experiment is trained for as many epochs as fit into --minutes on this machine, with each of the seeds, and certified on
--images test images, evenly spaced, with the votes and the alpha of its preset: 10,000 and 0.001. Figures are means over the
seeds; differences are to the first row, image by image, with 95 % intervals over images and seeds. `cra` counts radii that are
each wrong with probability alpha at most; `cra_confident` takes off as many as may be wrong, but for a probability of 0.001,
over the whole subset.
"""

import argparse

from timing import report

from lipnext import runs
from lipnext.bounds.binomial import wrong_radii_up
from lipnext.comparison import compare

EXPERIMENTS = ("splitz/fashion-mnist-cpu", "splitz/fashion-mnist-cpu-cohen")
EPS = "0.25,0.5,1.0"
RHO = 0.001


def main() -> None:
    """Train what is missing under --folder, certify, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", default=EXPERIMENTS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", default="runs/smoothing")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    document = compare(
        args.experiments,
        data=args.data,
        folder=args.folder,
        minutes=args.minutes,
        seeds=args.seeds,
        overrides=["certify.images=1"],  # the comparison certifies
        images=args.images,
        eps=EPS,
        nearest_neighbour=False,
    )
    (table,) = document["tables"]
    for name, row in zip(args.experiments, table["rows"], strict=True):
        model = runs.resolve(name).model
        alpha = float(model.get("alpha", 1e-3))
        # Of each seed, such that all of them together are wrong with probability RHO at most.
        wrong = wrong_radii_up(document["n"], alpha, RHO / args.seeds) / document["n"]
        row |= {
            "model": model,
            "votes": model.get("samples", 10_000),
            "alpha": alpha,
            "cra_confident": {eps: max(cra - wrong, 0.0) for eps, cra in row["cra"].items()},
        }
    report({"what": "certified accuracy by votes", "rho": RHO, **document}, args.json, args.out)


if __name__ == "__main__":
    main()
