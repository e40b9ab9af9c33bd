"""Check a bundle without trusting the program that wrote it.

    python verify.py BUNDLE [--images images.npy --records records.jsonl] [--samples K] [--seed N] [--json]

This file stands alone: the standard library, NumPy and python-flint (arb ball arithmetic). It has its own readers of
`model.safetensors`, `config.json` and `certificate.json`, re-derives every number of the certificate from the stored
weights, and re-proves the radii of K samples, drawn at random, from the raw images. Exit code 0: everything holds.
1: a claim does not hold, or there is doubt; one line says which. 2: the command was not understood.

The claim, for an image x, its label y and radius r: the network with exactly the stored weights gives y to every point of
the closed l2 ball of radius r around x; semantics `real` means real arithmetic, `deployed` a program that evaluates them in
float64 or float32, in any order, at the points which that type represents. The logits are `f = W g + c`, the body g has the
Lipschitz constant K, so it holds if

    K ||w_y - w_j|| r  <  f_y(x) - f_j(x)      for every rival j.

A claim is confirmed by these tests, none of which has a tolerance on the side that makes a radius too large:
  layer bound    at least a proved upper bound of the product of its matrices' norms (`norm_bounds`, ball arithmetic)
  K              at least the exact product of the layer bounds
  head distance  at least ||w_i - w_j|| of the stored rows (ball arithmetic), and at most 1e-9 larger: more would be
                 sound, but not a certificate of these rows
  margin error   at least this file's own bound on the float64 error of a margin, for any image in [0, 1] and any order
                 of summation (`check_margin_errors`)
  ball error     the same for the executed program at any point within the square root of the number of inputs of an image;
                 without a bound that excludes overflow there is doubt
  radius         `K ||w_y - w_j|| r + E_yj <= margin` for every rival j, with this file's own K, E and logits; E holds the
                 ball error too where the claim is about a deployed program, and r is at most the square root of the
                 number of inputs, so that the ball error speaks of the whole ball
What is neither proved nor refuted is doubt. Nothing is said about the meaning of the classes, about true labels, and
about the texts that go with a claim. One assumption is left: sums and products of NumPy's float64 round as IEEE 754
says, in any order, but without algorithms of Strassen's kind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import flint
    from flint import arb, arb_mat
except ImportError:  # `main` says what to install
    flint = None  # type: ignore[assignment]

FORMAT = 1
WEIGHTS, CONFIG, CERTIFICATE = "model.safetensors", "config.json", "certificate.json"
MODEL_DEFAULTS = {
    "width": 192,
    "depth": 8,
    "patch": 4,
    "shift": 1 / 16,
    "beta": 0.5,
    "pool": True,
    "encoding": "position",
}
FORMULA = (
    "r = min_j (f_y - f_j - E[y][j]) / (lipschitz.bound * head_distances[y][j]), "
    "E = margin_error, and for deployed margin_error + ball_error[arithmetic]"
)
# (axis, step) on tokens (n, H, W, C) for each of the four groups of channels: down, up, right, left.
DIRECTIONS = ((1, 1), (1, -1), (2, 1), (2, -1))
PRECISION = 128  # bits of the ball arithmetic
SQUARINGS = 6
U = 2.0**-53  # of float64, in which this file computes
UNITS = {"float64": U, "float32": 2.0**-24}
# fewer than 2^32 float64 operations in a row, on numbers >= 0, are off by less than this factor
SAFETY = 1 + 2.0**-20
# Above all that a layer can lose by underflow: 2^28 times the root of the smallest product that does not vanish.
TINY = {U: 2.0**-500, UNITS["float32"]: 2.0**-46}
# Activations up to this size square and add up without overflow, 2^28 of them and more.
LARGEST = {U: 2.0**450, UNITS["float32"]: 2.0**45}

Array = NDArray[np.float64]
Tensors = dict[str, NDArray[np.float32]]


class Doubt(Exception):
    """Something does not hold or cannot be told, in one line."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 if everything holds, 1 in doubt, 2 for a command that cannot be carried out."""
    parser = argparse.ArgumentParser(
        prog="verify", description="Check a bundle independently of the program that wrote it."
    )
    parser.add_argument("bundle", type=Path, help=f"folder with {WEIGHTS}, {CONFIG} and {CERTIFICATE}")
    parser.add_argument("--images", type=Path, help=".npy file (n, c, h, w), float32 or float64 in [0, 1]")
    parser.add_argument("--records", type=Path, help=".jsonl file, a record for each image, in their order")
    parser.add_argument("--samples", type=int, default=100, help="radii to re-prove (default 100)")
    parser.add_argument("--seed", type=int, help="decides which (default: unpredictable, and printed)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    try:
        options = parser.parse_args(argv)
        check_usage(parser, options)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    report: dict[str, Any] = {"bundle": one_line(options.bundle), "holds": False}
    try:
        verify(options, report)
        report["holds"] = True
    except Doubt as doubt:
        report["reason"] = one_line(doubt)
    except Exception as error:  # whatever else a damaged file leads to is doubt as well
        report["reason"] = one_line(f"cannot be checked: {type(error).__name__}: {error}")
    if not report["holds"]:
        print(f"verify: {report['bundle']}: {report['reason']}", file=sys.stderr)
    if options.json:
        print(json.dumps(report, indent=2))
    elif report["holds"]:
        print("everything holds")
    return 0 if report["holds"] else 1


def check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse a command that cannot be carried out."""
    if flint is None:
        parser.error("python-flint is missing; install it with: pip install python-flint")
    if not options.bundle.is_dir():
        parser.error(f"{one_line(options.bundle)} is no folder; give one with {WEIGHTS} and its certificate")
    if (options.images is None) != (options.records is None):
        parser.error("--images and --records belong together; give both or none")
    if options.samples < 1:
        parser.error(f"--samples must be at least 1, got {options.samples}")
    for path in (options.images, options.records):
        if path is not None and not path.is_file():
            parser.error(f"there is no file {one_line(path)}")


def verify(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Check everything in turn, say and report what holds, raise Doubt at the first thing that does not."""

    def say(key: str, text: str, **facts: Any) -> None:
        report[key] = facts
        if not options.json:
            print(f"{key:<10} {text}", flush=True)

    start = time.perf_counter()
    with flint.ctx.workprec(PRECISION), np.errstate(all="ignore"):
        config, certificate, tensors = read_bundle(options.bundle)
        sha256 = certificate["model_sha256"]
        say("files", f"all hashes agree; weights {sha256}", model_sha256=sha256)
        network = build(config, tensors)
        check_statement(certificate, network)
        sizes = {"width": network.width, "depth": len(network.blocks), "classes": len(network.rows)}
        say("network", ", ".join(["lipnext", *(f"{k} {v}" for k, v in sizes.items())]), **sizes)
        bound, norms = check_layers(certificate, network)
        claimed = certificate["lipschitz"]["bound"]
        say("lipschitz", f"K {claimed!r} confirmed, proved {bound!r}", claimed=claimed, proved=bound)
        distances = check_distances(certificate, network)
        errors = check_errors(certificate, network, norms, distances)
        largest = float(errors["real"].max())
        say("head", f"distances and margin errors confirmed, {largest:.1e} proved", margin_error=largest)
        if options.images is None:
            say("radii", "no radius was re-proved; give --images and --records", proved=0)
        else:
            seed = secrets.randbits(32) if options.seed is None else options.seed
            proved, total = check_radii(options, network, sha256, seed, bound, distances, errors)
            say("radii", f"{proved} of {total} re-proved, seed {seed}", proved=proved, of=total, seed=seed)
    report["seconds"] = round(time.perf_counter() - start, 3)


def one_line(text: object) -> str:
    """Return printable ASCII without line breaks, whatever a file or a path has put into the text."""
    return " ".join(str(text).encode("ascii", "backslashreplace").decode().split())[:500]


# ---- Files ----


def read_bundle(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Tensors]:
    """Read the three files and compare all hashes; return config, certificate and tensors."""
    config_bytes = read_bytes(folder / CONFIG, 2**22)
    config = parse_object(config_bytes, CONFIG)
    classes = config.get("classes")
    count = len(classes) if isinstance(classes, list) else 0
    # two tables of k x k numbers, up to 40 bytes each
    certificate_bytes = read_bytes(folder / CERTIFICATE, 2**22 + 100 * count**2)
    certificate = parse_object(certificate_bytes, CERTIFICATE)
    for name, document in ((CONFIG, config), (CERTIFICATE, certificate)):
        expect(document, "format", FORMAT, name)
    # its hash covers the content, and the content has one text: no byte is left uncovered
    if certificate_bytes != (json.dumps(certificate, indent=2) + "\n").encode():
        raise Doubt(f"{CERTIFICATE} is not written the way its content is written")
    rest = {key: value for key, value in certificate.items() if key != "certificate_sha256"}
    tensors, weights_sha256 = read_tensors(folder / WEIGHTS)
    hashes = {
        "certificate_sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest(),
        "config_sha256": hashlib.sha256(config_bytes).hexdigest(),
        "weights_file_sha256": weights_sha256,
        "model_sha256": hash_tensors(tensors),
    }
    for key, value in hashes.items():
        expect(certificate, key, value, CERTIFICATE)
    return config, certificate, tensors


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes."""
    if not path.is_file():
        raise Doubt(f"there is no file {path.name}")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Doubt(f"{path.name} is larger than the {limit} bytes that it can need")
    return data


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8, no NaN, no infinity, no key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            raise ValueError("a key comes twice")
        return document

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text:.40} is not finite")
        return value

    try:
        text = data.decode("utf-8")
        document = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise Doubt(f"{what} is no proper JSON: {error}") from error
    if not isinstance(document, dict):
        raise Doubt(f"{what} holds a {type(document).__name__}, not an object")
    return document


def read_tensors(path: Path) -> tuple[Tensors, str]:
    """Read a safetensors file without believing its header; return the tensors and the hash of the file.

    Layout: 8 bytes with the length n of the header, n bytes of JSON, the data. The file is mapped, so that nothing is
    allocated by a number that it claims, and the tensors must cover the data exactly, without gap or overlap.
    """
    if not path.is_file() or path.stat().st_size < 8:
        raise Doubt(f"there is no file {path.name}, or it is cut short")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(len(data) - 8, 2**24):
        raise Doubt(f"{path.name} claims a header of {length} bytes in a file of {len(data)}")
    header = parse_object(data[8 : 8 + length].tobytes(), f"the header of {path.name}")
    header.pop("__metadata__", None)
    body, end, tensors = data[8 + length :], 0, {}
    for name, (start, stop, shape) in sorted(
        ((name, read_entry(name, entry)) for name, entry in header.items()), key=lambda item: item[1]
    ):
        if start != end or stop > len(body):
            raise Doubt(f"{path.name}: {name!r:.80} overlaps another tensor, leaves a gap or is cut short")
        tensors[name] = body[start:stop].view("<f4").reshape(shape)
        end = stop
    if end != len(body):
        raise Doubt(f"{path.name} holds {len(body) - end} bytes that belong to no tensor")
    return tensors, hashlib.sha256(data.data).hexdigest()


def read_entry(name: str, entry: Any) -> tuple[int, int, list[int]]:
    """Return start, stop and shape from an entry of a safetensors header."""
    what = f"{WEIGHTS}: {name!r:.80}"
    expect_keys(entry, {"dtype", "shape", "data_offsets"}, what)
    expect(entry, "dtype", "F32", what)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > 8 or len(offsets) != 2:
        raise Doubt(f"{what} has a malformed shape or data_offsets")
    start, stop = (whole(n, f"{what}: data_offsets", 0, 2**62) for n in offsets)
    if stop - start != 4 * math.prod(whole(n, f"{what}: shape", 1, 2**31) for n in shape):
        raise Doubt(f"{what} has a shape that does not fit its {stop - start} bytes")
    return start, stop, shape


def hash_tensors(tensors: Tensors) -> str:
    """Hash names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps([name, "torch.float32", list(tensors[name].shape)]).encode() + b"\n")
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def expect(document: dict[str, Any], key: str, value: Any, what: str) -> None:
    """Compare a value, type included: True is not 1, and 1.0 is not 1."""
    found, wanted = json.dumps(document.get(key)), json.dumps(value)
    if found != wanted:
        raise Doubt(f"{what}: {key} must be {wanted:.100}, got {found:.100}")


