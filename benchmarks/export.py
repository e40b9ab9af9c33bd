"""Packaged models as ONNX in onnxruntime, on whole test parts, against the certificate.

    python benchmarks/export.py digits fashion-mnist DIR cifar10-cpu DIR

For each model and type: images whose label is not the certificate's, the largest difference of a margin beside its proved
bound, and how far radii that the snippet of docs/export.md computes lie above and below. Writes benchmarks/results/export.json.
"""

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from timing import environment

from lipnext import runs
from lipnext.deployment.locate import packaged

ROOT = Path(__file__).resolve().parent.parent
BATCH = 500


def snippet() -> Any:
    """The function that the Python block of the page defines."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names["certify"]


@torch.no_grad()
def row(name: str, data: str | None, dtype: str, folder: Path) -> dict[str, Any]:
    path = str(folder / f"{name}-{dtype}.onnx")
    size = runs.export(name, "onnx", path, dtype=dtype)["bytes"]
    bound = np.array(json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))["error"]["real"])
    session, certify = onnxruntime.InferenceSession(path), snippet()
    network = runs.load(name).net.double()
    certificate, test = runs.certify_run(name, data)
    labels, radii, differences = [], [], []
    for start in range(0, len(test), BATCH):
        images = test.float_images(slice(start, start + BATCH))
        label, radius = certify(path, images.numpy())
        labels.append(label)
        radii.append(radius)
        logits = session.run(None, {"images": images.numpy().astype(dtype)})[0].astype(np.float64)
        off = logits - network(images.double()).numpy()
        differences.append((off.max(1) - off.min(1)).max())  # the largest over all pairs of classes
    difference = np.concatenate(radii) - certificate.radius.numpy()
    return {
        "model": name,
        "dtype": dtype,
        "images": len(test),
        "other_labels": int((np.concatenate(labels) != certificate.label.numpy()).sum()),
        "margin_difference": float(max(differences)),
        "margin_bound": float(bound.max()),
        "radius_above": float(difference.max()),
        "radius_below": float(-difference.min()),
        "bytes": size,
    }


def main() -> None:
    wanted: dict[str, str | None] = {}
    for word in sys.argv[1:]:
        if word in packaged():
            wanted[word] = None
        elif wanted:
            wanted[list(wanted)[-1]] = word
    if not wanted:
        raise SystemExit(__doc__)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, data in wanted.items():
            for dtype in ("float64", "float32"):
                rows.append(row(name, data, dtype, Path(folder)))
                print(rows[-1], flush=True)
    document = {"rows": rows, "onnxruntime": onnxruntime.__version__, **environment()}
    file = ROOT / "benchmarks" / "results" / "export.json"
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
