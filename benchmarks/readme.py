"""Write the tables of README.md and of the pages under docs/ and the picture from the JSON files under benchmarks/results.

    python benchmarks/readme.py            # writes
    python benchmarks/readme.py --check    # exit 1 if a page says something else

A table stands between `<!-- table NAME -->` and `<!-- /table -->`.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import numpy as np

from lipnext.deployment.figures import Curve, certified_accuracy, save

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
ROWS = (
    "digits",
    "fashion-mnist-cpu",
    "fashion-mnist-cpu-long",
    "cifar10-cpu",
    "cifar10-cpu-robust",
    "cifar10-cpu-long",
)
BASELINES = ("digits", "fashion-mnist-cpu", "cifar10-cpu")
EPS = ("36/255", "72/255", "108/255")


def results_table() -> str:
    """Every preset that was trained here, numbers rounded down, and the nearest-neighbour certificate below."""
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
    means = [
        mean(runs, "clean"),
        *(sum(r["cra"][e] for r in runs) / len(runs) for e in EPS),
        mean(runs, "acr"),
    ]
    return " | ".join([f"| {name}", seeds, minutes, *(floor(m) for m in means)]) + " |"


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return sum(r[key] for r in runs) / len(runs)


def floor(value: float) -> str:
    return str(Decimal(repr(value)).quantize(Decimal("0.001"), ROUND_FLOOR))  # 0.884 stays 0.884


def ceiling(value: float) -> str:
    return str(Decimal(repr(value)).quantize(Decimal("0.001"), ROUND_CEILING))


def load(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def optimizers_table(name: str) -> str:
    """Adam against Muon: the rate chosen on validation, then test figures of each seed."""
    lines = [
        "| data | optimiser | epochs | rate | seed | clean | CRA 36/255 | CRA 108/255 | ACR |",
        "|" + "---|" * 9,
    ]
    for document in load(name):
        for data in ("fashion-mnist", "cifar10"):
            for r in document[data]["final"]:
                figures = (r["clean"], r["cra"]["36/255"], r["cra"]["108/255"], r["acr"])
                run = [data, r["optimizer"], str(r["epochs"]), f"{r['lr']:g}", str(r["seed"])]
                cells = [*run, *(floor(f) for f in figures)]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuning_table() -> str:
    """What the choice of rates rested on: the estimate on validation after the last epoch, one seed."""
    lines = ["| data | optimiser | rate | clean | CRA 36/255 | ACR |", "|" + "---|" * 6]
    for document in load("optimizers.json"):
        for data in ("fashion-mnist", "cifar10"):
            for r in document[data]["tuning"]:
                v = r["validation"][-1]
                cells = [
                    data,
                    r["optimizer"],
                    f"{r['lr']:g}",
                    *(floor(f) for f in (v["clean"], v["cra"]["36/255"], v["acr"])),
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_table() -> str:
    """Training step and manifold step, as ratios."""
    lines = ["| what | ratio |", "|---|---|"]
    for r in load("step-*.json"):
        name = f"{r['what']}, {r['dtype']}, {r['optimizer']}"
        lines += [
            f"| {name}: over its own bare matrix products | {r['ratio_to_gemm']:.2f} |",
            f"| {name}: over the token products alone | {r['ratio_to_token_gemm']:.2f} |",
            f"| {name}: over nn.Linear with AdamW | {r['ratio_to_adamw']:.2f} |",
        ]
    for r in load("manifold-step.json"):
        for key, name in (
            ("speedup_vs_geoopt", "our Adam over geoopt's RiemannianAdam"),
            ("speedup_vs_geoopt_euclidean", "our Adam over geoopt's on its Euclidean manifold"),
            ("speedup_vs_matrix_exp", "our Adam over the same with torch.linalg.matrix_exp, plainly written"),
            (
                "speedup_vs_matrix_exp_in_stacks",
                "our Adam over the same with the exact exponential in our stacks",
            ),
            ("speedup_vs_geotorch", "our Adam over geotorch's SO(n) with Adam"),
            ("muon_speedup_vs_geoopt", "Manifold Muon over geoopt's RiemannianAdam"),
            ("muon_speedup_vs_matrix_exp", "Manifold Muon over exact Adam"),
            ("fast_exp_speedup", "fast_exp over torch.matrix_exp, small steps"),
        ):
            lines.append(f"| {r['what']}: {name} | {r[key]:.1f}x faster |")
    return "\n".join(lines)


def drift_table() -> str:
    """Orthogonality in float32 after 1,000 steps."""
    lines = ["| optimiser | rate | without retraction | after one |", "|---|---|---|---|"]
    for r in load("manifold-step.json"):
        drift = r["orthogonality"]
        for name in ("adam", "muon", "muon_closed_form"):
            d, size = drift[name], drift["size"]
            residuals = f"{d['without']:.1e} | {d['after_retraction']:.1e}"
            lines.append(f"| {name}, {size} x {size} | {d['lr']:g} | {residuals} |")
    return "\n".join(lines)


def temperature_table() -> str:
    """The dial: temperature and ramp."""
    lines = [
        "| temperature | ramp to | clean | " + " | ".join(f"CRA {e}" for e in EPS) + " | ACR |",
        "|" + "---|" * 7,
    ]
    for document in load("temperature.json"):
        for r in document["trials"]:
            v = r["validation"][-1]
            figures = (v["clean"], *(v["cra"][e] for e in EPS), v["acr"])
            cells = [f"{r['temperature']:g}", f"{r['ramp_to']:g} x 36/255", *(floor(f) for f in figures)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def attacks_table() -> str:
    """Certified accuracy below, rounded down, attacked accuracy above, rounded up; the truth lies between."""
    lines = [
        "| run | images | clean | eps | certified | attacked | inside a radius | nearest success, in radii |",
        "|" + "---|" * 8,
    ]
    runs = [r for document in load("attacks*.json") for r in document["runs"]]
    # A run that was attacked twice is told with the most images.
    largest = {r["run"]: r for r in sorted(runs, key=lambda r: r["n"])}
    for r in sorted(largest.values(), key=lambda r: -r["n"]):
        nearest = "-" if r["closest"] is None else floor(r["closest"])
        for eps in r["cra"]:
            cells = [f"`{r['run']}`", str(r["n"]), floor(r["clean"]), eps, floor(r["cra"][eps])]
            cells += [ceiling(r["attacked"][eps]), str(r["inside"]), nearest]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rounding_table() -> str:
    """Flips that rounding causes inside certified balls."""
    lines = ["| certificate | program | images | with a radius | labels flipped |", "|" + "---|" * 5]
    for document in load("rounding*.json"):
        for r in document["rows"]:
            cells = [r["semantics"], r["program"], f"{r['n']} {r['images']}", str(r["with_radius"])]
            lines.append("| " + " | ".join([*cells, str(r["flips"])]) + " |")
    return "\n".join(lines)


def bounds_table() -> str:
    """How far proved bounds lie above exact norms."""
    lines = ["| proof or family | layers | median excess | largest excess |", "|" + "---|" * 4]
    for document in load("bounds.json"):
        for group in ("excess_by_proof", "excess_by_family"):
            for name, r in document[group].items():
                cells = [name, str(r["layers"]), f"{r['median']:.1e}", f"{r['largest']:.1e}"]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append(f"| all: {document['below']} below the exact norm | {document['layers']} | | |")
    return "\n".join(lines)


def cost_table() -> str:
    """What a certificate costs in time and radius."""
    lines = ["| what | measured |", "|---|---|"]
    for r in load("certify.json"):
        what = f"certifying {r['images']} images in float64, bounds included, over a float32 forward pass"
        lines.append(f"| {what} | {r['ratio_to_forward']:.2f} |")
        for p in r["radius_lost"]:
            for semantics in ("real", "deployed"):
                lines.append(
                    f"| share of a radius lost, `{p['preset']}`, {semantics} in float64, at most | {p[semantics]:.1e} |"
                )
    for r in load("bounds.json"):
        cost = r["cost"]
        memory = f"{cost['peak_memory_growth_mib']} MiB above the weights"
        lines.append(f"| proving {cost['matrices']} | {cost['seconds']:.1f} s, {memory} |")
    for r in load("corruptions*.json"):
        what = f"randomly corrupted copies of the bundle `{r['bundle']}` that `lipnext verify` refuses"
        lines.append(f"| {what} | {r['refused']} of {r['corrupted']} |")
    return "\n".join(lines)


def neighbours_table() -> str:
    """Networks of other libraries: what they claim and what is proved."""
    lines = [
        "| network | constant claimed | proved | CRA 36/255 claimed | proved | proved, float32 program |",
        "|" + "---|" * 6,
    ]
    for document in load("neighbours.json"):
        for name in ("deel-torchlip", "orthogonium"):
            r = document[name]
            shares = [floor(r[key]["cra"]["36/255"]) for key in ("claimed", "proved", "proved_float32")]
            constants = [f"{r['claimed']['constant']:g}", f"{r['proved']['features_constant']:.7f}"]
            lines.append("| " + " | ".join([f"{name} {r['version']}", *constants, *shares]) + " |")
    return "\n".join(lines)


def dense_table() -> str:
    """Plain dense networks as programs in float32."""
    lines = [
        "| inputs | width | depth | training steps | K | images with a radius | of the real radius kept, median |",
        "|" + "---|" * 7,
    ]
    for document in load("dense_float32*.json"):
        for r in document["rows"]:
            inputs = " x ".join(str(side) for side in document["inputs"])
            cells = [inputs, str(r["width"]), str(r["depth"]), str(r["steps"]), f"{r['K']:.3g}"]
            cells += [floor(r["deployed_positive"]), floor(r["kept_median"])]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def zoo_table() -> str:
    """The packaged models."""
    lines = [
        "| name | experiment | clean | " + " | ".join(f"CRA {e}" for e in EPS) + " | ACR |",
        "|" + "---|" * 7,
    ]
    for folder in sorted(path.parent for path in (ROOT / "lipnext" / "zoo").glob("*/result.json")):
        r = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        figures = (r["clean"], *(r["cra"][e] for e in EPS), r["acr"])
        cells = [f"`{folder.name}`", f"`{r['system']}/{r['preset']}`", *(floor(f) for f in figures)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def certificate_table() -> str:
    """The packaged digits' `certificate.json`: every field, lists by their shape."""
    document = json.loads(
        (ROOT / "lipnext" / "zoo" / "digits" / "certificate.json").read_text(encoding="utf-8")
    )
    lines = ["| field | in `digits` |", "|---|---|"]
    for name, value in document.items():
        if name in ("lipschitz", "input"):
            shown = ", ".join(f"{key} {json.dumps(part)}" for key, part in value.items())
        elif name == "layers":
            shown = f"{len(value)} layers, the first: " + ", ".join(
                f"{k} {json.dumps(v)}" for k, v in value[0].items()
            )
        elif name == "ball_error":
            shown = ", ".join(f"{key}: a table {shape(table)}" for key, table in value.items())
        elif isinstance(value, list) and isinstance(value[0], list):
            shown = f"a table {shape(value)}"
        else:
            shown = f"`{value if isinstance(value, str) else json.dumps(value)}`"
        lines.append(f"| `{name}` | {shown} |")
    return "\n".join(lines)


