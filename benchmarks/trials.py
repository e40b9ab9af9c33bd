"""One training as a trial: in a process of its own on one thread, found finished when asked for again."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# A small network that trains in a minute or two; comparisons between settings, not records.
SMALL = ("model.width=128", "model.depth=6", "model.patch=4", "train.threads=1")


def trial(base: str, data: str, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train `base` with `options` on top of `SMALL`; return the test result and the validation estimates by epoch."""
    if not (folder / "result.json").is_file():
        command = [sys.executable, "-m", "lipnext", "train", base, "--data", data, "--out", str(folder)]
        for option in (*SMALL, *options):
            command += ["--set", option]
        quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = ("clean", "cra", "acr", "minutes", "preset", "epochs", "precision", "seed")
    return {
        **{key: result[key] for key in keys},
        "validation": [event["validation_estimate"] for event in events if event["event"] == "epoch"],
    }


def without_test(found: dict[str, Any]) -> dict[str, Any]:
    """Drop the test figures of a trial that only served a choice."""
    return {key: value for key, value in found.items() if key not in ("clean", "cra", "acr")}
