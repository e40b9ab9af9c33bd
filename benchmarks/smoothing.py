"""Certified accuracy by votes: SPLITZ with LipNeXt's body against Cohen's smoothing, at equal training time.

    python benchmarks/smoothing.py --data DIR --json --out benchmarks/results/smoothing.json

Each experiment is trained for as many epochs as fit into --minutes on this machine, and certified on --images test
images, evenly spaced, with the votes and the alpha of its preset: 10,000 and 0.001. `cra` counts radii that are each
wrong with probability alpha at most; `cra_confident` takes off as many as may be wrong, but for a probability of 0.001,
over the whole subset. `seconds` is the time outside of training steps: validation, proofs and the certification.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import report

from lipnext import runs
from lipnext.bounds.binomial import wrong_radii_up
from lipnext.comparison import epoch_seconds

EXPERIMENTS = ("splitz/fashion-mnist-cpu", "splitz/fashion-mnist-cpu-cohen")
RHO = 0.001


def measure(name: str, args: argparse.Namespace, sigma: str | None, folder: Path) -> dict[str, Any]:
    changes = [f"certify.images={args.images}", f"seed={args.seed}"]
    if sigma is not None:
        changes.append(f"model.sigma={sigma}")
    experiment = runs.resolve(name, args.data, changes)
    epochs = args.epochs or max(1, math.floor(60 * args.minutes / epoch_seconds(experiment)))
    experiment = experiment.override([f"train.epochs={epochs}", f"train.evaluate_every={epochs}"])
    started = time.perf_counter()
    result = runs.train(experiment, folder)
    n, alpha = result["n"], experiment.model.get("alpha", 1e-3)
    wrong = wrong_radii_up(n, float(alpha), RHO)
    return {
        "experiment": name,
        "model": experiment.model,
        "votes": experiment.model.get("samples", 10_000),
        "alpha": alpha,
        **{
            key: result[key]
            for key in ("clean", "cra", "acr", "n", "abstained", "confidence", "kind", "lipschitz")
        },
        "cra_confident": {eps: max(round(cra * n) - wrong, 0) / n for eps, cra in result["cra"].items()},
        **{
            key: result[key]
            for key in ("minutes", "epochs", "precision", "parameters", "seed", "model_sha256")
        },
        "seconds": round(time.perf_counter() - started - 60 * result["minutes"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", default=EXPERIMENTS)
    parser.add_argument("--data", help="folder with the data set of the experiments")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--epochs", type=int, help="instead of minutes")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--sigma", action="append", help="instead of the presets'; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            measure(name, args, sigma, Path(scratch) / f"{name.replace('/', '-')}-{sigma}")
            for sigma in args.sigma or [None]
            for name in args.experiments
        ]
    report({"what": "certified accuracy by votes", "rho": RHO, "runs": rows}, args.json, args.out)


if __name__ == "__main__":
    main()
