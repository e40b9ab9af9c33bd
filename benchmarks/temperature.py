"""The dial between clean accuracy and large radii: temperature of the loss and end of the radius ramp, Fashion-MNIST.

    python benchmarks/temperature.py --fashion DIR

Small network, equal epochs, one seed, figures of the validation part (estimates). Writes benchmarks/results/temperature.json.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from timing import environment
from trials import RESULTS, trial, without_test

SETTINGS = ((1.0, 2.0), (0.5, 2.0), (0.25, 2.0), (0.1, 2.0), (0.25, 1.0), (0.25, 3.0), (0.6, 3.0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fashion", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", default="runs/temperature")
    args = parser.parse_args()

    def run(setting: tuple[float, float]) -> dict[str, Any]:
        temperature, ramp = setting
        options = [
            f"loss.temperature={temperature}",
            f"loss.ramp_to={ramp}",
            f"train.epochs={args.epochs}",
            "seed=100",
        ]
        found = trial(
            "fashion-mnist-cpu", args.fashion, options, Path(args.folder) / f"T{temperature:g}-ramp{ramp:g}"
        )
        return {"temperature": temperature, "ramp_to": ramp, **without_test(found)}

    with ThreadPoolExecutor(args.jobs) as pool:
        trials = list(pool.map(run, SETTINGS))
    document = {
        "what": f"temperature and ramp, Fashion-MNIST, width 128, depth 6, {args.epochs} epochs, Muon",
        "trials": trials,
        **environment(),
    }
    (RESULTS / "temperature.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
