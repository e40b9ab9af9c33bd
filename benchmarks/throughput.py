"""How fast a run was, how much of the device's matrix rate that is, and how soon it was how accurate.

    python benchmarks/throughput.py runs/cifar10-gpu --json

Reads the experiment, log and result of a run, and must run on the device that trained it, whose matrix rate it measures:
the three products of a layer (forward, gradients of the input and of the weight), in the dtype of the training, on the
shapes of the network. What a step computes is counted by `lipnext plan`; what is computed twice to save memory counts once.
Times are those of the log: batches and steps, without validation and checkpoints. Accuracies are estimates on the
validation part.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from timing import report

from lipnext.core.experiment import Experiment
from lipnext.planning import plan
from lipnext.training.log import LOG, epochs
from lipnext.training.loop import resolve_device

LEVELS = (0.5, 0.55, 0.6, 0.62, 0.64, 0.66, 0.68, 0.7, 0.712)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def matrix_rate(rows: int, width: int, dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Flop/s of the three products of a layer with `rows` tokens of `width` channels; the fastest of some tries."""
    x = torch.randn(rows, width, device=device, dtype=dtype)
    w = torch.randn(width, width, device=device, dtype=dtype)
    seconds = []
    for _ in range(2 + repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(3):
            x @ w.T, x @ w, x.T @ x
        synchronize(device)
        seconds.append((time.perf_counter() - start) / 3)
    return 3 * 2 * rows * width * width / min(seconds[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_to(log: list[dict[str, Any]], eps: str) -> dict[str, float | None]:
    """Seconds until the validation estimate first reached each level of CRA at `eps`; None where it never did."""
    looked = [line for line in log if "validation_estimate" in line]
    return {
        str(level): next(
            (line["seconds"] for line in looked if line["validation_estimate"]["cra"][eps] >= level), None
        )
        for level in LEVELS
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="per image: (side / patch)^2")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    experiment = Experiment.from_yaml(args.run / "experiment.yaml")
    result = json.loads((args.run / "result.json").read_text(encoding="utf-8"))
    log, spec = epochs(args.run / LOG), experiment.train
    planned = plan(experiment.override(["train.activations=keep"]))
    flops = planned["flops_per_image"] + planned["manifold_flops"] / spec.batch_size
    rows = args.tokens * (spec.batch_size // spec.accumulate)
    rate = matrix_rate(
        rows, int(experiment.model["width"]), DTYPES[spec.precision], resolve_device(spec.device)
    )
    eps = experiment.certify.eps[0]
    report(
        {
            "what": f"speed of {experiment.preset}, {spec.epochs} epochs, {spec.precision}",
            "images_per_second": result["images_per_second"],
            "flops_per_image": flops,
            "matrix_rate_tflops": round(rate / 1e12, 3),
            "share_of_matrix_rate": round(result["images_per_second"] * flops / rate, 4),
            "minutes": result["minutes"],
            "clean": result["clean"],
            "cra": result["cra"],
            "seconds_to_validation_cra": {"eps": eps, **time_to(log, eps)},
        },
        args.json,
        args.out,
    )


if __name__ == "__main__":
    main()
