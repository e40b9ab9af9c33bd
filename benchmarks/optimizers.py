"""The paper's Adam against Manifold Muon at equal epochs, both tuned on validation, two seeds, two data sets.

    python benchmarks/optimizers.py --fashion DIR --cifar10 DIR

Rates are chosen by the ACR on the validation part with a seed of their own; the test part is certified only for the final runs.
Writes benchmarks/results/optimizers.json.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from timing import environment

RESULTS = Path(__file__).resolve().parent / "results"
GRID = {"adam": (1e-3, 3e-3, 1e-2), "muon": (0.015, 0.03, 0.06)}
TUNING_SEED, SEEDS = 100, (0, 1)
COMMON = ("model.width=128", "model.depth=6", "model.patch=4", "train.threads=1", "train.evaluate_every=1")


def run(base: str, data: str, name: str, lr: float, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Train one setting in a process of its own; return its result with the last validation estimate."""
    out = folder / f"{base}-{name}-{lr:g}-seed{seed}"
    if not (out / "result.json").is_file():
        # Lookahead as in the paper for its Adam; Muon without.
        options = [*COMMON, f"optim.name={name}", f"optim.lr={lr}", f"seed={seed}", f"train.epochs={epochs}"]
        options.append(f"optim.lookahead={6 if name == 'adam' else 0}")
        command = [sys.executable, "-m", "lipnext", "train", base, "--data", data, "--out", str(out)]
        for option in options:
            command += ["--set", option]
        quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "optimizer": name,
        "lr": lr,
        "seed": seed,
        "validation": [event["validation_estimate"] for event in events if event["event"] == "epoch"],
        **{key: result[key] for key in ("clean", "cra", "acr", "minutes", "preset", "epochs", "precision")},
    }


def compare(base: str, data: str, epochs: int, folder: Path, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """Tune both optimisers on validation, then report two seeds each at the rate that won."""
    tuning = [
        pool.submit(run, base, data, name, lr, TUNING_SEED, epochs, folder)
        for name in GRID
        for lr in GRID[name]
    ]
    tried = [job.result() for job in tuning]
    best = {
        name: max((t for t in tried if t["optimizer"] == name), key=lambda t: t["validation"][-1]["acr"])[
            "lr"
        ]
        for name in GRID
    }
    final = [
        pool.submit(run, base, data, name, best[name], seed, epochs, folder)
        for name in GRID
        for seed in SEEDS
    ]
    for t in tried:  # the tuning runs' test figures play no part and are not kept
        for key in ("clean", "cra", "acr"):
            del t[key]
    return {"tuning": tried, "chosen": best, "final": [job.result() for job in final]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fashion", required=True)
    parser.add_argument("--cifar10", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", default="runs/optimizers")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        document = {
            "what": f"Adam (paper, Lookahead 6) against Manifold Muon, width 128, depth 6, {args.epochs} epochs",
            "fashion-mnist": compare("fashion-mnist-cpu", args.fashion, args.epochs, Path(args.folder), pool),
            "cifar10": compare("cifar10-cpu", args.cifar10, args.epochs, Path(args.folder), pool),
            "command": "python benchmarks/optimizers.py --fashion DIR --cifar10 DIR",
            **environment(),
        }
    (RESULTS / "optimizers.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
