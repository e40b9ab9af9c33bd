"""What a certificate costs: time against a plain forward pass, and radius against exact arithmetic.

    python benchmarks/certify.py runs/fashion-mnist-cpu --json --out benchmarks/results/certify.json

`ratio_to_forward`: certifying the test part in float64, proof of the bounds included, over a float32 forward pass with the
same batch size. `radius_lost`: by preset, with the weights of the start of training, the largest share of a radius that the
proved constant and the rounding errors take, `1 - r / (margin / ||w_y - w_j||)`, over images with a radius above 0.01.
"""

import argparse
import statistics
from pathlib import Path

import torch
from timing import alternate, ratio, report

from lipnext import runs, systems
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.seed import seeded
from lipnext.core.system import System
from lipnext.data.dataset import load as load_data
from lipnext.deployment.bundle import load_experiment, polish

PRESETS = {
    "digits": (1, 8, 8),
    "fashion-mnist-cpu": (1, 28, 28),
    "cifar10-cpu": (3, 32, 32),
    "cifar10": (3, 32, 32),
}
IMAGES = 64


def speed(run: Path, batch_size: int, repeats: int) -> dict[str, object]:
    """Time `certify` and the forward pass on the run's test part."""
    model = runs.load(run)
    images = load_data(load_experiment(run).data).test.float_images()

    def forward() -> None:
        with torch.no_grad():
            for part in images.split(batch_size):
                model.net(part)

    def certify() -> None:
        model._proved = None  # the proof is part of what is timed
        model.certify(images, batch_size)

    seconds = alternate({"forward": forward, "certify": certify}, repeats, warmup=1)
    return {
        "images": len(images),
        "batch_size": batch_size,
        "ratio_to_forward": round(ratio(seconds, "certify", "forward"), 3),
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
    }


def radius_lost(system: System, preset: str, shape: tuple[int, int, int]) -> dict[str, float | str]:
    """Compare radii with those of a network whose constant is exactly 1 and that is evaluated without rounding."""
    with seeded(0):
        network = polish(system.build(input_shape=shape, classes=10, **system.presets[preset]))
        images = torch.rand(IMAGES, *shape)
    found: dict[str, float | str] = {"preset": preset}
    for semantics in ("real", "deployed"):
        certifier = MarginCertifier(network, semantics)
        certificate = certifier(images)
        with torch.no_grad():
            logits = certifier.network(images.double())
        margins = logits.gather(1, certificate.label[:, None]) - logits
        ratio_ = margins / certifier.evidence.distances[certificate.label]
        ideal = ratio_.scatter(1, certificate.label[:, None], float("inf")).min(1).values
        sure = (
            ideal > 0.01
        )  # the margins of an untrained network are small; its rounding errors are those of a trained one
        if not bool(sure.any()):
            raise SystemExit(f"{preset}: no image has a radius above 0.01")
        found[semantics] = (1 - certificate.radius / ideal)[sure].max().item()
        found["lipschitz"] = certifier.evidence.body.value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    system = systems.get("lipnext")
    report(
        {
            "what": "certify in float64 against a float32 forward pass, and the share of a radius that is lost",
            **speed(args.run, args.batch_size, args.repeats),
            "radius_lost": [radius_lost(system, preset, shape) for preset, shape in PRESETS.items()],
        },
        args.json,
        args.out,
    )


if __name__ == "__main__":
    main()
