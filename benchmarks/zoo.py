"""Make a packaged model from a finished run: weights bit for bit the same, proved and certified again.

    python benchmarks/zoo.py NAME RUN [--data DIR] --result benchmarks/results/digits-seed0.json

RUN may be the packaged model itself, to prove it again by a newer version. The command and the notes come from the result file
that `benchmarks/quality.py` wrote; its numbers must be the measured ones.
"""

import argparse
import json
from pathlib import Path

from lipnext import runs
from lipnext.core.eps import parse_eps_list
from lipnext.deployment.locate import ZOO
from lipnext.deployment.publish import read_result, stage, write_result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("run", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    committed = json.loads(args.result.read_text(encoding="utf-8"))
    folder = ZOO / args.name
    stage(args.run, folder)
    certificate, test = runs.certify_run(folder, args.data)
    measured = certificate.summary(test.labels, parse_eps_list(committed["cra"]))
    for key in ("n", "clean", "cra"):
        if committed[key] != measured[key]:
            raise SystemExit(f"{key} is {measured[key]}, {args.result} says {committed[key]}")
    told = {key: committed[key] for key in ("command", "notes", "commit", "device")}
    write_result(folder, {**read_result(folder), **measured, **told})
    print(f"{folder}: clean {measured['clean']}, {measured['cra']}, ACR {measured['acr']}")


if __name__ == "__main__":
    main()
