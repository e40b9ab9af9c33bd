"""What `lipnext plan --gpu cpu` predicts against what a step takes on this machine, in one process.

    python benchmarks/plan.py --json
    python benchmarks/plan.py --cpu-time --json        # on a busy machine: one thread, counted by the processor's time

The step is that of the experiment on random images: forward, loss, backward, both optimisers. `error`: predicted over measured
less 1, for the whole step, its passes and its manifold step, and for the largest number of bytes of tensors alive. The fastest
of several runs is taken, as for the rates of the plan: other processes make both slower, but not equally. `slowest_to_fastest`
of the steps says how much they did; above 1.2 the errors say little.
"""

import argparse
import time
from typing import Any

import torch
from timing import report

from lipnext import planning, systems
from lipnext.optim.groups import split_parameters
from lipnext.planning import DATA, Meter
from lipnext.training.loop import make_euclidean_optimizer, make_orthogonal_optimizer
from lipnext.training.objective import Objective


def measured(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Plan a step, take it, compare."""
    what = systems.experiment(args.experiment).override(
        [f"train.batch_size={args.batch}", f"train.precision={precision}"]
    )
    name = next((name for name in DATA if (what.preset or "").startswith(name)), what.data.name)
    shape, classes, _ = DATA[name]
    network = systems.build_network(what, shape, classes).train()
    orthogonal, euclidean = split_parameters(network)
    manifold = make_orthogonal_optimizer(list(orthogonal.values()), what)
    rest = make_euclidean_optimizer(list(euclidean.values()), what.optim)
    objective = Objective(what.loss, systems.get(what.system).losses)
    images, labels = torch.rand(args.batch, *shape), torch.arange(args.batch) % classes

    def passes() -> None:
        network.zero_grad(set_to_none=True)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
        objective.of(network, images, labels, 0.5, autocast).backward()

    predicted: dict[str, float] = {}
    found: dict[str, list[float]] = {"passes": [], "manifold": [], "step": []}
    for _ in range(args.rounds):  # the rates are measured between the steps that they are to predict
        row = planning.plan(what, gpu="cpu")
        for key, value in row["activations"]["keep"]["seconds"].items():
            predicted[key] = min(value, predicted.get(key, value))
        for _ in range(args.repeats):
            started = planning.CLOCK()
            passes()
            after_passes = planning.CLOCK()
            manifold.step()
            after_manifold = planning.CLOCK()
            rest.step()
            found["passes"].append(after_passes - started)
            found["manifold"].append(after_manifold - after_passes)
            found["step"].append(planning.CLOCK() - started)
    fastest = {key: min(values) for key, values in found.items()}
    with Meter() as meter:
        passes()
    fixed = sum(row["bytes"][key] for key in ("weights", "moments", "average"))
    peak = row["activations"]["keep"]["memory"] - fixed
    return {
        "precision": precision,
        "predicted_seconds": {key: round(predicted[key], 5) for key in fastest},
        "measured_seconds": {key: round(value, 5) for key, value in fastest.items()},
        "slowest_to_fastest": round(max(found["step"]) / fastest["step"], 3),
        "predicted_bytes": round(peak),
        "measured_bytes": meter.peak,
        "error": {
            **{key: round(predicted[key] / value - 1, 4) for key, value in fastest.items()},
            "bytes": round(peak / meter.peak - 1, 4),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="cifar10-cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, by the processor's time")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
        planning.CLOCK = time.process_time
    torch.manual_seed(0)
    rows = [measured(args, precision) for precision in args.precisions]
    what = f"lipnext plan against a step of {args.experiment}, batch {args.batch}, on this machine"
    report(
        {"what": what, "clock": "processor" if args.cpu_time else "wall", "rows": rows}, args.json, args.out
    )


if __name__ == "__main__":
    main()
