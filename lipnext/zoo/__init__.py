"""The packaged models, one folder each: bundle, training log, measured numbers, command. `check` derives them again."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lipnext import runs
from lipnext.core.certificate import Certificate
from lipnext.core.eps import parse_eps_list
from lipnext.core.errors import ConfigError, nearest
from lipnext.data.dataset import ImageSet
from lipnext.deployment.bundle import CERTIFICATE, CONFIG, load_experiment, read_json
from lipnext.deployment.card import model_card
from lipnext.deployment.locate import ZOO, packaged
from lipnext.deployment.publish import CARD, read_result
from lipnext.verify import main as verify

# Margins and Gram matrices differ in the last bits from one BLAS to another.
_TOLERANCE = 1e-9


def entries() -> list[dict[str, Any]]:
    """Return the content of every model's `result.json`, with its `name`."""
    return [{"name": name, **read_result(ZOO / name)} for name in packaged()]


def check(name: str, data: str | None = None) -> dict[str, Any]:
    """Derive what is published about a packaged model again, and re-prove its bundle independently.

    Args:
        name: of the model.
        data: folder with its data set; None certifies the test part only where the data is built in.

    Returns:
        name, holds, problems (one line each), and test: "n images certified again", or why not.

    Raises:
        ConfigError: for an unknown name.
        LipnextError: if the bundle or the data cannot be read.
    """
    if name not in packaged():
        raise ConfigError(f"unknown packaged model '{name}'; {nearest(name, packaged())}")
    folder = ZOO / name
    published = read_result(folder)
    problems = [*_documents(folder, published)]
    source = load_experiment(folder).data.name
    with tempfile.TemporaryDirectory() as scratch:
        samples: list[str] = []
        test = f"not at hand, give the {source} folder with --data"
        if data is not None or source == "digits":
            certificate, part = runs.certify_run(folder, data)
            problems += compare(published, certificate, part)
            samples = _sample_files(certificate, part, Path(scratch))
            test = f"{len(part)} images certified again"
        problems += _independent(folder, samples)
    return {"name": name, "holds": not problems, "problems": problems, "test": test}


def compare(published: dict[str, Any], certificate: Certificate, test: ImageSet) -> list[str]:
    """Return a line for each published number that the test part does not give: shares exactly, means and bounds to 1e-9."""
    measured = certificate.summary(test.labels, parse_eps_list(published["cra"]))
    exact = ("n", "clean", "cra", "norm", "kind", "semantics", "arithmetic", "model_sha256")
    problems = [
        f"{key} is published as {published[key]}, measured {measured[key]}"
        for key in exact
        if published[key] != measured[key]
    ]
    for key, was, found in (
        ("acr", published["acr"], measured["acr"]),
        ("margin", published["margin"], measured["margin"]),
        ("lipschitz", published["lipschitz"]["bound"], measured["lipschitz"]["bound"]),
    ):
        if not abs(was - found) <= _TOLERANCE:
            problems.append(f"{key} is published as {was}, measured {found}")
    return problems


def _documents(folder: Path, published: dict[str, Any]) -> list[str]:
    """Whether the folder's documents agree with one another."""
    config, certificate = read_json(folder / CONFIG), read_json(folder / CERTIFICATE)
    problems = []
    for key in ("model_sha256", "lipschitz"):
        if published[key] != certificate[key]:
            problems.append(f"{key} of result.json is not that of {CERTIFICATE}")
    if (folder / CARD).read_text(encoding="utf-8") != model_card(config, certificate, published):
        problems.append(f"{CARD} is not the card of these numbers")
    return problems


def _sample_files(certificate: Certificate, test: ImageSet, folder: Path) -> list[str]:
    """What `verify` re-proves radii from, as options for it."""
    images, records = folder / "images.npy", folder / "records.jsonl"
    np.save(images, test.float_images().numpy())
    certificate.to_jsonl(records, test.labels)
    return ["--images", str(images), "--records", str(records), "--seed", "0"]


def _independent(folder: Path, samples: list[str]) -> list[str]:
    said, refused = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(refused):
        code = verify([str(folder), *samples, "--json"])
    if code == 2:  # a missing package is no finding about the model
        raise ConfigError(f"cannot verify: {refused.getvalue().strip().splitlines()[-1]}")
    return [] if code == 0 else [f"verify: {json.loads(said.getvalue())['reason']}"]
