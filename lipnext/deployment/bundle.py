"""The bundle: `model.safetensors`, `config.json` and `certificate.json` in one folder.

The weights are those that are certified and executed: matrices re-orthogonalised in float64, products and
unit rows formed there, each rounded once to float32. `certificate.json` holds every bound with its proof, the
hashes of the other two files and one of itself; loading compares the hashes, and certifying proves the bounds
again from the weights.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lipnext._version import __version__
from lipnext.core.bound import norm_label
from lipnext.core.classifier import Classifier
from lipnext.core.errors import BundleError, LipnextError, TrainingError
from lipnext.core.experiment import Experiment
from lipnext.core.files import atomic_write, sha256_file, sha256_tensors, write_json
from lipnext.core.network import LipschitzNetwork
from lipnext.manifold.polar import retract
from lipnext.optim.groups import split_parameters
from lipnext.systems import build_network, get

FORMAT = 1
WEIGHTS, CONFIG, CERTIFICATE = "model.safetensors", "config.json", "certificate.json"


@torch.no_grad()
def polish(network: LipschitzNetwork) -> LipschitzNetwork:
    """Return the network for inference: retracted and materialised in float64, rounded once to float32."""
    exact = copy.deepcopy(network).cpu().double()
    orthogonal, _ = split_parameters(exact)
    for matrix in orthogonal.values():
        matrix.copy_(retract(matrix))
    return exact.materialise().float()


def save_bundle(
    network: LipschitzNetwork, experiment: Experiment, classes: tuple[str, ...], folder: Path
) -> dict[str, Any]:
    """Polish, prove and write the three files, the certificate last; return what it says.

    Raises:
        TrainingError: if the disk does not take them.
        UnsoundError: if the bounds cannot be proved.
    """
    return write_bundle(polish(network), experiment, classes, folder)


def write_bundle(
    network: LipschitzNetwork, experiment: Experiment, classes: tuple[str, ...], folder: Path
) -> dict[str, Any]:
    """Prove a network for inference, as `polish` and `load_bundle` give it, and write the three files.

    Raises:
        TrainingError, UnsoundError: as `save_bundle`.
    """
    system = get(experiment.system)
    certifier = system.certify(network)
    config = {
        "format": FORMAT,
        "system": experiment.system,
        "input_shape": list(network.input_shape),
        "classes": list(classes),
        "experiment": experiment.model_dump(mode="json"),
        "experiment_digest": experiment.digest(),
    }
    weights = {name: t.contiguous() for name, t in network.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / WEIGHTS, "wb") as file:
            # one entry: safetensors writes several in random order, and equal runs should give equal bytes
            file.write(save(weights, metadata={"format": "pt"}))
        write_json(folder / CONFIG, config)
        certificate = {
            "format": FORMAT,
            "lipnext_version": __version__,
            "torch_version": torch.__version__,
            "model_sha256": sha256_tensors(weights),
            "weights_file_sha256": sha256_file(folder / WEIGHTS),
            "config_sha256": sha256_file(folder / CONFIG),
            "norm": norm_label(system.norm),
            "input": {"shape": config["input_shape"], "range": [0, 1], "preprocessing": "none"},
            **certifier.describe(),
        }
        certificate["certificate_sha256"] = _hash(certificate)
        write_json(folder / CERTIFICATE, certificate)
    except OSError as error:
        raise TrainingError(
            f"cannot write the bundle to {folder}: {error.strerror or error}; free some space and run the "
            "same command again, it goes on from the last checkpoint"
        ) from error
    return certificate


def load_bundle(folder: Path) -> Classifier:
    """Load a classifier ready to certify, after comparing all hashes.

    Raises:
        BundleError: if a file is missing, damaged, changed, or written by a newer version.
    """
    _check_complete(folder)
    certificate, config = read_json(folder / CERTIFICATE), read_json(folder / CONFIG)
    for name, document in ((CERTIFICATE, certificate), (CONFIG, config)):
        if document.get("format") != FORMAT:
            raise BundleError(
                f"{folder / name} has format {document.get('format')!r}, this version reads {FORMAT}; "
                "upgrade lipnext or export the model again"
            )
    if certificate.get("certificate_sha256") != _hash(certificate):
        raise BundleError(
            f"{folder / CERTIFICATE} was changed (its own sha256 differs); copy the bundle again"
        )
    for name, key in ((CONFIG, "config_sha256"), (WEIGHTS, "weights_file_sha256")):
        if sha256_file(folder / name) != certificate.get(key):
            raise BundleError(
                f"{folder / name} is not the file that was certified (its sha256 differs from "
                f"{CERTIFICATE}); copy the bundle again"
            )
    try:
        model = _rebuild(config)
    except (LipnextError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{folder / CONFIG} cannot be used: {error}") from error
    _load_weights(model.net, folder / WEIGHTS, certificate.get("model_sha256"))
    return model.eval()


def load_experiment(folder: Path) -> Experiment:
    """Return the experiment that a bundle was trained by.

    Raises:
        BundleError: if the config is missing or damaged.
    """
    _check_complete(folder)
    try:
        return Experiment.model_validate(read_json(folder / CONFIG)["experiment"])
    except (LipnextError, KeyError) as error:
        raise BundleError(f"{folder / CONFIG} cannot be used: {error}") from error


def _check_complete(folder: Path) -> None:
    if not folder.is_dir():
        raise BundleError(
            f"{folder} is no folder; give a run folder with {WEIGHTS}, {CONFIG} and {CERTIFICATE}"
        )
    for name in (WEIGHTS, CONFIG, CERTIFICATE):
        if not (folder / name).is_file():
            raise BundleError(
                f"{folder} has no {name}: the run is not finished or no run at all; "
                "finish it with lipnext train"
            )


def _rebuild(config: dict[str, Any]) -> Classifier:
    """The classifier that the config describes: materialised, in float32, with untrained weights."""
    experiment = Experiment.model_validate(config["experiment"])
    shape = cast(tuple[int, int, int], tuple(int(n) for n in config["input_shape"]))
    classes = tuple(config["classes"])
    network = build_network(experiment, shape, len(classes)).materialise().float()
    return Classifier(network, get(experiment.system).certify, shape, classes, experiment.system)


def _load_weights(network: nn.Module, path: Path, sha256: object) -> None:
    """Read the tensors; refuse missing, superfluous, misshapen or changed ones and all but float32."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(
            f"{path} is damaged or no safetensors file ({error}); copy the bundle again"
        ) from error
    expected = network.state_dict()
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        raise BundleError(
            f"{path} does not fit {CONFIG}: missing {sorted(missing)[:3] or 'nothing'}, "
            f"not known {sorted(extra)[:3] or 'nothing'}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.shape != expected[name].shape:
            raise BundleError(
                f"{path}: {name} must be float32 of shape {tuple(expected[name].shape)}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    if sha256_tensors(tensors) != sha256:
        raise BundleError(
            f"{path} does not hold the weights that were certified (model_sha256 in {CERTIFICATE} differs); "
            "copy the bundle again"
        )
    network.load_state_dict(tensors)


def _hash(certificate: dict[str, Any]) -> str:
    """The sha256 of the canonical JSON of everything in the certificate but this hash."""
    rest = {key: value for key, value in certificate.items() if key != "certificate_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a bundle's documents.

    Raises:
        BundleError: if it is damaged or no object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is damaged: {error}; copy the bundle again") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path} is damaged: it holds a {type(document).__name__}, not an object")
    return document