def expect_keys(document: Any, keys: set[str], what: str) -> None:
    """Refuse what lacks a claim, and what makes one that this file does not know how to check."""
    if not isinstance(document, dict):
        raise Doubt(f"{what} must be an object, got {document!r:.40}")
    if document.keys() != keys:
        missing, unknown = sorted(keys - document.keys()), sorted(document.keys() - keys)
        raise Doubt(f"{what}: missing {missing[:3] or 'nothing'}, not understood {unknown[:3] or 'nothing'}")


def whole(value: Any, what: str, low: int, high: int) -> int:
    """Return a whole number within limits."""
    if type(value) is not int or not low <= value <= high:
        raise Doubt(f"{what} must be a whole number from {low} to {high}, got {value!r:.40}")
    return value


def number(value: Any, what: str, high: float = 1e100) -> float:
    """Return a number in [0, high] as float64."""
    if type(value) not in (int, float) or not 0 <= value <= high:
        raise Doubt(f"{what} must be a number from 0 to {high:g}, got {value!r:.40}")
    return float(value)


def table(value: Any, k: int, what: str) -> Array:
    """Return a k x k table of numbers that are not negative."""
    if not isinstance(value, list) or [len(row) if isinstance(row, list) else -1 for row in value] != [k] * k:
        raise Doubt(f"{what} must be a table of {k} x {k} numbers")
    return np.array([[number(x, what) for x in row] for row in value])


