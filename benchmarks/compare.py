"""All l2 systems at equal training time on one data set, certified, attacked, with the nearest-neighbour row below.

    python benchmarks/compare.py fashion-mnist --data /usr/share/datasets/fashion-mnist
    python benchmarks/compare.py cifar10 --data DIR

Trains what is not trained yet under runs/compare (5 minutes each; a second call goes on), then writes
benchmarks/results/compare-NAME.json. Learning rates were chosen on validation parts before.
"""

import argparse
import json

from quality import RESULTS
from timing import environment

from lipnext.comparison import compare

SYSTEMS = {
    "fashion-mnist": [
        "lipnext/fashion-mnist-cpu",
        "lipnext/fashion-mnist-cpu-robust",
        "liresnet/fashion-mnist-cpu",
        "bronet/fashion-mnist-cpu",
        "cll/fashion-mnist-cpu",
        "local-lip/fashion-mnist-cpu",
        "soc/fashion-mnist-cpu-crc",
        "aol/fashion-mnist-cpu",
        "cpl/fashion-mnist-cpu",
        "sll/fashion-mnist-cpu",
    ],
    "cifar10": [
        "lipnext/cifar10-cpu",
        "lipnext/cifar10-cpu-robust",
        "liresnet/cifar10-cpu",
        "bronet/cifar10-cpu",
        "cll/cifar10-cpu",
        "local-lip/cifar10-cpu",
        "soc/cifar10-cpu-crc",
        "aol/cifar10-cpu",
        "cpl/cifar10-cpu",
        "sll/cifar10-cpu",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SYSTEMS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--attacked", type=int, default=100)
    parser.add_argument("--folder", default="runs/compare")
    args = parser.parse_args()
    document = compare(
        SYSTEMS[args.name],
        data=args.data,
        minutes=args.minutes,
        attacked=args.attacked,
        folder=args.folder,
    )
    path = RESULTS / f"compare-{args.name}.json"
    path.write_text(
        json.dumps({"data": args.name, **document, **environment()}, indent=2) + "\n", encoding="utf-8"
    )
    (table,) = document["tables"]
    for row in table["rows"]:
        print(row["name"], *(f"{share:.4f}" for share in (row["clean"], *row["cra"].values(), row["acr"])))


if __name__ == "__main__":
    main()
