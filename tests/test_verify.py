"""The independent checker: what it accepts, what it refuses, and that it stands alone."""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from flint import arb, arb_mat, ctx
from helpers import is_norm_bound, spectral_norm
from hypothesis import given
from hypothesis import strategies as st

from lipnext import runs, verify
from lipnext.core.experiment import Experiment
from lipnext.core.files import sha256_tensors
from lipnext.data.dataset import load
from lipnext.deployment.bundle import load_bundle, load_experiment, save_bundle
from lipnext.systems import build_network

WEIGHTS, CONFIG, CERTIFICATE = verify.WEIGHTS, verify.CONFIG, verify.CERTIFICATE
IMAGES, RECORDS = "images.npy", "records.jsonl"
FILES = (WEIGHTS, CONFIG, CERTIFICATE)


def with_records(folder: Path, images: torch.Tensor, labels: torch.Tensor | None = None) -> Path:
    np.save(folder / IMAGES, images.numpy())
    load_bundle(folder).certify(images).to_jsonl(folder / RECORDS, labels)
    return folder


def trained(name: str, folder: Path, epochs: int) -> Path:
    runs.train(name, folder, overrides=[f"train.epochs={epochs}"])
    test = load(load_experiment(folder).data).test
    return with_records(folder, test.float_images(), test.labels)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained("tiny", tmp_path_factory.mktemp("tiny"), 2)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return copied(tiny, tmp_path / "copy")