def shape(table: list[list[float]]) -> str:
    """Sides and largest entry of a table of pairs of classes."""
    return f"{len(table)} x {len(table[0])}, largest about {max(max(row) for row in table):.3g}"


def export_table() -> str:
    """Packaged models in onnxruntime, on whole test parts."""
    lines = [
        "| model | program | images | other labels | margins differ by at most | proved bound | radius above the certificate's "
        "| below |",
        "|" + "---|" * 8,
    ]
    for document in load("export.json"):
        for r in document["rows"]:
            numbers = ("margin_difference", "margin_bound", "radius_above", "radius_below")
            cells = [f"`{r['model']}`", r["dtype"], str(r["images"]), str(r["other_labels"])]
            cells += [f"{max(0.0, r[key]):.1e}" for key in numbers]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_table() -> str:
    """All systems at equal training time: shares rounded down, attacked accuracy up."""
    lines = []
    for document in load("compare-*.json"):
        (table,) = document["tables"]
        rows, n = table["rows"], document["n"]
        attacked = next(row["attacked"]["n"] for row in rows if row["attacked"])
        head = [
            "model",
            "parameters",
            "epochs",
            "minutes",
            "clean",
            *(f"CRA {e}" for e in rows[0]["cra"]),
            "ACR",
            "±",
        ]
        lines += [
            f"{document['data']}, {n} test images; attacked: {attacked} of them.",
            "",
            "| " + " | ".join([*head, "attacked 36/255"]) + " |",
            "|" + "---|" * (len(head) + 1),
        ]
        for r in rows:
            spread = max(high - low for low, high in r["interval"].values()) / 2
            left = r["attacked"]["accuracy"]["36/255"] if r["attacked"] else None
            cells = [
                f"`{r['name']}`" if "/" in r["name"] else r["name"],
                f"{r['parameters']:,}" if r.get("epochs") else "-",
                str(r["epochs"]) if r.get("epochs") else "-",
                f"{r['minutes']:.1f}" if r.get("epochs") else "-",
                *(floor(f) for f in (r["clean"], *r["cra"].values(), r["acr"])),
                f"{spread:.3f}",
                "-" if left is None else f"{left:.3f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return (
        "\n".join(lines).rstrip("\n")
        or "Not measured yet: `benchmarks/compare.py` writes what this table is made from."
    )