# ---- The network ----


@dataclass(frozen=True)
class Block:
    """`Z = act(P shift(R (X + p)) + b)`; the arrays hold the stored float32 values, exactly."""

    rotation: Array
    product: Array
    position: Array
    bias: Array


@dataclass(frozen=True)
class Network:
    """`images - 0.5`, patches to channels, blocks, L2 pooling over positions or none, `rows @ features + offsets`."""

    shape: tuple[int, int, int]
    patch: int
    width: int
    grid: tuple[int, int]
    group: int
    folded: int
    pool: bool
    blocks: list[Block]
    rows: Array
    offsets: Array

    def logits(self, images: Array) -> Array:
        """Evaluate images (n, c, h, w) in float64; return (n, k)."""
        s, (c, h, w), (rows, columns) = self.patch, self.shape, self.grid
        x = np.pad(images - 0.5, ((0, 0), (0, 0), (0, -h % s), (0, -w % s)))
        x = x.reshape(len(x), c, rows, s, columns, s).transpose(0, 2, 4, 1, 3, 5)
        x = x.reshape(len(x), rows, columns, c * s * s)
        x = np.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.width - c * s * s)))
        for block in self.blocks:
            x = (x + block.position) @ block.rotation.T
            for part, (axis, step) in enumerate(DIRECTIONS):
                channels = slice(part * self.group, (part + 1) * self.group)
                x[..., channels] = np.roll(x[..., channels], step, axis)
            x = x @ block.product.T + block.bias
            x[..., : self.folded] = np.abs(x[..., : self.folded])
        features = np.sqrt(np.square(x).sum(axis=(1, 2))) if self.pool else x.reshape(len(x), -1)
        return features @ self.rows.T + self.offsets


