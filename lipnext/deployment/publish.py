"""A bundle for others: proved again, without the folders of this machine, with a model card of measured numbers."""

import shutil
from pathlib import Path
from typing import Any, cast

from lipnext.core.errors import BundleError
from lipnext.core.files import atomic_write, write_json
from lipnext.core.network import LipschitzNetwork
from lipnext.deployment.bundle import (
    CERTIFICATE,
    CONFIG,
    load_bundle,
    load_experiment,
    read_json,
    write_bundle,
)
from lipnext.deployment.card import model_card

LOG, RESULT, CARD = "log.jsonl", "result.json", "README.md"


def stage(run: Path, target: Path) -> dict[str, Any]:
    """Write the publishable copy of a run: bundle, result, log and card; weights bit for bit the same.

    `config.json` of a run says where its data lay; that path is left out, which makes a new proof and new hashes necessary.

    Args:
        run: run folder, with `result.json`.
        target: folder; created, files of the same names are replaced.

    Returns:
        The content of the new `certificate.json`.

    Raises:
        BundleError: if the bundle is damaged, or nothing was measured.
    """
    result, model, experiment = read_result(run), load_bundle(run), load_experiment(run)
    if result.get("model_sha256") != read_json(run / CERTIFICATE)["model_sha256"]:
        raise BundleError(f"{run / RESULT} speaks of other weights than the bundle; it is not its result")
    anonymous = experiment.model_copy(update={"data": experiment.data.model_copy(update={"path": None})})
    certificate = write_bundle(cast(LipschitzNetwork, model.net), anonymous, model.classes, target)
    write_result(target, result | {"experiment_digest": anonymous.digest()})
    if (run / LOG).is_file():
        shutil.copyfile(run / LOG, target / LOG)
    return certificate


def read_result(run: Path) -> dict[str, Any]:
    """Return what was measured when the run ended.

    Raises:
        BundleError: if there is no such file or it is damaged.
    """
    if not (run / RESULT).is_file():
        raise BundleError(
            f"{run} has no {RESULT}, so nothing was measured; give the folder of a finished run"
        )
    return read_json(run / RESULT)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json` and the card that quotes it."""
    write_json(folder / RESULT, result)
    with atomic_write(folder / CARD) as file:
        file.write(model_card(read_json(folder / CONFIG), read_json(folder / CERTIFICATE), result))
