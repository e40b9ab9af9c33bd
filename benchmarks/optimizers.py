"""The paper's Adam against Manifold Muon, both tuned on validation, two seeds, two data sets.

    python benchmarks/optimizers.py --fashion DIR --cifar10 DIR                    at equal epochs
    python benchmarks/optimizers.py --fashion DIR --cifar10 DIR --adam-epochs 6    Adam for longer

Rates are chosen by the ACR on the validation part with a seed of their own; the test figures of those runs are dropped
unread. Writes benchmarks/results/optimizers.json, or optimizers-unequal.json where the epochs differ.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from timing import environment
from trials import RESULTS, trial, without_test

GRID = {"adam": (1e-3, 1e-2, 3e-2, 1e-1), "muon": (0.0075, 0.015, 0.03)}
LOOKAHEAD = {"adam": 6, "muon": 0}  # Lookahead as in the paper for its Adam; Muon without
TUNING_SEED, SEEDS = 100, (0, 1)


def run(base: str, data: str, name: str, lr: float, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """One trial of one optimiser at one rate."""
    options = [
        "train.evaluate_every=1",
        f"optim.name={name}",
        f"optim.lr={lr}",
        f"seed={seed}",
        f"train.epochs={epochs}",
        f"optim.lookahead={LOOKAHEAD[name]}",
    ]
    found = trial(base, data, options, folder / f"{base}-{name}-{lr:g}-{epochs}-seed{seed}")
    return {"optimizer": name, "lr": lr, **found}


def compare(
    base: str, data: str, epochs: dict[str, int], folder: Path, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    """Tune both optimisers on validation, then report two seeds each at the rate that won."""
    jobs = [
        pool.submit(run, base, data, name, lr, TUNING_SEED, epochs[name], folder)
        for name in GRID
        for lr in GRID[name]
    ]
    tuning = [without_test(job.result()) for job in jobs]
    best = {
        name: max((t for t in tuning if t["optimizer"] == name), key=lambda t: t["validation"][-1]["acr"])[
            "lr"
        ]
        for name in GRID
    }
    jobs = [
        pool.submit(run, base, data, name, best[name], seed, epochs[name], folder)
        for name in GRID
        for seed in SEEDS
    ]
    return {"tuning": tuning, "chosen": best, "final": [job.result() for job in jobs]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fashion", required=True)
    parser.add_argument("--cifar10", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--adam-epochs", type=int, help="of Adam, where they are to differ")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", default="runs/optimizers")
    args = parser.parse_args()
    epochs = {"adam": args.adam_epochs or args.epochs, "muon": args.epochs}
    equal = epochs["adam"] == epochs["muon"]
    with ThreadPoolExecutor(args.jobs) as pool:
        document = {
            "what": "Adam (paper, Lookahead 6) against Manifold Muon, width 128, depth 6",
            "epochs": epochs,
            "fashion-mnist": compare("fashion-mnist-cpu", args.fashion, epochs, Path(args.folder), pool),
            "cifar10": compare("cifar10-cpu", args.cifar10, epochs, Path(args.folder), pool),
            **environment(),
        }
    (RESULTS / f"optimizers{'' if equal else '-unequal'}.json").write_text(
        json.dumps(document, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
