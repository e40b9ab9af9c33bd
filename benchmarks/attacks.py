"""Attack the whole test part of finished runs with every attack, and put attacked accuracy beside certified accuracy.

    python benchmarks/attacks.py runs/digits-seed0 runs/fashion-mnist-cpu-seed0 --json --out benchmarks/results/attacks.json

The attacks search in float32; a success is what the float64 network shows at a distance measured in float64. Balls that can
change no count are left out. `--exhaustive` searches in float64, in every ball, for more steps.

Finished batches are kept in RUN/attacks.jsonl, or in FOLDER/NAME.jsonl with `--batches FOLDER`; the same command goes on where
it was interrupted. Exit code 5 where a label was changed within a certified radius: there must be none.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from timing import environment

from lipnext import runs
from lipnext.auditing.runner import STANDARD, run_suite
from lipnext.core.errors import ViolationError
from lipnext.core.network import LipschitzNetwork
from lipnext.deployment.bundle import load_experiment
from lipnext.training.progress import reporter

STEPS, EXHAUSTIVE_STEPS = 25, 100


def attack(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row: accuracies at each eps from below and from above, and the successes inside a radius."""
    start, busy = time.perf_counter(), time.process_time()
    data, samples, device = args.data, args.samples, args.device
    certificate, test = runs.certify_run(folder, data, semantics="real", arithmetic="float64")
    n = min(samples or len(test), len(test))
    label, radius, truth = certificate.label[:n], certificate.radius[:n], test.labels[:n]
    net = runs.load(folder).net
    assert isinstance(net, LipschitzNetwork)
    exact = net.materialise().double().requires_grad_(False).to(device)
    searched = net.materialise().float().requires_grad_(False).to(device)
    names = [name.strip() for name in args.attacks.split(",") if name.strip()]
    names = names or [*STANDARD, *(["apgd-dlr"] if len(test.classes) > 2 else [])]
    steps = args.steps or (EXHAUSTIVE_STEPS if args.exhaustive else STEPS)
    batches = args.batches / f"{folder.name}.jsonl" if args.batches else folder / "attacks.jsonl"
    batches.parent.mkdir(parents=True, exist_ok=True)
    eps = list(load_experiment(folder).certify.eps)
    with reporter(f"attacking {folder.name}", n) as progress:
        found = run_suite(
            exact,
            test.float_images(slice(n)).double().to(device),
            label.to(device),
            batches,
            model_sha256=certificate.model_sha256,
            attacks=names,
            eps=eps,
            radius=radius.to(device),
            steps=steps,
            batch_size=args.batch_size,
            truth=None if args.exhaustive else truth.to(device),
            searched=None if args.exhaustive else searched,
            progress=progress.advance,
        )
    right = label == truth
    known = (radius > 0) & found.distance.isfinite()
    cra = {name: int((right & certificate.certified_at(name)[:n]).sum()) / n for name in eps}
    attacked = {name: found.accuracy_at(name, truth) for name in eps}
    return {
        "run": folder.name,
        "n": n,
        "clean": int(right.sum()) / n,
        "cra": cra,
        "attacked": attacked,
        "gap": {name: attacked[name] - cra[name] for name in eps},
        "inside": len(found.inside),
        "closest": (found.distance[known] / radius[known]).min().item() if known.any() else None,
        "median_ratio": (found.distance[known] / radius[known]).median().item() if known.any() else None,
        "closest_by": {name: found.attack.count(name) for name in set(found.attack) - {None}},
        "model_sha256": certificate.model_sha256,
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "cpu_minutes": round((time.process_time() - busy) / 60, 2),
        "attack_device": device,
        "attacks": names,
        "steps": steps,
        "search": "float64" if args.exhaustive else "float32",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", help="folder with the data set; default each run's own")
    parser.add_argument("--attacks", default="", help="names; default all that need no extra")
    parser.add_argument("--samples", type=int, help="the first images of the test part; default all")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--steps", type=int, help="of each attack")
    parser.add_argument("--exhaustive", action="store_true", help="float64, every ball, more steps")
    parser.add_argument("--batches", type=Path, help="folder for finished batches; default each run's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = [attack(folder, args) for folder in args.runs]
    document = {"runs": rows, "inside": sum(row["inside"] for row in rows), **environment()}
    if args.out:
        Path(args.out).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        for row in rows:
            print(
                f"{row['run']}: {row['n']} images, clean {row['clean']:.4f}, inside a radius {row['inside']}"
            )
            for name in row["cra"]:
                print(
                    f"  {name}: certified {row['cra'][name]:.4f}, attacked {row['attacked'][name]:.4f}, "
                    f"gap {row['gap'][name]:.4f}"
                )
    if document["inside"]:
        sys.exit(ViolationError.exit_code)


if __name__ == "__main__":
    main()