def published_table() -> str:
    """The constant of the body: proved, as the published code would state it, and what would be certified with that."""
    lines = [
        "| data | model | K proved | K published | by | CRA 36/255 proved | as published |",
        "|" + "---|" * 7,
    ]
    for document in load("compare-*.json"):
        (table,) = document["tables"]
        for r in table["rows"]:
            if r.get("published") is None:
                continue
            share = r["cra_published"]["36/255"]
            cells = [
                document["data"],
                f"`{r['name']}`",
                f"{r['lipschitz']['bound']:.5g}",
                f"{r['published']['constant']:.5g}",
                r["published"]["method"],
                floor(r["cra"]["36/255"]),
                floor(share),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablations_table(dataset: str) -> str:
    """One setting changed at a time; figures of the validation part after the last epoch, not certificates."""
    logs = [
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((RESULTS / "ablations" / dataset).glob("*.jsonl"))
    ]
    rows = {log[0]["setting"]: (log[0]["options"], log[-1]) for log in logs}
    options, _ = rows["base"]
    lines = [
        "| setting | what differs from the base | clean | "
        + " | ".join(f"CRA {e}" for e in EPS)
        + " | ACR | seconds |",
        "|" + "---|" * 8,
    ]
    ranked = sorted(
        rows.items(), key=lambda item: (item[0] != "base", -item[1][1]["validation_estimate"]["acr"])
    )
    for name, (changed, last) in ranked:
        found = last["validation_estimate"]
        differs = ", ".join(f"`{k}={v}`" for k, v in changed.items() if options.get(k) != v) or "-"
        numbers = [found["clean"], *(found["cra"][e] for e in EPS), found["acr"]]
        lines.append(
            f"| {name} | {differs} | " + " | ".join(floor(n) for n in numbers) + f" | {last['seconds']:.0f} |"
        )
    return "\n".join(lines)


def load_table() -> str:
    """The server under load."""
    lines = []
    for r in load("serve.json"):
        whole, memory = r["whole_test_set"], r["memory_mib"]
        answers = ", ".join(f"{count:,} x {status}" for status, count in r["answers"].items())
        malformed = ", ".join(f"{count:,} x {status}" for status, count in r["malformed"].items())
        lines += [
            f"`{r['run']}`, {r['clients']} clients for {r['seconds']:.0f} s on one machine with the server ({r['device']}):",
            "",
            "| | |",
            "|---|---|",
            f"| answers, all compared with the certificate | {answers} |",
            f"| labels or radii that differ, swapped answers | {r['wrong_or_swapped']} |",
            f"| connections dropped | {r['dropped']} |",
            f"| malformed requests mixed in | {malformed} |",
            f"| images a second | {r['images_per_second']:.0f} |",
            f"| time of an answer: median, 95 %, 99 % | {r['p50_ms']:.0f}, {r['p95_ms']:.0f}, {r['p99_ms']:.0f} ms |",
            f"| memory after a quarter of the time, at the end | {memory['first']:.0f}, {memory['last']:.0f} MiB |",
            f"| whole test part asked for once, answers that differ | {whole['different']} of {whole['images']:,} |",
        ]
    return "\n".join(lines)


def processes_table() -> str:
    """Two processes against one, and the optimiser's state."""
    lines = []
    for r in load("distributed.json"):
        speeds = r["images_per_second"]
        lines += [
            f"{r['what']}, {r['cores']} cores:",
            "",
            "| processes | images a second | speedup | state beside the weights, largest process | share |",
            "|---|---|---|---|---|",
        ]
        for size, held in r["state"].items():
            speed = f"{speeds[size]:.0f}" if size in speeds else "-"
            gain = f"{r['speedup']:.2f}x" if size == "2" else "-"
            lines.append(
                f"| {size} | {speed} | {gain} | {held / 2**20:.2f} MiB | {r['state_share'][size]:.3f} |"
            )
    return "\n".join(lines)


def plan_table() -> str:
    """What the plan predicts against what was measured."""
    lines = [
        "| step of | predicted | measured | error | of the passes | of the manifold step | of the bytes |",
        "|" + "---|" * 7,
    ]
    for document in load("plan.json"):
        what = (
            document["what"].removeprefix("lipnext plan against a step of ").removesuffix(", on this machine")
        )
        for r in document["rows"]:
            seconds = (f"{1000 * r[key]['step']:.0f} ms" for key in ("predicted_seconds", "measured_seconds"))
            errors = (f"{100 * r['error'][key]:+.0f} %" for key in ("step", "passes", "manifold", "bytes"))
            lines.append(f"| {what}, {r['precision']} | " + " | ".join((*seconds, *errors)) + " |")
    return "\n".join(lines)


def memory_table() -> str:
    """What the three ways to keep activations store and cost, by depth."""
    lines = []
    for r in load("memory.json"):
        lines += [
            f"{r['what']}, {r['dtype']}:",
            "",
            "| depth | `train.activations` | stored after the forward pass | high-water mark of a step | time against `keep` |",
            "|---|---|---|---|---|",
        ]
        for row in r["rows"]:
            sizes = " | ".join(f"{row[key] / 2**20:.1f} MiB" for key in ("stored_bytes", "peak_bytes"))
            lines.append(
                f"| {row['depth']} | `{row['activations']}` | {sizes} | {row['ratio_to_keep']:.2f}x |"
            )
    return "\n".join(lines)


def linf_table() -> str:
    """Runs with radii in the l-infinity norm, shares rounded down, attacked accuracy up."""
    lines = [
        "| run | minutes | clean | eps | certified | by constants alone "
        "| attacked: of | clean | certified | survives | inside a radius |",
        "|" + "---|" * 11,
    ]
    for document in load("linf.json"):
        for r in document["runs"]:
            audit = r["audit"]
            for eps, share in r["cra"].items():
                cells = [
                    f"`{r['system']}/{r['preset']}`",
                    f"{r['minutes']:.1f}",
                    floor(r["clean"]),
                    eps,
                    floor(share),
                    floor(r["cra_global"][eps]),
                    str(audit["samples"]),
                    *(
                        f"{found:.3f}"
                        for found in (audit["clean"], audit["cra"][eps], audit["attacked"][eps])
                    ),
                    str(audit["violations"]),
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def clarke_table() -> str:
    """Local constants by three methods."""
    lines = [
        "| network | eps | sampled | joint | RecurJac | interval | RecurJac / joint | in this order | seconds, joint |",
        "|" + "---|" * 9,
    ]
    for document in load("clarke.json"):
        for network in document["networks"]:
            for r in network["methods"]:
                constants = [f"{value:.4g}" for value in r["median_constant"].values()]
                cells = [
                    f"{network['network']}, {network['images']} images",
                    f"{r['eps']}",
                    *constants,
                    f"{r['recurjac_over_joint']:.2f}x",
                    "always" if r["ordered"] else "NO",
                    f"{r['seconds']['joint']['cores']:.1f}",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def votes_table() -> str:
    """Certified accuracy by votes, rounded down, and intervals of the differences to the first row, rounded outwards."""
    lines = []
    for document in load("smoothing.json"):
        (table,) = document["tables"]
        columns = list(table["rows"][0]["cra"])
        lines += [
            "| experiment | seeds | epochs | minutes | clean | "
            + " | ".join(f"certified {eps}" for eps in columns)
            + " | ACR | votes | alpha |",
            "|" + "---|" * (8 + len(columns)),
        ]
        for r in table["rows"]:
            cells = [
                f"`{r['name']}`",
                str(len(r["seeds"])),
                str(r["epochs"]),
                f"{r['minutes']:.1f}",
                *(floor(found) for found in (r["clean"], *r["cra"].values(), r["acr"])),
                f"{r['votes']:,}",
                f"{r['alpha']:g}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        for r in table["rows"][1:]:
            between = [
                f"{math.floor(1000 * low) / 1000:+.3f} to {math.ceil(1000 * high) / 1000:+.3f}"
                for low, high in (r["difference"][key] for key in ("clean", *columns, "acr"))
            ]
            lines.append(
                f"| less that of `{table['difference_to']}` | | | | " + " | ".join(between) + " | | |"
            )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "load": load_table,
    "processes": processes_table,
    "memory": memory_table,
    "plan": plan_table,
    "linf": linf_table,
    "clarke": clarke_table,
    "votes": votes_table,
    "ablations_fashion": lambda: ablations_table("fashion-mnist"),
    "ablations_cifar10": lambda: ablations_table("cifar10"),
    "results": results_table,
    "optimizers": lambda: optimizers_table("optimizers.json"),
    "optimizers_unequal": lambda: optimizers_table("optimizers-unequal.json"),
    "tuning": tuning_table,
    "temperature": temperature_table,
    "speed": speed_table,
    "drift": drift_table,
    "attacks": attacks_table,
    "rounding": rounding_table,
    "bounds": bounds_table,
    "cost": cost_table,
    "neighbours": neighbours_table,
    "dense": dense_table,
    "zoo": zoo_table,
    "certificate": certificate_table,
    "export": export_table,
    "comparison": comparison_table,
    "published": published_table,
}


def rendered(page: Path) -> str:
    """The page with every table written anew."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- /table -->)",
        lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}",
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )


def draw(path: Path) -> None:
    """Certified accuracy against radius: one curve a model, dashed for the nearest-neighbour certificate."""
    curves = []
    for colour, name in enumerate(ROWS):
        curves += [curve(result, name, colour) for result in load(f"{name}-seed0.json")]
    for name in BASELINES:
        for result in load(f"nearest-neighbour-{name}.json"):
            curves.append(curve(result, f"nearest neighbour, {name}", ROWS.index(name), dashed=True))
    save(certified_accuracy(curves), path)


def curve(result: dict[str, Any], name: str, colour: int, dashed: bool = False) -> Curve:
    """The curve of a result file, told on a grid of l2 radii: between two of them what holds at the larger one."""
    radius, accuracy = (np.array(result["curve"][key]) for key in ("radius", "accuracy"))
    return Curve(
        name=name, radius=radius[:-1], accuracy=accuracy[1:], norm="l2", colour=colour, dashed=dashed
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = [page for page in PAGES if rendered(page) != page.read_text(encoding="utf-8")]
    if args.check:
        sys.exit(1 if stale else 0)
    for page in stale:
        page.write_text(rendered(page), encoding="utf-8")
    draw(ROOT / "docs" / "certified-accuracy.png")


if __name__ == "__main__":
    main()