def copied(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in (*FILES, IMAGES, RECORDS):
        shutil.copyfile(source / name, folder / name)
    return folder


def arguments(folder: Path) -> list[str]:
    """Check everything, every sample included."""
    data = ["--images", str(folder / IMAGES), "--records", str(folder / RECORDS)]
    return [str(folder), *data, "--samples", "1000000"]


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line that the checker refuses a bundle by."""
    assert verify.main(arguments(folder)) == 1
    out, err = capsys.readouterr()
    assert "everything holds" not in out
    assert err.startswith("verify: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, indent=2) + "\n")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


def edit_record(folder: Path, index: int, change: Callable[[dict[str, Any]], object]) -> None:
    lines = (folder / RECORDS).read_text().splitlines()
    record = json.loads(lines[index])
    change(record)
    lines[index] = json.dumps(record)
    (folder / RECORDS).write_text("\n".join(lines) + "\n")


def write_certificate(folder: Path, certificate: dict[str, Any]) -> None:
    rest = {key: value for key, value in certificate.items() if key != "certificate_sha256"}
    sealed = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    document = {**certificate, "certificate_sha256": sealed}
    (folder / CERTIFICATE).write_text(json.dumps(document, indent=2) + "\n")


def reseal(folder: Path) -> None:
    """Make every hash right again, those in the records too, so that only the mathematics can notice a change."""
    config = json.loads((folder / CONFIG).read_text())
    canonical = json.dumps(config["experiment"], sort_keys=True, separators=(",", ":"))
    config["experiment_digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    certificate = json.loads((folder / CERTIFICATE).read_text())
    try:
        model = sha256_tensors(safetensors.torch.load_file(folder / WEIGHTS))
    except safetensors.SafetensorError:
        model = certificate["model_sha256"]
    certificate["model_sha256"] = model
    certificate["weights_file_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    certificate["config_sha256"] = hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()
    write_certificate(folder, certificate)
    records = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
    lines = [json.dumps({**record, "model_sha256": model}) + "\n" for record in records]
    (folder / RECORDS).write_text("".join(lines))


# ---- What is accepted ----


def test_a_trained_bundle_is_accepted_with_every_radius(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(arguments(tiny)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "359 of 359 re-proved" in out
    assert out.endswith("everything holds\n")


def test_the_digits_bundle_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(arguments(trained("digits", tmp_path / "run", 1))) == 0
    assert "359 of 359 re-proved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "model"),
    [
        ((3, 7, 5), {"width": 29, "depth": 2, "patch": 3, "shift": 0.2, "beta": 0.3}),
        ((1, 5, 4), {"width": 8, "depth": 1, "patch": 1, "shift": 0.25, "beta": 1}),
        ((2, 3, 3), {"width": 32, "depth": 3, "patch": 4, "shift": 0, "beta": 0.0}),
        ((1, 5, 4), {"width": 8, "depth": 2, "patch": 2, "shift": 0.25, "pool": False}),
        ((1, 5, 4), {"width": 8, "depth": 2, "patch": 2, "encoding": "channel"}),
    ],
)
def test_other_architectures_are_accepted(
    shape: tuple[int, int, int], model: dict[str, float], tmp_path: Path
) -> None:
    assert verify.main(arguments(untrained(shape, model, tmp_path))) == 0


def untrained(shape: tuple[int, int, int], model: dict[str, Any], folder: Path) -> Path:
    experiment = Experiment(system="lipnext", model=model)
    network = build_network(experiment, shape, 3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("bias", "position")):
                parameter.normal_()
    save_bundle(network, experiment, ("a", "b", "ç"), folder)
    return with_records(folder, torch.rand(20, *shape))


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_deployed_radii_are_re_proved_and_real_ones_do_not_pass_for_them(
    arithmetic: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.from_numpy(np.load(copy / IMAGES))
    real = [json.loads(line) for line in (copy / RECORDS).read_text().splitlines()]
    certificate = load_bundle(copy).certify(images, semantics="deployed", arithmetic=arithmetic)
    certificate.to_jsonl(copy / RECORDS)
    assert verify.main(arguments(copy)) == 0
    capsys.readouterr()
    index = max(range(len(real)), key=lambda i: real[i]["radius"])
    edit_record(copy, index, lambda record: record.update(radius=real[index]["radius"]))
    assert f"record {index}: radius {real[index]['radius']!r} is not proved" in refusal(copy, capsys)


def test_a_deployed_radius_beyond_the_ball_that_was_analysed(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_record(copy, 0, lambda record: record.update(semantics="deployed", radius=8.5))
    assert "record 0: a deployed radius must not exceed 8.0" in refusal(copy, capsys)


def test_a_program_that_may_overflow_is_doubted(tiny: Path) -> None:
    """Squares of 1e15 overflow in float32: no bound on rounding says anything about such a program."""
    network = network_of(tiny)
    with ctx.workprec(128):
        _, norms = verify.check_layers(json.loads((tiny / CERTIFICATE).read_text()), network)
    distances = np.zeros((10, 10))
    huge = dataclasses.replace(network.blocks[0], bias=np.full(network.width, 1e15))
    grown = dataclasses.replace(network, blocks=[huge, *network.blocks[1:]])
    for unit in verify.UNITS.values():
        assert np.isfinite(verify.rounding_errors(network, norms, distances, 8.0, unit)[2]).all()
    assert np.isfinite(verify.rounding_errors(grown, norms, distances, 8.0, verify.U)[2]).all()
    with pytest.raises(verify.Doubt, match="may overflow with unit roundoff"):
        verify.rounding_errors(grown, norms, distances, 8.0, verify.UNITS["float32"])


def test_an_arithmetic_without_a_ball_error(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy / CERTIFICATE, lambda c: c["ball_error"].pop("float32"))
    reseal(copy)
    assert verify.main(arguments(copy)) == 0
    capsys.readouterr()
    edit_record(copy, 0, lambda record: record.update(semantics="deployed", arithmetic="float32"))
    assert "record 0: the certificate has no ball_error for float32" in refusal(copy, capsys)


def test_without_images_it_says_that_no_radius_was_proved(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(tiny)]) == 0
    assert "no radius was re-proved" in capsys.readouterr().out


def test_a_smaller_radius_is_a_weaker_claim_and_holds(copy: Path) -> None:
    edit_record(copy, 0, lambda record: record.update(radius=record["radius"] / 2))
    edit_record(copy, 1, lambda record: record.update(radius=0.0))
    assert verify.main(arguments(copy)) == 0


def test_json_report(tiny: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*arguments(tiny)[:-1], "7", "--seed", "3", "--json"]
    assert verify.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    certificate = json.loads((tiny / CERTIFICATE).read_text())
    assert report["holds"] is True
    assert report["radii"] == {"proved": 7, "of": 359, "seed": 3}
    assert report["lipschitz"]["claimed"] == certificate["lipschitz"]["bound"]
    assert 1 < report["lipschitz"]["proved"] <= report["lipschitz"]["claimed"]
    (copy / CONFIG).unlink()
    assert verify.main([str(copy), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report == {"bundle": str(copy), "holds": False, "reason": "there is no file config.json"}


@pytest.mark.slow
def test_the_seed_decides_which_samples(copy: Path) -> None:
    edit_record(copy, 100, lambda record: record.update(radius=record["radius"] + 1))
    few = [*arguments(copy)[:-1], "20", "--seed"]
    codes = [verify.main([*few, str(seed)]) for seed in range(60)]
    hits = [100 in random.Random(seed).sample(range(359), 20) for seed in range(60)]
    assert codes == [int(hit) for hit in hits]
    assert {0, 1} == set(codes)


# ---- It stands alone ----


def test_a_copy_elsewhere_imports_nothing_of_the_library(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "elsewhere" / "verify.py"
    script.parent.mkdir()
    shutil.copyfile(verify.__file__, script)
    program = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "known = {'lipnext', 'torch', 'safetensors', 'pydantic', 'scipy'} & {m.split('.')[0] for m in sys.modules}\n"
        "assert not known, known\n"
    )
    command = [sys.executable, "-I", "-c", program, str(script), *arguments(tiny)]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("everything holds\n")


def test_the_exit_codes_of_the_script(copy: Path, tmp_path: Path) -> None:
    script = tmp_path / "verify.py"
    shutil.copyfile(verify.__file__, script)
    command = [sys.executable, "-I", str(script)]
    for arguments_, code in (([str(copy)], 0), ([str(tmp_path)], 1), ([str(tmp_path / "none")], 2)):
        assert subprocess.run([*command, *arguments_], capture_output=True, timeout=60).returncode == code


def test_without_flint_it_says_what_to_install(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "flint", None)
    assert verify.main([str(tiny)]) == 2
    assert "pip install python-flint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (lambda a: ["/nowhere"], "is no folder"),
        (lambda a: a[:3], "belong together"),
        (lambda a: [*a, "--samples", "0"], "at least 1, got 0"),
        (lambda a: [*a, "--samples", "many"], "invalid int value"),
        (lambda a: [*a, "--records", "/nowhere.jsonl"], "there is no file /nowhere.jsonl"),
        (lambda a: [*a, "--slack", "1"], "unrecognized arguments"),
        (lambda a: [], "bundle"),
    ],
)
def test_usage(
    tiny: Path, changed: Callable[[list[str]], list[str]], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(changed(arguments(tiny))) == 2
    assert text in capsys.readouterr().err


# ---- The mathematics, against slow references ----

SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**32 - 1)


def nearly_orthogonal(n: int, seed: int, noise: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0] + noise * rng.normal(size=(n, n))
    return q.astype(np.float32).astype(np.float64)


@given(n=SIZES, seed=SEEDS, noise=st.sampled_from([0.0, 1e-7, 1e-3, 1.0]))
def test_norm_bounds_are_proved_in_rationals_and_grow_sharp(n: int, seed: int, noise: float) -> None:
    matrix = nearly_orthogonal(n, seed, noise)
    with ctx.workprec(128):
        bounds = [verify.float_above(bound) for bound in verify.norm_bounds(matrix)]
        below = float(verify.norm_from_below(matrix))
    assert all(is_norm_bound(torch.tensor(matrix), bound) for bound in bounds)
    assert bounds == sorted(bounds, reverse=True)
    # the last is (||E^64||_F)^(1/64), at most sqrt(6)^(1/64) = 1.0141 times ||E||
    residual = float(np.abs(np.linalg.eigvalsh(matrix.T @ matrix - np.eye(n))).max())
    assert bounds[-1] ** 2 - 1 <= 1.0141 * residual + 1e-13
    assert below <= spectral_norm(torch.tensor(matrix)) * (1 + 1e-14)


@given(n=SIZES, seed=SEEDS)
def test_absolute_norm_is_a_bound_and_sharp(n: int, seed: int) -> None:
    matrix = nearly_orthogonal(n, seed, 0.1)
    bound = verify.absolute_norm(matrix)
    assert is_norm_bound(torch.tensor(np.abs(matrix)), bound)
    assert bound <= 1.5 * spectral_norm(torch.tensor(np.abs(matrix)))


def test_absolute_norm_of_a_zero_matrix_is_zero() -> None:
    assert verify.absolute_norm(np.zeros((3, 3))) == 0


def network_of(folder: Path) -> verify.Network:
    config, _, tensors = verify.read_bundle(folder)
    return verify.build(config, tensors)


def exact_logits(network: verify.Network, image: np.ndarray) -> list[arb]:
    """The logits in ball arithmetic, entry by entry from the definition of the network."""
    s, (c, h, w), (rows, columns), width = network.patch, network.shape, network.grid, network.width
    tokens = {}
    for y in range(rows):
        for x in range(columns):
            token = [arb(0)] * width
            for channel in range(c):
                for dy in range(s):
                    for dx in range(s):
                        py, px = s * y + dy, s * x + dx
                        if py < h and px < w:
                            value = arb(float(image[channel, py, px])) - 0.5
                            token[channel * s * s + dy * s + dx] = value
            tokens[y, x] = token
    for block in network.blocks:
        turned = {
            (y, x): apply(
                block.rotation,
                [
                    v + float(p)
                    for v, p in zip(token, np.broadcast_to(block.position[y, x], len(token)), strict=True)
                ],
            )
            for (y, x), token in tokens.items()
        }
        g = network.group
        for y in range(rows):
            for x in range(columns):
                # what moves down comes from above, and so on
                sources = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
                shifted = list(turned[y, x])
                for part, (sy, sx) in enumerate(sources):
                    for k in range(part * g, (part + 1) * g):
                        shifted[k] = turned[sy % rows, sx % columns][k]
                mixed = apply(block.product, shifted)
                mixed = [v + float(b) for v, b in zip(mixed, block.bias, strict=True)]
                tokens[y, x] = [abs(v) if k < network.folded else v for k, v in enumerate(mixed)]
    pooled = [sum((t[k] * t[k] for t in tokens.values()), arb(0)).sqrt() for k in range(width)]
    features = (
        pooled if network.pool else [v for y in range(rows) for x in range(columns) for v in tokens[y, x]]
    )
    return [v + float(b) for v, b in zip(apply(network.rows, features), network.offsets, strict=True)]


def apply(matrix: np.ndarray, vector: list[arb]) -> list[arb]:
    rows, columns = matrix.shape
    return (arb_mat(rows, columns, matrix.ravel().tolist()) * arb_mat(columns, 1, vector)).entries()


@pytest.mark.parametrize("pool", [True, False])
def test_computed_margins_are_within_the_error_bound_of_exact_ones(
    pool: bool, tiny: Path, tmp_path: Path
) -> None:
    model = {"width": 16, "depth": 1, "patch": 2, "shift": 0.125, "pool": False}
    folder = tiny if pool else untrained((1, 8, 8), model, tmp_path)
    images = np.load(folder / IMAGES)[:4].astype(np.float64)
    network = network_of(folder)
    certificate = json.loads((folder / CERTIFICATE).read_text())
    with ctx.workprec(256):
        _, norms = verify.check_layers(certificate, network)
        distances = verify.check_distances(certificate, network)
        errors = verify.check_errors(certificate, network, norms, distances)["real"]
        computed = network.logits(images)
        for image, logits in zip(images, computed, strict=True):
            exact = exact_logits(network, image)
            for i in range(len(exact)):
                for j in range(len(exact)):
                    if i != j:
                        difference = abs(exact[i] - exact[j] - float(logits[i] - logits[j]))
                        assert difference <= float(errors[i, j])
                        assert difference.rad() < 1e-30  # else it would say nothing
    assert errors.max() < 1e-11


def test_a_radius_is_refused_one_float_above_what_is_proved() -> None:
    # margin 1, error 1/8, K = 2, distance 1/2: 7/8, up to the factor for four roundings
    logits, errors = np.array([1.0, 0.0, -5.0]), np.full((3, 3), 0.125)
    distances = np.full((3, 3), 0.5)
    record = {"idx": 0, "pred": 0, "radius": 0.875 - 2.0**-49, "margin": 1.0, "slack": 0.0}
    verify.check_sample(record, logits, 2.0, distances, errors)
    for radius in (0.875 - 2.0**-51, 0.875, 1.0):
        with pytest.raises(verify.Doubt, match="not proved"):
            verify.check_sample({**record, "radius": radius}, logits, 2.0, distances, errors)


def test_all_rivals_count_not_only_the_runner_up() -> None:
    logits, errors = np.array([1.0, 0.5, 0.0]), np.full((3, 3), 1e-9)
    distances = np.array([[0, 0.1, 4], [0.1, 0, 1], [4, 1, 0]], dtype=float)
    record = {"idx": 0, "pred": 0, "radius": 0.24, "margin": 1.0, "slack": 0.0}
    verify.check_sample(record, logits, 1.0, distances, errors)
    with pytest.raises(verify.Doubt, match=r"record 0: radius 0\.26 is not proved; proved is about 0\.24999"):
        verify.check_sample({**record, "radius": 0.26}, logits, 1.0, distances, errors)


@pytest.mark.parametrize("logits", [[1.0, 1.0, 0.0], [np.nan, 1.0, 0.0], [0.5, 1.0, 0.0], [np.inf, 0.0, 0.0]])
def test_ties_and_logits_that_are_not_finite_prove_nothing(logits: list[float]) -> None:
    record = {"idx": 0, "pred": 0, "radius": 1e-12, "margin": 0.0, "slack": 0.0}
    with pytest.raises(verify.Doubt), np.errstate(all="ignore"):
        verify.check_sample(record, np.array(logits), 1.0, np.ones((3, 3)), np.full((3, 3), 1e-9))


# ---- What is refused, with every hash right ----


def test_a_bound_that_is_neither_proved_nor_refuted_is_doubt(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = network_of(copy).blocks[0]
    with ctx.workprec(128):
        pairs = zip(verify.norm_bounds(block.rotation), verify.norm_bounds(block.product), strict=True)
        proved = min(verify.float_above(r * p) for r, p in pairs)
    claimed = proved - 2.0**-52
    edit(copy / CERTIFICATE, lambda c: c["layers"][2].update(bound=claimed))
    reseal(copy)
    assert f"layer body.2 claims {claimed!r}, neither proved nor refuted; proved is " in refusal(copy, capsys)


def test_a_bound_below_the_norms_is_refuted(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy / CERTIFICATE, lambda c: c["layers"][3].update(bound=0.99))
    reseal(copy)
    assert "layer body.3 claims 0.99, but its norms multiply to " in refusal(copy, capsys)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c["lipschitz"].update(bound=1.0), "bound 1.0 is below the product of the layer bounds"),
        (lambda c: c["layers"][0].update(bound=0.5), "body.0 claims 0.5, but it keeps some distances"),
        (lambda c: c["layers"][0].update(bound=True), "bound must be a number from 0 to 1e+100, got True"),
        (lambda c: c["layers"][2].update(proof="isometry"), 'proof must be "product", got "isometry"'),
        (lambda c: c["layers"].pop(), "layers must list the 5 layers"),
        (lambda c: c["layers"].insert(0, 3), "layers must list the 5 layers"),
        (lambda c: c.update(layers=[3] * 5), "layer body.0 must be an object, got 3"),
        (lambda c: c["head_distances"][0].__setitem__(1, 0.1), "head_distances: 0.1 between rows 0 and 1"),
        (lambda c: c["head_distances"][2].__setitem__(1, 9.0), "head_distances: 9.0 between rows 2 and 1"),
        (lambda c: c["head_distances"][0].pop(), "head_distances must be a table of 10 x 10 numbers"),
        (
            lambda c: c["margin_error"][0].__setitem__(1, 0.0),
            "margin_error 0.0 of 0 and 1 is below the own bound",
        ),
        (lambda c: c["margin_error"][0].__setitem__(1, -1), "margin_error must be a number from 0 to 1e+100"),
        (
            lambda c: c["margin_error"][0].__setitem__(1, 10**400),
            "margin_error must be a number from 0 to 1e+100",
        ),
        (lambda c: c.update(feature_norm=0.1), "feature_norm 0.1 is below the own bound"),
        (lambda c: c.update(feature_error=1e-20), "feature_error 1e-20 is below the own bound"),
        (lambda c: c.update(format=2), "format must be 1, got 2"),
        (lambda c: c.update(format=True), "format must be 1, got true"),
        (lambda c: c.update(semantics="deployed"), 'semantics must be ["real", "deployed"], got "deployed"'),
        (
            lambda c: c["ball_error"]["float32"][0].__setitem__(1, c["margin_error"][0][1]),
            "ball_error.float32 ",
        ),
        (
            lambda c: c["ball_error"]["float64"][3].__setitem__(2, 0),
            "ball_error.float64 0.0 of 3 and 2 is below",
        ),
        (
            lambda c: c["ball_error"].update(float16=[]),
            "ball_error must be an object with tables for float64",
        ),
        (lambda c: c.update(ball_error=[]), "ball_error must be an object with tables for float64, float32"),
        (lambda c: c.update(norm="linf"), 'norm must be "l2", got "linf"'),
        (lambda c: c["input"].update(range=[0, 255]), "input must be"),
        (lambda c: c.update(clipping="assumed"), "not understood ['clipping']"),
        (lambda c: c.pop("margin_error"), "missing ['margin_error']"),
        (lambda c: c.update(lipschitz=1.5), "lipschitz must be an object, got 1.5"),
    ],
)
def test_false_certificates(
    copy: Path, change: Callable[[dict[str, Any]], object], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy / CERTIFICATE, change)
    reseal(copy)
    assert text in refusal(copy, capsys)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(system="cpl"), 'system must be "lipnext", got "cpl"'),
        (lambda c: c["experiment"].update(system="cpl"), 'experiment: system must be "lipnext"'),
        (lambda c: c["experiment"]["model"].update(depth=10**9), "model.depth must be a whole number"),
        (lambda c: c["experiment"]["model"].update(depth=10**6), "10 tensors do not fit depth 1000000"),
        (lambda c: c["experiment"]["model"].update(depth=2.0), "model.depth must be a whole number"),
        (lambda c: c["experiment"]["model"].update(encoding="pixel"), "encoding must be position or channel"),
        (
            lambda c: c["experiment"]["model"].update(encoding="channel"),
            "body.2.position must be a tensor of shape (4, 4, 16)",
        ),
        (lambda c: c["experiment"]["model"].update(patch=True), "model.patch must be a whole number"),
        (
            lambda c: c["experiment"]["model"].update(patch=3),
            "body.2.position must be a tensor of shape (3, 3, 1)",
        ),
        (
            lambda c: c["experiment"]["model"].update(width=17),
            "body.2.rotation must be a tensor of shape (17, 17)",
        ),
        (lambda c: c["experiment"]["model"].update(shift=0.3), "model.shift must be a number from 0 to 0.25"),
        (lambda c: c["experiment"]["model"].update(pool=0), "model.pool must be true or false, got 0"),
        (
            lambda c: c["experiment"]["model"].update(pool=False),
            "head.weight must be a tensor of shape (10, 256)",
        ),
        (lambda c: c["experiment"]["model"].update(normalise=1), "not understood ['normalise']"),
        (lambda c: c["experiment"].update(model=None), "experiment.model must be an object"),
        (lambda c: c["classes"].pop(), "head.weight must be a tensor of shape (9, 16)"),
        (lambda c: c.update(classes="0123456789"), "classes must be a list of at least two names"),
        (lambda c: c.update(input_shape=[1, 8]), "input_shape must be three whole numbers"),
        (lambda c: c.update(input_shape=[1, 8, 10**30]), "input_shape must be a whole number"),
        (lambda c: c.update(std=[0.2]), "not understood ['std']"),
        (lambda c: c.update(format=7), "config.json: format must be 1, got 7"),
    ],
)
def test_false_configs(
    copy: Path, change: Callable[[dict[str, Any]], object], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy / CONFIG, change)
    reseal(copy)
    assert text in refusal(copy, capsys)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("head.bias"), "9 tensors do not fit depth 2"),
        (lambda t: t.update(extra=torch.zeros(1, dtype=torch.float32)), "11 tensors do not fit depth 2"),
        (lambda t: t.update({"head.bias": t["head.bias"].double()}), 'dtype must be "F32", got "F64"'),
        (lambda t: t.update({"head.bias": t["head.bias"].bfloat16()}), 'dtype must be "F32", got "BF16"'),
        (
            lambda t: t["body.2.bias"].fill_(math.nan),
            "body.2.bias must be a tensor of shape (16,) without NaN",
        ),
        (
            lambda t: t["head.weight"].fill_(math.inf),
            "head.weight must be a tensor of shape (10, 16) without NaN",
        ),
        (lambda t: t["body.2.rotation"].fill_(1e38), "body.2 claims"),
        (lambda t: t["body.3.product"].fill_(0), "neither proved nor refuted"),
    ],
)
def test_false_weights(
    copy: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_weights(copy, change)
    reseal(copy)
    assert text in refusal(copy, capsys)


# ---- Files that are not what they should be ----


@pytest.mark.parametrize(
    "key", ["model_sha256", "weights_file_sha256", "config_sha256", "certificate_sha256"]
)
def test_every_hash_is_compared(key: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certificate = json.loads((copy / CERTIFICATE).read_text())
    write_certificate(copy, {**certificate, key: certificate[key].upper()})
    if key == "certificate_sha256":
        edit(copy / CERTIFICATE, lambda c: c.update(certificate_sha256=c[key].upper()))
    assert f"{key} must be" in refusal(copy, capsys)


def test_the_digest_of_the_experiment_is_compared(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reseal(copy)
    assert verify.main(arguments(copy)) == 0
    capsys.readouterr()
    config = json.loads((copy / CONFIG).read_text())
    config["experiment_digest"] = "0" * 64
    (copy / CONFIG).write_text(json.dumps(config))
    certificate = json.loads((copy / CERTIFICATE).read_text())
    certificate["config_sha256"] = hashlib.sha256((copy / CONFIG).read_bytes()).hexdigest()
    write_certificate(copy, certificate)
    assert "experiment_digest must be" in refusal(copy, capsys)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_empty_a_folder_or_a_pipe(
    name: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / name
    path.write_bytes(b"")
    refusal(copy, capsys)
    path.unlink()
    assert f"there is no file {name}" in refusal(copy, capsys)
    path.mkdir()
    assert f"there is no file {name}" in refusal(copy, capsys)
    path.rmdir()
    os.mkfifo(path)
    assert f"there is no file {name}" in refusal(copy, capsys)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": 1, "format": 1}', "a key comes twice"),
        ('{"format": NaN}', "NaN is not finite"),
        ('{"format": 1e999}', "1e999 is not finite"),
        ("[1]", "holds a list, not an object"),
        ('{"a": ' + "[" * 100_000, "is no proper JSON"),
        ('{"a": ' + "1" * 5000 + "}", "is no proper JSON"),
        ("\ufeff{}", "is no proper JSON"),
        ("{} " + " " * 2**22, "is larger than the 4194304 bytes"),
        ('{"format": "\\ud800\\n\\u2028"}', "format must be 1, got"),
    ],
)
def test_improper_json(text: str, reason: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / CONFIG).write_text(text)
    assert reason in refusal(copy, capsys)


def test_every_byte_of_the_certificate_counts(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (copy / CERTIFICATE).read_text()
    # same content, same hash of the content, another text
    for changed in (text + "\n", text.replace("  ", "\t", 1), text.replace("1.0,", "1.00,", 1), text[:-1]):
        (copy / CERTIFICATE).write_text(changed)
        assert "is not written the way its content is written" in refusal(copy, capsys)


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(folder: Path, header: str, body: bytes, length: int | None = None) -> None:
    text = header.encode()
    claimed = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(claimed.to_bytes(8, "little") + text + body)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e.update(data_offsets=[0, 40]), "overlaps another tensor"),
        (lambda e: e.update(data_offsets=[e["data_offsets"][0] + 4, e["data_offsets"][1] + 4]), "overlaps"),
        (lambda e: e.update(data_offsets=[-40, 0]), "data_offsets must be a whole number"),
        (lambda e: e.update(data_offsets=[0.0, 40.0]), "data_offsets must be a whole number"),
        (lambda e: e.update(data_offsets=[2**70, 2**70 + 40]), "data_offsets must be a whole number"),
        (
            lambda e: e.update(data_offsets=[0, 10**10], shape=[10**10 // 4]),
            "malformed|whole number|overlaps|cut",
        ),
        (lambda e: e.update(data_offsets=[0]), "malformed shape or data_offsets"),
        (lambda e: e.update(shape=[11]), "a shape that does not fit its 40 bytes"),
        (lambda e: e.update(shape=[-2, -5]), "shape must be a whole number"),
        (lambda e: e.update(shape=[1] * 9 + [10]), "malformed shape"),
        (lambda e: e.update(shape=10), "malformed shape"),
        (lambda e: e.update(dtype="I32"), 'dtype must be "F32"'),
        (lambda e: e.pop("dtype"), "missing ['dtype']"),
        (lambda e: e.update(strides=[1]), "not understood ['strides']"),
    ],
)
def test_lying_headers(
    change: Callable[[dict[str, Any]], object], reason: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, body = header_of(copy)
    change(header["head.bias"])
    write_header(copy, json.dumps(header), body)
    reseal(copy)
    error = refusal(copy, capsys)
    assert any(part in error for part in reason.split("|"))


def test_gigantic_claims_are_refused_before_anything_is_allocated(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, body = header_of(copy)
    text = json.dumps(header)
    tracemalloc.start()
    try:
        for length in (10 * 2**30, 2**64 - 1, len(text) + len(body) + 1):
            write_header(copy, text, body, length)
            reseal(copy)
            assert f"claims a header of {length} bytes" in refusal(copy, capsys)
        header["head.bias"] = {"dtype": "F32", "shape": [2**31], "data_offsets": [4352, 4352 + 2**33]}
        write_header(copy, json.dumps(header), body)
        reseal(copy)
        assert "'head.bias' overlaps another tensor, leaves a gap or is cut short" in refusal(copy, capsys)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_header_oddities(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, body = header_of(copy)
    text = json.dumps(header)
    write_header(copy, text, body + b"\0\0\0\0")
    assert "holds 4 bytes that belong to no tensor" in refusal(copy, capsys)
    write_header(copy, text[:-1] + ', "head.bias": ' + json.dumps(header["head.bias"]) + "}", body)
    assert "a key comes twice" in refusal(copy, capsys)
    write_header(copy, json.dumps({**header, "head.bias": 3}), body)
    assert "'head.bias' must be an object, got 3" in refusal(copy, capsys)


# ---- Images and records ----


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (
            np.zeros((359, 1, 8, 8), dtype=np.uint8),
            "must hold float32 or float64 images (n, 1, 8, 8), got uint8",
        ),
        (np.zeros((359, 1, 8, 9)), "got float64 of shape (359, 1, 8, 9)"),
        (np.zeros((359, 64)), "got float64 of shape (359, 64)"),
        (np.zeros((0, 1, 8, 8)), "got float64 of shape (0, 1, 8, 8)"),
        (np.float64(3), "cannot be checked|must hold"),
        (np.zeros((358, 1, 8, 8)), "has 359 records for 358 images|is larger than"),
        (np.full((359, 1, 8, 8), 1.5), "must lie in [0, 1]; divide 8-bit values by 255"),
        (np.full((359, 1, 8, 8), np.nan), "must lie in [0, 1]"),
        (np.zeros((359, 1, 8, 8)), "record 0: the label is"),
        (np.array([None]), "cannot be checked: ValueError"),
    ],
)
def test_false_images(
    images: np.ndarray, reason: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(copy / IMAGES, images, allow_pickle=True)
    error = refusal(copy, capsys)
    assert any(part in error for part in reason.split("|"))


def test_something_else_than_npy(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / IMAGES).write_bytes(b"PK\3\4 an archive")
    assert "is no .npy file" in refusal(copy, capsys)
    (copy / IMAGES).write_bytes(b"\x93NUMPY\1\0\xff\xff{'descr': ")
    assert "cannot be checked" in refusal(copy, capsys)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.update(radius=1.01 * r["radius"]), "record 2: radius"),
        (
            lambda r: r.update(radius=math.nextafter(r["radius"] * (1 + 1e-6), 1)),
            "is not proved; proved is about",
        ),
        (lambda r: r.update(radius=-1.0), "radius must be a number from 0"),
        (lambda r: r.update(radius="0.1"), "radius must be a number from 0"),
        (lambda r: r.update(pred=(r["pred"] + 1) % 10), "record 2: "),
        (lambda r: r.update(pred=(r["pred"] + 1) % 10, correct=False, label=r["pred"]), "the label is"),
        (lambda r: r.update(pred=10), "pred must be a whole number from 0 to 9"),
        (lambda r: r.update(correct=not r["correct"]), "correct must be"),
        (lambda r: r.pop("label"), "label must be a whole number"),
        (lambda r: r.update(margin=r["margin"] + 1e-6), "is that of no rival"),
        (lambda r: r.update(slack=-1e-9), "slack must be a number from 0"),
        (lambda r: r.update(idx=3), "idx must be 2, got 3"),
        (lambda r: r.update(norm="linf"), 'norm must be "l2"'),
        (lambda r: r.update(kind="probabilistic", confidence=0.9), 'kind must be "deterministic"'),
        (lambda r: r.update(model_sha256="0" * 64), "model_sha256 must be"),
        (lambda r: r.update(note="trust me"), "not understood ['note']"),
    ],
)
def test_false_records(
    change: Callable[[dict[str, Any]], object], reason: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_record(copy, 2, change)
    assert reason in refusal(copy, capsys)


def test_records_that_are_no_records(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (copy / RECORDS).read_text().splitlines(keepends=True)
    (copy / RECORDS).write_text("".join(lines[:-1]))
    assert "has 358 records for 359 images" in refusal(copy, capsys)
    (copy / RECORDS).write_text("".join([*lines[:-1], "idx,label\n"]))
    assert "record 358 is no proper JSON" in refusal(copy, capsys)
    (copy / RECORDS).write_text("x" * 10**6)
    assert "records.jsonl is larger than" in refusal(copy, capsys)


# ---- Random corruption ----

Corruption = Callable[[Path, random.Random], None]


def flip_a_byte(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(bytes(data))


def flip_a_byte_of_the_certificate(folder: Path, rng: random.Random) -> None:
    data = bytearray((folder / CERTIFICATE).read_bytes())
    data[rng.randrange(len(data))] ^= rng.choice((1, 2, 4, 8, 32))
    (folder / CERTIFICATE).write_bytes(bytes(data))


def cut(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def insert_bytes(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(FILES)
    data, place = path.read_bytes(), rng.randrange(9)
    path.write_bytes(data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place:])


def swap_tensors(folder: Path, rng: random.Random) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        kind = rng.choice(("square", "position", "bias"))
        names = {
            "square": [name for name in tensors if name.endswith(("rotation", "product"))],
            "position": ["body.2.position", "body.3.position"],
            "bias": ["body.2.bias", "body.3.bias"],
        }[kind]
        a, b = rng.sample(names, 2)
        tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()

    edit_weights(folder, swap)
    reseal(folder)


def nudge_a_weight(folder: Path, rng: random.Random) -> None:
    """Anywhere but in the head's bias: where a class is nobody's nearest rival, every claim stays true."""

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        flat = tensors[rng.choice([name for name in sorted(tensors) if name != "head.bias"])].view(-1)
        flat[rng.randrange(len(flat))] += rng.choice((-1e-3, 1e-3))

    edit_weights(folder, nudge)
    reseal(folder)


def round_to_bfloat16(folder: Path, rng: random.Random) -> None:
    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        names = sorted(name for name in tensors if tensors[name].numel() > 20)
        for name in rng.sample(names, rng.randrange(1, len(names) + 1)):
            tensors[name] = tensors[name].bfloat16().float()

    edit_weights(folder, rounded)
    reseal(folder)


def swap_head_rows(folder: Path, rng: random.Random) -> None:
    i, j = rng.sample(range(10), 2)

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.weight"][[i, j]] = tensors["head.weight"][[j, i]]

    edit_weights(folder, swap)
    reseal(folder)


def flip_a_bit_of_a_weight(folder: Path, rng: random.Random) -> None:
    """A sign or one of the upper bits of the exponent or the fraction."""

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        names = sorted(name for name in tensors if name.endswith(("rotation", "product", "head.weight")))
        flat = tensors[rng.choice(names)].view(-1).view(torch.int32)
        k = rng.choice([k for k in range(len(flat)) if abs(flat.view(torch.float32)[k]) > 0.05])
        flat[k] ^= 1 << rng.randrange(17, 31)

    edit_weights(folder, flip)
    reseal(folder)


def claim_a_smaller_k(folder: Path, rng: random.Random) -> None:
    def shrink(certificate: dict[str, Any]) -> None:
        certificate["lipschitz"]["bound"] *= 1 - 10 ** rng.uniform(-13, -1)

    edit(folder / CERTIFICATE, shrink)
    reseal(folder)


def claim_smaller_bounds(folder: Path, rng: random.Random) -> None:
    def shrink(certificate: dict[str, Any]) -> None:
        for layer in certificate["layers"][2:4]:
            layer["bound"] = 1 + (layer["bound"] - 1) * rng.uniform(0, 0.1)
        certificate["lipschitz"]["bound"] = math.prod(e["bound"] for e in certificate["layers"]) * (1 + 1e-15)

    edit(folder / CERTIFICATE, shrink)
    reseal(folder)


def claim_another_distance(folder: Path, rng: random.Random) -> None:
    i, j = rng.sample(range(10), 2)
    factor = 1 + rng.choice((-1, 1)) * 10 ** rng.uniform(-8, 0)

    def change(certificate: dict[str, Any]) -> None:
        certificate["head_distances"][i][j] *= factor

    edit(folder / CERTIFICATE, change)
    reseal(folder)


def claim_a_smaller_error(folder: Path, rng: random.Random) -> None:
    i, j = rng.sample(range(10), 2)
    factor = rng.uniform(0, 0.2)

    def change(certificate: dict[str, Any]) -> None:
        if rng.random() < 0.3:
            certificate["feature_error"] *= factor
        else:
            certificate["margin_error"][i][j] *= factor

    edit(folder / CERTIFICATE, change)
    reseal(folder)


def change_the_architecture(folder: Path, rng: random.Random) -> None:
    changes = [("shift", 0.0625), ("shift", 0.25), ("beta", 0.25), ("beta", 1.0), ("patch", 1), ("depth", 1)]
    key, value = rng.choice([*changes, ("width", 8), ("beta", 0), ("shift", 0)])

    def change(config: dict[str, Any]) -> None:
        config["experiment"]["model"][key] = value

    edit(folder / CONFIG, change)
    reseal(folder)


def raise_a_radius(folder: Path, rng: random.Random) -> None:
    edit_record(
        folder, rng.randrange(359), lambda record: record.update(radius=1.01 * record["radius"] + 1e-12)
    )


def change_a_label(folder: Path, rng: random.Random) -> None:
    shift = rng.randrange(1, 10)

    def change(record: dict[str, Any]) -> None:
        record["pred"] = (record["pred"] + shift) % 10
        record["correct"] = record["pred"] == record["label"]

    edit_record(folder, rng.randrange(359), change)


def swap_images(folder: Path, rng: random.Random) -> None:
    images = np.load(folder / IMAGES)
    labels = [json.loads(line)["pred"] for line in (folder / RECORDS).read_text().splitlines()]
    i = rng.randrange(359)
    j = rng.choice([j for j in range(359) if labels[j] != labels[i]])
    images[[i, j]] = images[[j, i]]
    np.save(folder / IMAGES, images)


def claim_gigabytes(folder: Path, rng: random.Random) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[:8] = (10 * 2**30 + rng.randrange(2**30)).to_bytes(8, "little")
    (folder / WEIGHTS).write_bytes(bytes(data))
    reseal(folder)


SEEN_BY_HASHES: list[Corruption] = [flip_a_byte, flip_a_byte_of_the_certificate, cut, insert_bytes]
SEEN_BY_MATHEMATICS: list[Corruption] = [
    swap_tensors,
    nudge_a_weight,
    round_to_bfloat16,
    swap_head_rows,
    flip_a_bit_of_a_weight,
    claim_a_smaller_k,
    claim_smaller_bounds,
    claim_another_distance,
    claim_a_smaller_error,
    change_the_architecture,
    raise_a_radius,
    change_a_label,
    swap_images,
    claim_gigabytes,
]


def check_corruptions(tiny: Path, folder: Path, numbers: range, capsys: pytest.CaptureFixture[str]) -> None:
    """Corrupt a fresh copy once for each number, in a way that the number decides, and have it refused."""
    corruptions = SEEN_BY_HASHES + SEEN_BY_MATHEMATICS
    for n in numbers:
        corrupt = corruptions[n % len(corruptions)]
        bundle = copied(tiny, folder / str(n))
        corrupt(bundle, random.Random(n))
        error = refusal(bundle, capsys)
        if corrupt in SEEN_BY_MATHEMATICS:
            assert "sha256" not in error, f"{corrupt.__name__} {n}: {error}"
        shutil.rmtree(bundle)


def test_random_corruptions_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_corruptions(tiny, tmp_path, range(72), capsys)


@pytest.mark.slow
def test_five_hundred_more_random_corruptions_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_corruptions(tiny, tmp_path, range(1000, 1500), capsys)
