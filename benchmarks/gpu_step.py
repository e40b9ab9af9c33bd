"""A training step of LipNeXt on one GPU: utilisation, share of the manifold step, memory; and certification in float64.

    python benchmarks/gpu_step.py --json                                  # widths 1024, 2048 and 4096
    python benchmarks/gpu_step.py --compile --largest --json              # with torch.compile; the largest width that trains
    python benchmarks/gpu_step.py --device cpu --tiny --json              # dry run: everything once, in small

The network, loss and optimisers are those of the experiment `cifar10` (32 blocks, 256 tokens), on random images. `utilisation`:
flops of all products of a step, as `lipnext plan` counts them, over its seconds and `matrix_rate`; that rate is measured on the
step's own shape, batch x tokens by width by width, in turn with the step. `manifold_share`: the orthogonal optimiser's part of
the step. `bytes`: the high-water mark of a step beside the planned one; of the whole process on a CPU. `certify`: images per
second in float64, after the proof of the bounds, which is timed apart. A width that does not fit is a row with `fits: false`.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from step import peak_memory_mib
from timing import alternate, ratio, report
from torch import nn

from lipnext import systems
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.experiment import Experiment
from lipnext.core.network import LipschitzNetwork
from lipnext.deployment.bundle import polish
from lipnext.optim.groups import split_parameters
from lipnext.planning import plan
from lipnext.training.activations import stored_activations
from lipnext.training.loop import make_euclidean_optimizer, make_orthogonal_optimizer
from lipnext.training.objective import Objective

SHAPE, CLASSES = (3, 32, 32), 10


class Step:
    """The parts of a training step, as the training loop takes them."""

    def __init__(self, experiment: Experiment, device: torch.device, compiled: bool) -> None:
        self.experiment, self.device = experiment, device
        self.network: LipschitzNetwork = systems.build_network(experiment, SHAPE, CLASSES).to(device).train()
        batch = experiment.train.batch_size
        self.images = torch.rand(batch, *SHAPE, device=device)
        self.labels = torch.randint(CLASSES, (batch,), device=device)
        orthogonal, euclidean = split_parameters(self.network)
        self.manifold = make_orthogonal_optimizer(list(orthogonal.values()), experiment)
        self.rest = make_euclidean_optimizer(list(euclidean.values()), experiment.optim)
        self.objective = Objective(experiment.loss, systems.get(experiment.system).losses)
        self.positions = (SHAPE[1] // int(experiment.model["patch"])) ** 2
        if compiled:
            for layer in self.network.body:
                layer.compile()

    def passes(self) -> None:
        """Forward, loss and backward; leaves the gradients."""
        self.network.zero_grad(set_to_none=True)
        half = self.experiment.train.precision == "bfloat16"
        with stored_activations(self.network, self.experiment.train):
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=half)
            self.objective.of(self.network, self.images, self.labels, 0.5, autocast).backward()

    def whole(self) -> None:
        """All of it."""
        self.passes()
        self.manifold.step()
        self.rest.step()


def matrices(step: Step) -> tuple[Callable[[], object], int]:
    """A product of the step's own shape, repeated until it takes a while, and its flops."""
    width, tokens = int(step.experiment.model["width"]), len(step.images) * step.positions
    dtype = torch.bfloat16 if step.experiment.train.precision == "bfloat16" else torch.float32
    x = torch.randn(tokens, width, dtype=dtype, device=step.device)
    w, y = torch.randn(width, width, dtype=dtype, device=step.device), torch.empty_like(x)
    count = 6 * int(step.experiment.model["depth"])  # as many as the blocks need

    def run() -> None:
        for _ in range(count):
            torch.mm(x, w, out=y)

    return run, count * 2 * tokens * width * width


def high_water_mark(step: Step) -> int | None:
    """Bytes: of one step on a GPU, of this process so far on a CPU."""
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
        step.whole()
        torch.cuda.synchronize(step.device)
        return int(torch.cuda.max_memory_allocated(step.device))
    step.whole()
    mebibytes = peak_memory_mib()
    return None if mebibytes is None else int(mebibytes * 2**20)