def build(config: dict[str, Any], tensors: Tensors) -> Network:
    """Build the network that the config describes; what is not understood is refused by name."""
    known = {"format", "system", "input_shape", "classes", "experiment", "experiment_digest"}
    expect_keys(config, known, CONFIG)
    expect(config, "system", "lipnext", CONFIG)
    experiment, sides, classes = config["experiment"], config["input_shape"], config["classes"]
    if not isinstance(experiment, dict) or not isinstance(experiment.get("model"), dict):
        raise Doubt(f"{CONFIG}: experiment.model must be an object")
    expect(experiment, "system", "lipnext", f"{CONFIG}: experiment")
    canonical = json.dumps(experiment, sort_keys=True, separators=(",", ":")).encode()
    expect(config, "experiment_digest", hashlib.sha256(canonical).hexdigest(), CONFIG)
    model, what = MODEL_DEFAULTS | experiment["model"], f"{CONFIG}: experiment.model"
    expect_keys(model, set(MODEL_DEFAULTS), what)
    width, depth, s = (whole(model[key], f"{what}.{key}", 1, 2**20) for key in ("width", "depth", "patch"))
    shift, beta = number(model["shift"], f"{what}.shift", 0.25), number(model["beta"], f"{what}.beta", 1.0)
    if not isinstance(model["pool"], bool):
        raise Doubt(f"{what}.pool must be true or false, got {model['pool']!r:.40}")
    if model["encoding"] not in ("position", "channel"):
        raise Doubt(f"{what}.encoding must be position or channel, got {model['encoding']!r:.40}")
    if not isinstance(sides, list) or len(sides) != 3:
        raise Doubt(f"{CONFIG}: input_shape must be three whole numbers, got {sides!r:.40}")
    c, h, w = (whole(side, f"{CONFIG}: input_shape", 1, 2**16) for side in sides)
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(k, str) for k in classes):
        raise Doubt(f"{CONFIG}: classes must be a list of at least two names")
    if c * s * s > width or len(tensors) != 4 * depth + 2:
        raise Doubt(f"{len(tensors)} tensors do not fit depth {depth}, width {width} and patch {s}")

    def take(name: str, *shape: int) -> Array:
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or not np.isfinite(tensor).all():
            raise Doubt(f"{WEIGHTS}: {name} must be a tensor of shape {shape} without NaN and infinity")
        return tensor.astype(np.float64)

    grid = (-(-h // s), -(-w // s))
    columns = width if model["encoding"] == "channel" else 1
    blocks = [
        Block(
            rotation=take(f"body.{i}.rotation", width, width),
            product=take(f"body.{i}.product", width, width),
            position=take(f"body.{i}.position", *grid, columns),
            bias=take(f"body.{i}.bias", width),
        )
        for i in range(2, depth + 2)
    ]
    features = width if model["pool"] else math.prod(grid) * width
    rows, offsets = take("head.weight", len(classes), features), take("head.bias", len(classes))
    group, folded, pool = int(shift * width), int(beta * width), model["pool"]
    return Network((c, h, w), s, width, grid, group, folded, pool, blocks, rows, offsets)


# ---- The constants ----


def check_statement(certificate: dict[str, Any], network: Network) -> None:
    """Check what kind of claim the certificate makes, and that this file understands all of it."""
    fixed = {
        "norm": "l2",
        "kind": "deterministic",
        "semantics": ["real", "deployed"],
        "arithmetic": "float64",
        "certificate": FORMULA,
        "input": {"shape": list(network.shape), "range": [0, 1], "preprocessing": "none"},
    }
    hashes = {"model_sha256", "weights_file_sha256", "config_sha256", "certificate_sha256"}
    claims = {"lipschitz", "layers", "head_distances", "margin_error", "ball_error"}
    claims |= {"feature_norm", "feature_error"}
    known = {"format", "lipnext_version", "torch_version", *fixed, *hashes, *claims}
    expect_keys(certificate, known, CERTIFICATE)
    for key, value in fixed.items():
        expect(certificate, key, value, CERTIFICATE)


def check_layers(certificate: dict[str, Any], network: Network) -> tuple[float, list[tuple[float, float]]]:
    """Confirm every layer bound and K; return a proved K and the proved norms of each block's R and P."""
    layers, total = certificate["layers"], certificate["lipschitz"]
    last = "one-lipschitz" if network.pool else "isometry"
    proofs = ["translation", "isometry", *["product"] * len(network.blocks), last]
    if not isinstance(layers, list) or len(layers) != len(proofs):
        raise Doubt(f"{CERTIFICATE}: layers must list the {len(proofs)} layers of the body")
    norms, product = [], Fraction(1)
    for i, (layer, proof) in enumerate(zip(layers, proofs, strict=True)):
        what = f"{CERTIFICATE}: layer body.{i}"
        expect_keys(layer, {"name", "bound", "proof", "statement"}, what)
        expect(layer, "name", f"body.{i}", what)
        expect(layer, "proof", proof, what)
        claimed = number(layer["bound"], f"{what}: bound")
        product *= Fraction(claimed)
        if proof == "product":
            norms.append(prove_block(network.blocks[i - 2], claimed, what))
        elif claimed < 1:
            raise Doubt(f"{what} claims {claimed!r}, but it keeps some distances as they are")
    what = f"{CERTIFICATE}: lipschitz"
    expect_keys(total, {"bound", "proof"}, what)
    expect(total, "proof", "product", what)
    if Fraction(number(total["bound"], f"{what}: bound")) < product:
        raise Doubt(f"{what}: bound {total['bound']!r} is below the product of the layer bounds")
    return float_above(math.prod((arb(r) * p for r, p in norms), start=arb(1))), norms


def prove_block(block: Block, claimed: float, what: str) -> tuple[float, float]:
    """Return proved norms of R and P whose product is at most the claimed bound.

    Adding p or b, shifting and folding never move two points apart, so ||R|| ||P|| bounds the block.
    """
    own = arb("nan")
    for rotation, product in zip(norm_bounds(block.rotation), norm_bounds(block.product), strict=True):
        own = rotation * product
        if own <= claimed:
            return float_above(rotation), float_above(product)
        least = norm_from_below(block.rotation) * norm_from_below(block.product)
        if least > claimed:
            raise Doubt(f"{what} claims {claimed!r}, but its norms multiply to {float(least)!r} or more")
    raise Doubt(f"{what} claims {claimed!r}, neither proved nor refuted; proved is {float_above(own)!r}")


def norm_bounds(matrix: Array) -> Iterator[arb]:
    """Yield upper bounds of ||W||_2 of a square matrix, from cheap to sharp.

    With the symmetric `E = W^T W - I` and m a power of two, `||W||^2 = ||I + E|| <= 1 + ||E^m||_F^(1/m)`.
    """
    w = ball(matrix)
    power = w.transpose() * w - ball(np.eye(len(matrix)))
    for k in range(SQUARINGS + 1):
        if k > 0:
            power = power * power
        norm = square_sum(power).upper()
        for _ in range(k + 1):  # not arb's root of order 2^(k + 1), which is NaN at 0
            norm = norm.sqrt()
        yield (1 + norm).sqrt()


def norm_from_below(matrix: Array) -> arb:
    """Return `||W v|| / ||v||` in ball arithmetic, for a v that power iteration found: never above ||W||_2."""
    vector = np.ones(len(matrix))
    for _ in range(30):
        vector = matrix.T @ (matrix @ (vector / np.abs(vector).max()))
    column = ball(vector.reshape(-1, 1))
    return (square_sum(ball(matrix) * column) / square_sum(column)).sqrt()


def check_distances(certificate: dict[str, Any], network: Network) -> Array:
    """Confirm the row distances by `||w_i - w_j||^2 = G_ii + G_jj - 2 G_ij`: 128 bits outlast the cancellation."""
    what = f"{CERTIFICATE}: head_distances"
    claimed = table(certificate["head_distances"], len(network.rows), what)
    rows = ball(network.rows)
    gram = (rows * rows.transpose()).tolist()
    loosest = (1 + arb(10) ** -9) ** 2
    for i, j in np.ndindex(claimed.shape):
        if i == j or np.array_equal(network.rows[i], network.rows[j]):
            continue  # the distance is 0, and no claim is negative
        square, claim = gram[i][i] + gram[j][j] - 2 * gram[i][j], arb(float(claimed[i, j])) ** 2
        if not square <= claim <= square * loosest:
            true = float(square.sqrt())
            raise Doubt(
                f"{what}: {float(claimed[i, j])!r} between rows {i} and {j}, which are {true!r} apart"
            )
    return claimed


def check_errors(
    certificate: dict[str, Any], network: Network, norms: list[tuple[float, float]], distances: Array
) -> dict[str, Array]:
    """Confirm the bounds on rounding errors; return the own E, (k, k), for "real" and for each deployed arithmetic."""
    size, error, own = rounding_errors(network, norms, distances, 0.0, U)
    for key, value in (("feature_norm", size), ("feature_error", error)):
        claimed = number(certificate[key], f"{CERTIFICATE}: {key}")
        if not claimed >= value:
            raise Doubt(f"{CERTIFICATE}: {key} {claimed!r} is below the own bound {value!r}")
    check_table(certificate["margin_error"], own, f"{CERTIFICATE}: margin_error")
    errors = {"real": own}
    if (
        not isinstance(certificate["ball_error"], dict)
        or not certificate["ball_error"].keys() <= UNITS.keys()
    ):
        raise Doubt(f"{CERTIFICATE}: ball_error must be an object with tables for {', '.join(UNITS)}")
    for name, claims in certificate["ball_error"].items():
        _, _, ball = rounding_errors(network, norms, distances, largest_radius(network), UNITS[name])
        check_table(claims, ball, f"{CERTIFICATE}: ball_error.{name}")
        errors[name] = (own + ball) * SAFETY
    return errors


def rounding_errors(
    network: Network, norms: list[tuple[float, float]], distances: Array, reach: float, unit: float
) -> tuple[float, float, Array]:
    """Bound the norm of the features, the error of the computed ones, and that of the margins, (k, k).

    For every input within `reach` of an image in [0, 1], `size` bounds the l2 norm of the exact activations and `error` that
    of computed minus exact ones. A sum of m products, in any order, is off by at most `gamma(m)` times the sum of their
    absolute values, so `W x + b` by `gamma(C + 1) (|| |W| || ||x|| + ||b||)` for the computed x, which is no longer than
    size + error.
    """
    positions, channels, tiny = math.prod(network.grid), network.width, TINY[unit]
    size = largest_radius(network) / 2 + reach  # of x - 1/2: the entries are at most 1/2 for an image
    error = unit * size
    for block, (rotation_norm, product_norm) in zip(network.blocks, norms, strict=True):
        repeats = channels // block.position.shape[-1]
        size += math.sqrt(repeats) * float(np.linalg.norm(block.position))
        error += unit * (size + error)
        terms = absolute_norm(block.rotation) * (size + error)
        error = rotation_norm * error + gamma(channels, unit) * terms + tiny
        size *= rotation_norm
        bias = math.sqrt(positions) * float(np.linalg.norm(block.bias))
        terms = absolute_norm(block.product) * (size + error) + bias
        error = product_norm * error + gamma(channels + 1, unit) * terms + tiny
        size = product_norm * size + bias
        if not size + error <= LARGEST[unit]:
            raise Doubt(f"activations of size {size + error:.3g} may overflow with unit roundoff {unit!r}")
    pooling = gamma(positions + 2, unit) * (size + error) + tiny if network.pool else 0.0
    error = (error + pooling) * SAFETY
    size *= SAFETY
    features = network.rows.shape[1]
    logit = np.linalg.norm(network.rows, axis=1) * (size + error) + np.abs(network.offsets)
    table = (distances * error + gamma(features + 2, unit) * (logit[:, None] + logit) + tiny) * SAFETY
    return size, error, table


def largest_radius(network: Network) -> float:
    """Return the radius up to which a deployed claim can be made: the square root of the number of inputs."""
    return math.sqrt(math.prod(network.shape))


def check_table(value: Any, own: Array, what: str) -> None:
    """Confirm a table of claimed errors: none below the own bound, the diagonal aside."""
    claims = table(value, len(own), what)
    below = ~(claims >= own) & ~np.eye(len(own), dtype=bool)
    for i, j in np.argwhere(below):
        pair = f"{float(claims[i, j])!r} of {i} and {j} is below the own bound {float(own[i, j])!r}"
        raise Doubt(f"{what} {pair}")


def gamma(n: int, unit: float) -> float:
    """Return `n u / (1 - n u)`; without such a bound there is doubt."""
    if n * unit >= 1:
        raise Doubt(f"no bound on the rounding of {n} terms with unit roundoff {unit!r}")
    return n * unit / (1 - n * unit)


def absolute_norm(matrix: Array) -> float:
    """Bound || |W| ||_2 (Collatz, Wielandt): `||A|| <= max_i (A v)_i / v_i` for `A = |W|^T |W|` and any v > 0."""
    weight = np.abs(matrix)
    vector = np.ones(len(weight))
    for _ in range(8):
        vector = weight.T @ (weight @ vector)
        vector = vector / max(float(vector.max()), 1e-300) + 1e-6
    return math.sqrt(float((weight.T @ (weight @ vector) / vector).max())) * SAFETY


def ball(matrix: Array) -> arb_mat:
    """Return the matrix in ball arithmetic, exactly."""
    rows, columns = matrix.shape
    return arb_mat(rows, columns, matrix.ravel().tolist())


def square_sum(matrix: arb_mat) -> arb:
    """Return the squared Frobenius norm."""
    return sum((x * x for x in matrix.entries()), start=arb(0))


def float_above(value: arb) -> float:
    """Return a float64 that no point of the ball exceeds."""
    return math.nextafter(float(value.upper()), math.inf)


# ---- The radii ----


def check_radii(
    options: argparse.Namespace,
    network: Network,
    sha256: str,
    seed: int,
    bound: float,
    distances: Array,
    errors: dict[str, Array],
) -> tuple[int, int]:
    """Re-prove the radii of samples drawn at random; return how many, and of how many."""
    images = open_images(options.images, network.shape)
    records = read_records(options.records, len(images), len(network.rows), sha256)
    chosen = sorted(random.Random(seed).sample(range(len(images)), min(options.samples, len(images))))
    batch = max(1, 2**21 // (math.prod(network.grid) * network.width))
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        pixels = np.asarray(images[part], dtype=np.float64)
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise Doubt(f"{options.images.name} must lie in [0, 1]; divide 8-bit values by 255")
        for index, logits in zip(part, network.logits(pixels), strict=True):
            record, limit = records[index], math.inf
            key = "real"
            if record["semantics"] == "deployed":
                key, limit = record["arithmetic"], largest_radius(network)
            if key not in errors:
                raise Doubt(f"record {index}: the certificate has no ball_error for {key}")
            if number(record["radius"], f"record {index}: radius") > limit:
                raise Doubt(f"record {index}: a deployed radius must not exceed {limit!r}")
            check_sample(record, logits, bound, distances, errors[key])
    return len(chosen), len(images)


def check_sample(
    record: dict[str, Any], logits: Array, bound: float, distances: Array, errors: Array
) -> None:
    """Prove one radius: `K ||w_y - w_j|| r + E_yj <= f_y - f_j` for every rival j."""
    label, what = record["pred"], f"record {record['idx']}"
    rivals = np.arange(len(logits)) != label
    margins = (logits[label] - logits)[rivals]
    error, steepness = errors[label][rivals], bound * distances[label][rivals]
    if not (margins >= -error).all():
        raise Doubt(f"{what}: the label is {int(logits.argmax())}, not {label}")
    radius = number(record["radius"], f"{what}: radius")
    # four roundings of numbers >= 0 stay below the factor; `error` covers the rounding of the margin
    needed = (steepness * radius + error) * (1 + 2.0**-50)
    if radius > 0 and not (margins >= needed).all():
        proved = float(((margins - error) / np.maximum(steepness, 1e-300)).min())
        raise Doubt(f"{what}: radius {radius!r} is not proved; proved is about {max(proved, 0.0)!r}")
    slack = number(record["slack"], f"{what}: slack")
    if type(record["margin"]) is not float or not (abs(margins - record["margin"]) <= slack + error).any():
        raise Doubt(f"{what}: margin {record['margin']!r:.40} is that of no rival")


def open_images(path: Path, shape: tuple[int, int, int]) -> NDArray[Any]:
    """Map a .npy file of images (n, c, h, w); nothing is read before it is asked for."""
    with open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise Doubt(f"{path.name} is no .npy file")
    images: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if (
        images.dtype not in (np.float32, np.float64)
        or images.shape != (len(images), *shape)
        or not len(images)
    ):
        wanted = "float32 or float64 images (n, {}, {}, {})".format(*shape)
        raise Doubt(f"{path.name} must hold {wanted}, got {images.dtype} of shape {images.shape}")
    return images


def read_records(path: Path, count: int, classes: int, sha256: str) -> list[dict[str, Any]]:
    """Read one record for each image and check all of it but the numbers."""
    lines = read_bytes(path, 1000 * count + 1000).splitlines()
    if len(lines) != count:
        raise Doubt(f"{path.name} has {len(lines)} records for {count} images")
    fixed = {
        "norm": "l2",
        "kind": "deterministic",
        "confidence": 1.0,
        "model_sha256": sha256,
    }
    meanings = [("real", "float64"), *(("deployed", name) for name in UNITS)]
    records = []
    for index, line in enumerate(lines):
        what = f"record {index}"
        record = parse_object(line, what)
        truth = {"label", "correct"} & record.keys()
        expect_keys(
            record,
            {"idx", "pred", "radius", "margin", "slack", "semantics", "arithmetic", *fixed, *truth},
            what,
        )
        for key, value in {"idx": index, **fixed}.items():
            expect(record, key, value, what)
        if (record["semantics"], record["arithmetic"]) not in meanings:
            meaning = f"{record['semantics']!r:.40} in {record['arithmetic']!r:.40}"
            raise Doubt(f"{what}: semantics {meaning} is not understood")
        whole(record["pred"], f"{what}: pred", 0, classes - 1)
        if truth:
            label = whole(record.get("label"), f"{what}: label", 0, classes - 1)
            expect(record, "correct", label == record["pred"], what)
        records.append(record)
    return records


if __name__ == "__main__":
    raise SystemExit(main())
