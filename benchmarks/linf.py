"""Radii in the l-infinity norm: what trained runs certify, by which certificate, and what attacks find.

    lipnext train sortnet/fashion-mnist-cpu --data DIR --out RUN      (and the other runs)
    python benchmarks/linf.py RUN ... --samples 500 --json --out benchmarks/results/linf.json

`cra` is what a run certifies, `cra_global` what the constants of the pairs of classes certify alone (for SortNet half the
margin), `below_global` how many radii are smaller than by those: none. Attacks search in the norm of the certificate on test
images drawn at random; `violations` counts successes inside a radius, and claims that a recount refutes. `measure` is the
matrix measure of the stored operator of NEMON, rounded up.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from timing import report

from lipnext import runs
from lipnext.core.eps import parse_eps_list


def measure(run: str, samples: int) -> dict[str, Any]:
    """One run: its certificates of the whole test part, and an audit of some images."""
    result = json.loads((Path(run) / "result.json").read_text(encoding="utf-8"))
    certificate, test = runs.certify_run(run)
    stated = json.loads((Path(run) / "certificate.json").read_text(encoding="utf-8"))
    constants = torch.tensor(
        stated["constants" if "constants" in stated else "steepness"], dtype=torch.float64
    )
    own = (certificate.margin - certificate.slack) / constants[certificate.label, certificate.rival]
    by_constants = own.clamp_min(0)
    right = certificate.label == test.labels
    eps = parse_eps_list(",".join(result["cra"]))
    found = runs.audit(run, samples=samples)
    return {
        **{key: result[key] for key in ("system", "preset", "seed", "epochs", "minutes", "parameters", "n")},
        **{key: result[key] for key in ("clean", "cra", "acr", "norm", "semantics", "model_sha256")},
        "cra_global": {
            name: (right & (by_constants >= float(size))).double().mean().item() for name, size in eps.items()
        },
        # Rounding of this line, not of the certificate: each side is off by a few 1e-16.
        "below_global": int((certificate.radius < by_constants.clamp(max=0.5) * (1 - 1e-12)).sum()),
        "measure": stated.get("implicit", {}).get("measure"),
        "audit": {
            "samples": len(found.index),
            "clean": found.clean,
            "cra": found.cra,
            "attacked": found.attacked,
            "violations": len(found.violations),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--samples", type=int, default=500, help="attacked images of each run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = [measure(run, args.samples) for run in args.runs]
    report({"what": "radii in the l-infinity norm", "runs": rows}, args.json, args.out)


if __name__ == "__main__":
    main()