def certification(network: nn.Module, batch: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Images per second in float64, and the seconds that the proof of the bounds takes before."""
    network = polish(network).eval()
    images = torch.rand(batch, *SHAPE, device=device)
    started = time.perf_counter()
    certifier = MarginCertifier(network, "real")
    certifier(images[:1])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    proving = time.perf_counter() - started
    seconds = alternate({"certify": lambda: certifier(images)}, repeats, warmup=1)["certify"]
    return {
        "images_per_second": round(batch / statistics.median(seconds), 2),
        "proving_seconds": round(proving, 3),
    }


def measured(args: argparse.Namespace, width: int, device: torch.device) -> dict[str, Any]:
    """One row of the document."""
    what = experiment(args, width)
    planned = plan(what)
    row = planned["activations"][what.train.activations]
    flops = row["flops"] + planned["manifold_flops"]
    found: dict[str, Any] = {"width": width, "parameters": planned["parameters"], "flops": flops}
    step = None
    try:
        step = Step(what, device, args.compile)
        step.whole()  # makes the optimisers' state, and compiles
        bytes_ = high_water_mark(step)
        product, product_flops = matrices(step)
        seconds = alternate(
            {"step": step.whole, "matrices": product, "passes": step.passes, "manifold": step.manifold.step},
            args.repeats,
        )
        del product
        # per flop, neighbouring runs against each other
        utilisation = flops / product_flops / ratio(seconds, "step", "matrices")
        found |= {
            "fits": True,
            "matrix_rate": round(product_flops / statistics.median(seconds["matrices"])),
            "utilisation": round(utilisation, 4),
            "manifold_share": round(ratio(seconds, "manifold", "step"), 4),
            "images_per_second": round(args.batch / statistics.median(seconds["step"]), 2),
            "seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
            "bytes": {"measured": bytes_, "planned": round(row["memory"])},
        }
        network = step.network
        step = None  # the optimisers' state makes room for weights in float64
        found["certify"] = certification(network, args.batch, device, max(1, args.repeats // 3))
    except torch.OutOfMemoryError:
        found |= {"fits": "matrix_rate" in found}
    finally:
        del step
        forget(device)
    return found


def trains(args: argparse.Namespace, width: int, device: torch.device) -> bool:
    """Whether two steps fit: the first one makes the optimisers' state."""
    step = None
    try:
        step = Step(experiment(args, width), device, compiled=False)
        step.whole()
        step.whole()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        del step
        forget(device)
    return True


def largest(args: argparse.Namespace, device: torch.device) -> int:
    """The largest multiple of `--grain` up to `--limit` that trains, 0 if none does; by bisection."""
    low, high = 0, args.limit // args.grain + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trains(args, middle * args.grain, device) else (low, middle)
    return low * args.grain


def experiment(args: argparse.Namespace, width: int) -> Experiment:
    changes = [
        f"model.width={width}",
        f"model.depth={args.depth}",
        f"train.batch_size={args.batch}",
        f"train.precision={args.precision}",
        f"train.activations={args.activations}",
    ]
    return systems.experiment("lipnext/cifar10").override(changes)


def forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--activations", choices=("keep", "checkpoint", "reverse"), default="keep")
    parser.add_argument("--compile", action="store_true", help="torch.compile every layer of the body")
    parser.add_argument("--largest", action="store_true", help="search the largest width that trains")
    parser.add_argument("--limit", type=int, default=16384, help="of that search")
    parser.add_argument("--grain", type=int, default=512, help="of that search")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.tiny:
        args.widths, args.depth, args.batch, args.repeats = [32, 48], 2, 8, 2
        args.limit, args.grain = 64, 32
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_step: there is no GPU here; for a dry run take --device cpu --tiny")
    torch.manual_seed(0)
    document: dict[str, Any] = {
        "what": f"training step of LipNeXt, L={args.depth}, batch {args.batch}, on one device",
        "dtype": args.precision,
        "activations": args.activations,
        "compiled": args.compile,
        "rows": [measured(args, width, device) for width in args.widths],
    }
    if args.largest:
        document["largest_width"] = largest(args, device)
    report(document, args.json, args.out)


if __name__ == "__main__":
    main()
