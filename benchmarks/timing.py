"""Timing shared by the benchmarks: alternating runs in one process, so that ratios survive a busy machine."""

import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def alternate(
    actions: dict[str, Callable[[], object]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Run all actions in turn, `repeats` times after `warmup` rounds; return seconds by name."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(warmup + repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the ratios of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def environment() -> dict[str, Any]:
    """What the numbers depend on, and the command as it was typed, with no machine's paths in it."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
    }


def report(document: dict[str, Any], as_json: bool, out: str | None) -> None:
    """Print the document, and write it where asked."""
    text = json.dumps({**document, **environment()}, indent=2)
    if as_json or not out:
        print(text)
    if out:
        Path(out).write_text(text + "\n", encoding="utf-8")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
