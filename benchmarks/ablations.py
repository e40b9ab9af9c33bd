"""What makes LipNeXt learn fast on a small budget: one setting changed at a time, figures of the validation part alone.

    python benchmarks/ablations.py fashion-mnist --data DIR [--only NAME,NAME] [--jobs 2]
    python benchmarks/ablations.py cifar10 --data DIR

Every training writes its log to benchmarks/results/ablations/DATA/NAME.jsonl and is not repeated while its settings are the
same. The test part is never loaded into a figure: the script trains and reads the log, it certifies nothing.
`benchmarks/readme.py` makes the tables of docs/ablations.md from the logs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results" / "ablations"
BASE = {
    "fashion-mnist": (
        "fashion-mnist-cpu",
        {
            "model.width": 192,
            "model.depth": 6,
            "model.patch": 7,
            "model.pool": False,
            "optim.lr": 0.012,
            "optim.euclidean_lr": 0.003,
            "loss.temperature": 0.25,
            "loss.ramp_to": 3.0,
            "train.epochs": 5,
        },
    ),
    "cifar10": (
        "cifar10-cpu",
        {
            "model.width": 128,
            "model.depth": 6,
            "model.patch": 4,
            "model.pool": False,
            "optim.lr": 0.012,
            "optim.euclidean_lr": 0.003,
            "loss.temperature": 0.25,
            "loss.ramp_to": 2.0,
            "train.epochs": 5,
        },
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "base, another seed": {"seed": 1},
    "shift 1/8": {"model.shift": 0.125},
    "shift 1/4": {"model.shift": 0.25},
    "no shift": {"model.shift": 0.0},
    "beta 1/4": {"model.beta": 0.25},
    "beta 3/4": {"model.beta": 0.75},
    "beta 1": {"model.beta": 1.0},
    "depth 4": {"model.depth": 4},
    "depth 10": {"model.depth": 10},
    "temperature 0.15": {"loss.temperature": 0.15},
    "temperature 0.5": {"loss.temperature": 0.5},
    "temperature 1 to 0.15": {"loss.temperature": 1.0, "loss.temperature_end": 0.15},
    "temperature 0.1, ramp to 2": {"loss.temperature": 0.1, "loss.ramp_to": 2.0},
    "radius ramp to 1": {"loss.ramp_to": 1.0},
    "radius ramp to 1.5": {"loss.ramp_to": 1.5},
    "radius ramp to 2": {"loss.ramp_to": 2.0},
    "radius ramp to 4": {"loss.ramp_to": 4.0},
    "constant radius": {"loss.ramp_from": 1.0, "loss.ramp_to": 1.0},
    "cross-entropy": {"loss.name": "cross-entropy"},
    "logit annealing": {"loss.name": "cross-entropy", "loss.annealing": 5.0, "loss.offset": 0.25},
    "EMMA and annealing": {"loss.annealing": 3.0},
    "calibrated loss": {"loss.name": "cll"},
    "the error at the end": {"loss.power": 1.0},
    "the error squared at the end": {"loss.power": 2.0},
    "label smoothing 0.05": {"loss.smoothing": 0.05},
    "step angle 0.006": {"optim.lr": 0.006},
    "step angle 0.024": {"optim.lr": 0.024},
    "head rate 0.001": {"optim.euclidean_lr": 0.001},
    "head rate 0.01": {"optim.euclidean_lr": 0.01},
    "momentum 0.9": {"optim.momentum": 0.9},
    "momentum 0.98": {"optim.momentum": 0.98},
    "Adam with Lookahead 6": {"optim.name": "adam", "optim.lr": 0.03, "optim.lookahead": 6},
    "Lookahead 6": {"optim.lookahead": 6},
    "average 0.99": {"train.ema": 0.99},
    "batch 128": {"train.batch_size": 128},
    "batch 512": {"train.batch_size": 512},
    "no flip": {"augment.flip": False},
    "no crop": {"augment.crop": 0},
    "crop 1": {"augment.crop": 1},
    "cutout 6": {"augment.cutout": 6},
    "RandAugment": {"augment.randaugment": 0.5},
    "pooled": {"model.pool": True},
    "encoding a channel": {"model.encoding": "channel"},
    "encoding a channel, no flip": {"model.encoding": "channel", "augment.flip": False},
    "patch 4, width 128": {"model.patch": 4, "model.width": 128},
}


def main() -> None:
    """Train what is missing and print every figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=sorted(BASE))
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", help="names of settings, separated by commas")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    names = list(SETTINGS) if args.only is None else [name.strip() for name in args.only.split(",")]
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        parser.error(f"--only: there is no setting '{unknown[0]}'; known are {', '.join(SETTINGS)}")
    with ThreadPoolExecutor(args.jobs) as pool:
        for line in pool.map(lambda name: summary(name, logged(args.dataset, name, args.data)), names):
            print(line, flush=True)


def logged(dataset: str, name: str, data: str) -> list[dict[str, Any]]:
    """Return the log of a setting, trained in a process of its own on one thread if it is not there yet."""
    base, options = BASE[dataset]
    options = {**options, **SETTINGS[name]}
    path = FOLDER / dataset / f"{name.replace(' ', '-').replace('/', '_').replace(',', '')}.jsonl"
    if path.is_file():
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if found[0]["options"] == options:
            return found
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, __file__, "--train", base, data, folder, json.dumps(options)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        events = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    head = {"setting": name, "experiment": base, "options": options, "jobs_at_once": 2}
    log = [head | {"wall_seconds": round(time.perf_counter() - started, 1)}]
    log += [event for event in events if event["event"] == "epoch"]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    draft.replace(path)
    return log


def train(base: str, data: str, folder: str, options: dict[str, Any]) -> None:
    """Train on the training part and estimate on the validation part after every epoch."""
    import torch

    from lipnext import runs, systems
    from lipnext.data.dataset import load
    from lipnext.training import loop

    torch.set_num_threads(1)
    text = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()
    ]
    experiment = loop.resolve_precision(runs.resolve(base, data, [*text, "train.checkpoint_every=999"]))
    splits = load(experiment.data)
    network = systems.build_network(experiment, splits.train.shape, len(splits.train.classes))
    loop.train(network, experiment, splits.train, splits.validation, Path(folder))


def summary(name: str, log: list[dict[str, Any]]) -> str:
    """Return the last epoch's figures in a line."""
    last = log[-1]
    figures = last["validation_estimate"]
    shares = "  ".join(f"{eps} {share:.4f}" for eps, share in figures["cra"].items())
    seconds = last["seconds"]
    return (
        f"{name:24} epoch {last['epoch']:2}  loss {last['loss']:.3f}  clean {figures['clean']:.4f}  {shares}  "
        f"ACR {figures['acr']:.4f}  {seconds:.0f} s"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(*sys.argv[2:5], json.loads(sys.argv[5]))
    else:
        main()
