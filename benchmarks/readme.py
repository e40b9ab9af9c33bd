"""Write the README's table and picture from the JSON files under benchmarks/results.

    python benchmarks/readme.py            # writes
    python benchmarks/readme.py --check    # exit 1 if the README says something else
"""

import argparse
import json
import sys
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results: written by benchmarks/readme.py -->", "<!-- /results -->"
ROWS = ("digits", "fashion-mnist-cpu", "cifar10-cpu", "cifar10-cpu-robust")
BASELINES = ("digits", "fashion-mnist-cpu", "cifar10-cpu")
EPS = ("36/255", "72/255", "108/255")


def table() -> str:
    """The Markdown table, numbers rounded down."""
    head = "| model | seeds | minutes, 2 cores | clean | " + " | ".join(f"CRA {e}" for e in EPS) + " | ACR |"
    lines = [head, "|" + "---|" * 8]
    for name in ROWS:
        runs = load(f"{name}-seed*.json")
        if runs:
            minutes = f"{max(r['minutes'] for r in runs):.1f}"
            lines.append(row(f"`{name}`", str(len(runs)), minutes, runs))
    for name in BASELINES:
        runs = load(f"nearest-neighbour-{name}.json")
        if runs:
            lines.append(row(f"nearest neighbour, data of `{name}`", "-", "-", runs))
    return "\n".join(lines)


def row(name: str, seeds: str, minutes: str, runs: list[dict[str, Any]]) -> str:
    means = [mean(runs, "clean"), *(sum(r["cra"][e] for r in runs) / len(runs) for e in EPS), mean(runs, "acr")]
    return " | ".join([f"| {name}", seeds, minutes, *(floor(m) for m in means)]) + " |"


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return sum(r[key] for r in runs) / len(runs)


def floor(value: float) -> str:
    return str(Decimal(value).quantize(Decimal("0.001"), ROUND_FLOOR))


def load(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def rendered() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


def draw(path: Path) -> None:
    """Certified accuracy against radius: one curve a model, dashed for the nearest-neighbour certificate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    colours = {"digits": "C0", "fashion-mnist-cpu": "C1", "cifar10-cpu": "C2", "cifar10-cpu-robust": "C3"}
    for name in ROWS:
        for result in load(f"{name}-seed0.json"):
            axes.plot(*points(result), color=colours[name], label=name)
    for name in BASELINES:
        for result in load(f"nearest-neighbour-{name}.json"):
            axes.plot(*points(result), "--", color=colours[name], alpha=0.6, label=f"nearest neighbour, {name}")
    for n in (36, 72, 108):
        axes.axvline(n / 255, color="0.8", linewidth=0.8, zorder=0)
        axes.text(n / 255, 1.01, f"{n}/255", ha="center", fontsize=8, color="0.4", transform=axes.get_xaxis_transform())
    axes.set(xlabel="l2 radius, pixels in [0, 1]", ylabel="certified accuracy, test part", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def points(result: dict[str, Any]) -> tuple[list[float], list[float]]:
    return result["curve"]["radius"], result["curve"]["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = rendered()
    if args.check:
        sys.exit(0 if text == (ROOT / "README.md").read_text(encoding="utf-8") else 1)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    draw(ROOT / "docs" / "certified-accuracy.png")


if __name__ == "__main__":
    main()
