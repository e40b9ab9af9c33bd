"""Train an experiment, certify the whole test part, and commit the numbers.

    python benchmarks/quality.py fashion-mnist-cpu --data /usr/share/datasets/fashion-mnist --seed 0

Writes benchmarks/results/NAME-seedS.json: preset, seed, minutes, clean, cra, acr, the curve of certified accuracy, command and
commit. The run folder stays under runs/; a second call finds it finished and only writes the JSON again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from timing import environment
from torch import Tensor

from lipnext import runs
from lipnext.core.certificate import Certificate
from lipnext.core.experiment import Experiment

RESULTS = Path(__file__).resolve().parent / "results"
CURVE = [n * 3 / 255 for n in range(86)]  # 0 to 255/255


def quality(experiment: Experiment, folder: Path, notes: str = "") -> dict[str, Any]:
    """Return what is committed for a run, training it first if it is not finished."""
    if not (folder / runs.RESULT).is_file():
        runs.train(experiment, folder)
    result = json.loads((folder / runs.RESULT).read_text(encoding="utf-8"))
    certificate, test = runs.certify_run(folder)
    return {**result, "curve": curve(certificate, test.labels), "notes": notes}


def curve(certificate: Certificate, labels: Tensor) -> dict[str, list[float]]:
    """Certified accuracy on a grid of radii; at 0 it is the share that is right with a positive radius."""
    right = certificate.label == labels
    shares = [(right & (certificate.radius > radius)).double().mean().item() for radius in CURVE]
    return {"radius": CURVE, "accuracy": shares}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment")
    parser.add_argument("--data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--name", help="of the result; default the experiment's")
    parser.add_argument("--notes", default="")
    args = parser.parse_args()
    name = f"{args.name or args.experiment.rpartition('/')[2]}-seed{args.seed}"
    experiment = runs.resolve(args.experiment, args.data, [f"seed={args.seed}", *args.overrides])
    result = quality(experiment, Path("runs") / name, args.notes)
    document = {**result, **environment()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(
        f"{name}: clean {result['clean']:.4f}",
        *(f"{k} {v:.4f}" for k, v in result["cra"].items()),
        f"ACR {result['acr']:.4f}",
    )


if __name__ == "__main__":
    main()
