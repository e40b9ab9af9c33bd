"""The nearest-neighbour certificate: the row that no system may fall below.

python benchmarks/nearest_neighbour.py fashion-mnist-cpu --data DIR
"""

import argparse
import json

from quality import RESULTS, curve
from timing import environment

from lipnext import runs
from lipnext.certificates.nearest_neighbour import NearestNeighbour
from lipnext.core.eps import parse_eps_list
from lipnext.data.dataset import load


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="whose data set is taken")
    parser.add_argument("--data")
    args = parser.parse_args()
    experiment = runs.resolve(args.experiment, args.data)
    splits = load(experiment.data)
    train, test = splits.train, splits.test
    certificate = NearestNeighbour(train.images, train.labels, len(train.classes)).certify(test.images)
    document = {
        "preset": f"nearest-neighbour-{experiment.preset}",
        "system": "nearest neighbour",
        **certificate.summary(test.labels, parse_eps_list(experiment.certify.eps)),
        "curve": curve(certificate, test.labels),
        **environment(),
    }
    path = RESULTS / f"nearest-neighbour-{experiment.preset}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: document[k] for k in ("clean", "cra", "acr")}))


if __name__ == "__main__":
    main()
