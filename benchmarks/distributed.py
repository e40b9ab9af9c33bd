"""Training on several processes of one thread each: images per second at the same global batch, and state per process.

    python benchmarks/distributed.py --json

Runs the training loop on random images under torchrun, 1 and 2 processes in turn, and takes the time between steps as a clock
on the wall sees it: preparing and exchanging included. `speedup` is the median of the ratios of neighbouring runs. `state` is
all that a process keeps beside the weights (momenta, slow weights, the average), the largest over the processes, in bytes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timing import report

from lipnext import systems
from lipnext.core.world import World, join
from lipnext.data.dataset import Dataset
from lipnext.training import loop, saving
from lipnext.training.progress import Silent

WARM_UP = 2  # steps


class Clock(Silent):
    """The time of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def advance(self, count: int, note: str = "") -> None:
        self.times.append(time.perf_counter())


def state_bytes(parts: Mapping[str, tuple[Any, Any]]) -> int:
    """What this process keeps beside the weights."""
    held = {name: part for name, (part, _) in parts.items() if part is not None}
    tensors = [
        *(value for name in ("manifold", "rest") for s in held[name].state.values() for value in s.values()),
        *(held["lookahead"].slow if "lookahead" in held else []),
        *(held["average"].average.values() if "average" in held else []),
    ]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def work(args: argparse.Namespace, world: World) -> dict[str, float]:
    """Train one epoch and return what was seen, the same on all processes."""
    held: list[int] = []
    gather = saving.gather_state

    def seen(parts: Any, owners: Any) -> Any:
        held.append(state_bytes(parts))
        return gather(parts, owners)

    saving.gather_state = seen
    experiment = systems.experiment("lipnext/tiny").override(
        [
            *(f"model.{name}={getattr(args, name)}" for name in ("width", "depth", "patch")),
            f"train.batch_size={args.batch}",
            f"train.precision={args.precision}",
            "train.epochs=1",
            "train.threads=1",
            "train.ema=0.999",
            "optim.lookahead=6",
            "augment.flip=true",
            "augment.crop=2",
        ]
    )
    rng, count = torch.Generator().manual_seed(0), args.batch * (WARM_UP + args.steps)
    images = torch.randint(0, 256, (count, 3, args.side, args.side), generator=rng).to(torch.uint8)
    data = Dataset(
        images=images, labels=torch.arange(count) % 10, classes=tuple(str(label) for label in range(10))
    )
    network = systems.build_network(experiment, data.shape, 10)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        folder = world.first(lambda: scratch)  # one folder for all, the first process's
        loop.train(
            network,
            experiment,
            data,
            data.subset(torch.arange(10)),
            Path(folder),
            reporter=clock,
            world=world,
        )
        world.add(0.0)  # nobody leaves the folder before all are done
    seconds = world.largest(clock.times[-1] - clock.times[WARM_UP - 1])
    return {"images_per_second": args.batch * args.steps / seconds, "state": world.largest(held[-1])}


def launch(size: int, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    options = [f"--{name}={getattr(args, name)}" for name in (*OPTIONS, "precision")]
    done = subprocess.run(
        [*command, __file__, "--worker", *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


OPTIONS = {"width": 192, "depth": 8, "patch": 4, "side": 32, "batch": 256, "steps": 20}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.worker:
        with join("cpu") as world:
            found = work(args, world)
        if world.is_first:
            print(json.dumps(found))
        return
    runs = {size: [] for size in (1, 2)}
    for _ in range(args.repeats):
        for size, results in runs.items():
            results.append(launch(size, args))
    short = argparse.Namespace(**{**vars(args), "steps": 2, "batch": 8})  # the state is the same at any batch
    held = {size: results[0]["state"] for size, results in runs.items()} | {4: launch(4, short)["state"]}
    speeds = {size: [result["images_per_second"] for result in results] for size, results in runs.items()}
    report(
        {
            "what": f"training on processes of one thread, C={args.width} L={args.depth} {args.side}x{args.side} "
            f"batch {args.batch} {args.precision}",
            "images_per_second": {size: round(statistics.median(found), 1) for size, found in speeds.items()},
            "speedup": round(statistics.median(b / a for a, b in zip(speeds[1], speeds[2], strict=True)), 3),
            "state": held,
            "state_share": {size: round(found / held[1], 4) for size, found in held.items()},
            "cores": os.cpu_count(),
        },
        args.json,
        args.out,
    )


if __name__ == "__main__":
    main()
