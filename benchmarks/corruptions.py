"""Corrupt copies of a bundle at random and have each one refused by the independent checker, in a process of its own.

    python benchmarks/corruptions.py runs/fashion-mnist-cpu-seed0 --count 500 --json --out benchmarks/results/corruptions.json

Half of them are accidents, which the hashes must see: a byte flipped, a file cut, bytes put in, a number edited. The other half
are lies, sealed with right hashes, which only mathematics can see: a weight moved, a bound, a distance or an error lowered,
another architecture, a false header. A refusal is exit code 1 and one line; everything else (0, a traceback, a time-out) is
counted against the checker. Exit code 1 where there is any.
"""

import argparse
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timing import report

from lipnext import verify
from lipnext.core.files import sha256_tensors
from lipnext.training.progress import reporter

FILES = (verify.WEIGHTS, verify.CONFIG, verify.CERTIFICATE)
Corruption = Callable[[Path, random.Random], None]


# ---- Accidents


def flip_a_byte(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(bytes(data))


def cut(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def put_bytes_in(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    data = path.read_bytes()
    place = rng.randrange(len(data) + 1)
    path.write_bytes(data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place:])


def edit_a_number(folder: Path, rng: random.Random) -> None:
    """In one of the JSON texts, the header of the weights included."""
    path = folder / rng.choice(FILES)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little") if path.name == verify.WEIGHTS else len(data)
    number = rng.choice(list(re.finditer(rb"\d+(\.\d+)?", data[:end])))
    other = str(rng.choice((0, 1, 2, rng.randrange(2**31), rng.random(), 10**30))).encode()
    if number[0] == other:
        other += b"1"
    path.write_bytes(data[: number.start()] + other + data[number.end() :])


# ---- Lies


def move_a_weight(folder: Path, rng: random.Random) -> None:
    """A matrix of a block, by far more than the bounds leave room for."""

    def move(tensors: dict[str, torch.Tensor]) -> None:
        names = sorted(name for name in tensors if name.endswith(("rotation", "product")))
        flat = tensors[rng.choice(names)].view(-1)
        flat[rng.randrange(len(flat))] += rng.choice((-1, 1)) * 10 ** rng.uniform(-3, 0)

    edit_weights(folder, move)


def round_a_matrix(folder: Path, rng: random.Random) -> None:
    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        name = rng.choice(sorted(name for name in tensors if name.endswith(("rotation", "product"))))
        tensors[name] = tensors[name].bfloat16().float()

    edit_weights(folder, rounded)


def lower_the_constant(folder: Path, rng: random.Random) -> None:
    def lower(certificate: dict[str, Any]) -> None:
        certificate["lipschitz"]["bound"] *= 1 - 10 ** rng.uniform(-13, -1)

    edit(folder / verify.CERTIFICATE, lower)


def lower_a_layer(folder: Path, rng: random.Random) -> None:
    """Together with the constant, so that their product is right."""

    def lower(certificate: dict[str, Any]) -> None:
        layer = rng.choice([e for e in certificate["layers"] if e["proof"] == "product"])
        layer["bound"] = 1 + (layer["bound"] - 1) * rng.uniform(0, 0.1)
        certificate["lipschitz"]["bound"] = math.prod(e["bound"] for e in certificate["layers"]) * (1 + 1e-15)

    edit(folder / verify.CERTIFICATE, lower)


def lower_a_distance(folder: Path, rng: random.Random) -> None:
    def lower(certificate: dict[str, Any]) -> None:
        table = certificate["head_distances"]
        i, j = rng.sample(range(len(table)), 2)
        table[i][j] *= 1 - 10 ** rng.uniform(-9, -1)

    edit(folder / verify.CERTIFICATE, lower)


def lower_an_error(folder: Path, rng: random.Random) -> None:
    def lower(certificate: dict[str, Any]) -> None:
        table = certificate["margin_error"]
        i, j = rng.sample(range(len(table)), 2)
        key = rng.choice(("table", "feature_error", "feature_norm"))
        if key == "table":
            table[i][j] *= rng.uniform(0, 0.1)
        else:
            certificate[key] *= rng.uniform(0, 0.1)

    edit(folder / verify.CERTIFICATE, lower)


def change_the_architecture(folder: Path, rng: random.Random) -> None:
    """What leaves other shapes, so that no image is needed to see it."""

    def change(config: dict[str, Any]) -> None:
        key = rng.choice(("width", "depth", "patch"))
        config["experiment"]["model"][key] += rng.randrange(1, 100)

    edit(folder / verify.CONFIG, change)


def false_header(folder: Path, rng: random.Random) -> None:
    data = (folder / verify.WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    claimed = None
    entry = header[rng.choice(sorted(set(header) - {"__metadata__"}))]
    match rng.randrange(5):
        case 0:
            claimed = rng.choice((10 * 2**30, 2**64 - 1, length + len(body) + 1))
        case 1:
            entry["data_offsets"] = [offset + 4 * rng.randrange(1, 100) for offset in entry["data_offsets"]]
        case 2:
            entry["shape"] = [*entry["shape"], rng.randrange(2, 2**31)]
        case 3:
            entry["dtype"] = rng.choice(("BF16", "F16", "I32", "F64"))
        case 4:
            entry["shape"] = [-1]
    text = json.dumps(header).encode()
    length = len(text) if claimed is None else claimed
    (folder / verify.WEIGHTS).write_bytes(length.to_bytes(8, "little") + text + body)


ACCIDENTS: tuple[Corruption, ...] = (flip_a_byte, cut, put_bytes_in, edit_a_number)
LIES: tuple[Corruption, ...] = (
    move_a_weight,
    round_a_matrix,
    lower_the_constant,
    lower_a_layer,
    lower_a_distance,
    lower_an_error,
    change_the_architecture,
    false_header,
)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / verify.WEIGHTS)
    change(tensors)
    (folder / verify.WEIGHTS).write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


def seal(folder: Path) -> None:
    """Make every hash right again."""

    def experiment(config: dict[str, Any]) -> None:
        text = json.dumps(config["experiment"], sort_keys=True, separators=(",", ":"))
        config["experiment_digest"] = hashlib.sha256(text.encode()).hexdigest()

    def certificate(document: dict[str, Any]) -> None:
        try:
            tensors = safetensors.torch.load_file(folder / verify.WEIGHTS)
            document["model_sha256"] = sha256_tensors(tensors)
        except safetensors.SafetensorError:
            pass  # a false header: there is no weight to hash
        for key, name in (("weights_file_sha256", verify.WEIGHTS), ("config_sha256", verify.CONFIG)):
            document[key] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        rest = {key: value for key, value in document.items() if key != "certificate_sha256"}
        text = json.dumps(rest, sort_keys=True)
        document["certificate_sha256"] = hashlib.sha256(text.encode()).hexdigest()

    edit(folder / verify.CONFIG, experiment)
    edit(folder / verify.CERTIFICATE, certificate)


def examine(folder: Path, timeout: float) -> str:
    """Return "" for a refusal, else what happened instead."""
    command = [sys.executable, "-I", str(verify.__file__), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return "time-out"
    if done.returncode == 0:
        return "accepted"
    one_line = done.stderr.startswith("verify: ") and done.stderr.count("\n") == 1
    return (
        "" if done.returncode == 1 and one_line else f"exit {done.returncode}: {done.stderr.strip()[-200:]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one bundle")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    kinds = [*ACCIDENTS, *ACCIDENTS, *LIES]
    counts: Counter[str] = Counter()
    failures, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as place, reporter("corrupting", args.count) as progress:
        control = examine(args.bundle, args.timeout)
        if control != "accepted":
            sys.exit(f"the bundle itself is not accepted: {control or 'refused'}")
        for number in range(args.count):
            corrupt = kinds[number % len(kinds)]
            folder = Path(place) / "copy"
            folder.mkdir()
            for name in FILES:
                shutil.copyfile(args.bundle / name, folder / name)
            corrupt(folder, random.Random(args.seed * 1_000_003 + number))
            if corrupt in LIES:
                seal(folder)
            start = time.perf_counter()
            outcome = examine(folder, args.timeout)
            slowest = max(slowest, time.perf_counter() - start)
            counts[corrupt.__name__] += 1
            if outcome:
                failures.append({"number": number, "kind": corrupt.__name__, "outcome": outcome})
            shutil.rmtree(folder)
            progress.advance(1)
    document = {
        "bundle": args.bundle.name,
        "corrupted": args.count,
        "refused": args.count - len(failures),
        "failures": failures,
        "by_kind": dict(counts),
        "slowest_seconds": round(slowest, 2),
        "seed": args.seed,
    }
    report(document, args.json, args.out)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
