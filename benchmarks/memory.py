"""What `train.activations` stores for the backward pass, the high-water mark and the time of a step, by depth.

    python benchmarks/memory.py --json

`stored_bytes`: tensors made by the forward pass that are alive after it. `peak_bytes`: of all tensors made in a step, without
the gradients of weights that are handed over. `seconds`: forward and backward pass, no optimiser, medians of alternating runs.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from timing import alternate, ratio, report
from torch import Tensor

from lipnext import losses
from lipnext.core.experiment import TrainSpec
from lipnext.core.network import LipschitzNetwork
from lipnext.planning import MODES, Meter
from lipnext.systems.lipnext import build
from lipnext.training.activations import stored_activations


def step(
    network: LipschitzNetwork, spec: TrainSpec, images: Tensor, labels: Tensor, bf16: bool,
    between: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    network.zero_grad()
    with stored_activations(network, spec):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = network(images)
        loss = losses.cross_entropy(losses.emma(logits, labels, network.head.distances(), 0.14), labels)
        between()
        loss.backward()


def hand_over(meter: Meter, parameter: Tensor) -> None:
    """From here on the gradient belongs to the optimiser."""
    assert parameter.grad is not None
    meter.alive -= parameter.grad.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--side", type=int, default=32, help="pixels; tokens are (side / 4)^2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = torch.rand(args.batch, 3, args.side, args.side), torch.randint(0, 10, (args.batch,))
    rows = []
    for depth in args.depths:
        network: LipschitzNetwork = build(
            input_shape=(3, args.side, args.side), classes=10, width=args.width, depth=depth, patch=4
        )
        actions = {
            mode: partial(step, network, TrainSpec(activations=mode), images, labels, args.bf16)
            for mode in MODES
        }
        seconds = alternate(actions, args.repeats)
        for mode, action in actions.items():
            network.zero_grad()
            stored: list[int] = []
            with Meter() as meter:
                hooks = [
                    p.register_post_accumulate_grad_hook(partial(hand_over, meter))
                    for p in network.parameters()
                ]
                action(between=lambda meter=meter, stored=stored: stored.append(meter.alive))
            for hook in hooks:
                hook.remove()
            rows.append(
                {
                    "depth": depth,
                    "activations": mode,
                    "stored_bytes": stored[0],
                    "peak_bytes": meter.peak,
                    "seconds": round(statistics.median(seconds[mode]), 4),
                    "ratio_to_keep": round(ratio(seconds, mode, "keep"), 3),
                }
            )
    ends = {
        key: {
            mode: round(
                next(r[key] for r in rows[::-1] if r["activations"] == mode)
                / next(r[key] for r in rows if r["activations"] == mode),
                3,
            )
            for mode in MODES
        }
        for key in ("stored_bytes", "peak_bytes")
    }
    report(
        {
            "what": f"C={args.width}, {(args.side // 4) ** 2} tokens, batch {args.batch}",
            "dtype": "bfloat16" if args.bf16 else "float32",
            "growth_from_first_to_last_depth": ends,
            "rows": rows,
        },
        args.json,
        args.out,
    )


if __name__ == "__main__":
    main()
