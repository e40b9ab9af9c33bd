"""From an experiment to a finished run and back: what the command line and the Python API share."""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lipnext import systems
from lipnext._version import __version__
from lipnext.auditing.audit import USUAL, Audit, parse_attacks
from lipnext.auditing.audit import audit as run_audit
from lipnext.certificates.clarke.certifier import ClarkeCertifier
from lipnext.certificates.clarke.jacobian import Method
from lipnext.certificates.module import certify_module
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.classifier import Classifier
from lipnext.core.eps import parse_eps, parse_eps_list
from lipnext.core.errors import BundleError, ConfigError, TrainingError
from lipnext.core.experiment import DataSpec, Experiment
from lipnext.core.files import atomic_write, write_json
from lipnext.core.seed import generator
from lipnext.core.world import join
from lipnext.data.batches import count_batches
from lipnext.data.dataset import ImageSet
from lipnext.data.dataset import load as load_data
from lipnext.data.detect import detect
from lipnext.deployment.bundle import CERTIFICATE, load_bundle, load_experiment, save_bundle
from lipnext.deployment.export import check_target
from lipnext.deployment.export import export as export_network
from lipnext.deployment.factory import load_factory
from lipnext.deployment.hub import check_repository, upload
from lipnext.deployment.locate import locate
from lipnext.deployment.publish import stage
from lipnext.deployment.vnnlib import query
from lipnext.training.loop import check_device, check_parts, check_shard, resolve_precision
from lipnext.training.loop import train as train_network
from lipnext.training.objective import Objective
from lipnext.training.progress import Silent, reporter
from lipnext.training.saving import check_checkpoints

ANALYSED_AT_ONCE = 8
DECODED = 2**30
"""Bytes of float32 images that are certified in one call. Each call hashes the weights, which is worth many batches."""
EXPERIMENT, RESULT = "experiment.yaml", "result.json"


def resolve(what: str | Experiment, data: str | None = None, overrides: Sequence[str] = ()) -> Experiment:
    """Find an experiment by name or YAML file and apply the data folder and overrides.

    Args:
        what: an experiment, "digits", "lipnext/cifar10-cpu", or the path of a YAML file.
        data: folder with the data set; its form is detected.
        overrides: "section.key=value".

    Raises:
        ConfigError, DataError: one line each.
    """
    if isinstance(what, Experiment):
        experiment = what
    elif what.endswith((".yaml", ".yml")) or Path(what).is_file():
        experiment = Experiment.from_yaml(what)
    else:
        experiment = systems.experiment(what)
    changes = []
    if data is not None:
        name = detect(Path(data), experiment.data.name)
        changes = [f"data.name={name}", f"data.path={Path(data).resolve()}"]
    return resolve_precision(experiment.override([*changes, *overrides]))


def train(
    what: str | Experiment,
    out: str | Path,
    *,
    data: str | None = None,
    overrides: Sequence[str] = (),
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train, prove the bounds, write the bundle, certify the test part once.

    Goes on where an earlier call with the same arguments was interrupted. Under torchrun all processes train together; the
    first one writes, proves and certifies.

    Args:
        what: an experiment, its name, or its YAML file.
        out: run folder; created.
        data: folder with the data set.
        overrides: "section.key=value".
        tensorboard: mirror the log for TensorBoard.

    Returns:
        The content of `result.json`: clean, cra, acr, minutes and what they were obtained by. Nothing on any process
        but the first.

    Raises:
        LipnextError: one line that says what to do.
        Interrupted: after a signal, once a checkpoint is saved.
    """
    experiment = resolve(what, data, overrides)
    folder = Path(out)
    with join(experiment.train.device) as world:
        is_new = world.first(lambda: _check_free(folder, experiment))
        splits = load_data(experiment.data)
        network = systems.build_network(experiment, splits.train.shape, len(splits.train.classes))
        losses = systems.get(experiment.system).losses
        Objective(experiment.loss, losses)  # a loss that does not exist is refused before the folder is made
        check_parts(network, experiment, len(splits.train), world)
        check_shard(experiment.train)
        check_checkpoints(experiment.train)
        check_device(experiment, splits.train)
        if is_new:
            world.first(lambda: _claim(folder, experiment))
        steps = experiment.train.epochs * count_batches(len(splits.train), experiment.train.batch_size)
        title = f"training {experiment.preset or experiment.system}"
        with reporter(title, steps) if world.is_first else nullcontext(Silent()) as progress:
            final, counters = train_network(
                network,
                experiment,
                splits.train,
                splits.validation,
                folder,
                losses=losses,
                reporter=progress,
                tensorboard=tensorboard,
                world=world,
            )
    if not world.is_first:
        return {}
    save_bundle(final, experiment, splits.train.classes, folder)
    certificate, test = certify_run(folder, test=splits.test)
    result = {
        **certificate.summary(test.labels, parse_eps_list(experiment.certify.eps)),
        "preset": experiment.preset,
        "system": experiment.system,
        "seed": experiment.seed,
        "minutes": round(counters.seconds / 60, 2),
        "images_per_second": round(
            steps * min(experiment.train.batch_size, len(splits.train)) / max(counters.seconds, 1e-9), 1
        ),
        "epochs": experiment.train.epochs,
        "precision": experiment.train.precision,
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "experiment_digest": experiment.digest(),
        "lipnext_version": __version__,
        "torch_version": torch.__version__,
    }
    write_json(folder / RESULT, result)
    return result


def load(path: str | Path) -> Classifier:
    """Load a finished run or a bundle as a `Classifier`.

    Args:
        path: a folder, the name of a packaged model, or "hf:owner/name[@revision]".

    Raises:
        BundleError: where nothing of that name is there or can be fetched, or a file is missing, damaged, changed since it was
            certified, or written by a newer version.
    """
    return load_bundle(locate(path))


def certify_run(
    path: str | Path,
    data: str | None = None,
    test: ImageSet | None = None,
    semantics: Semantics | None = None,
    arithmetic: str | None = None,
) -> tuple[Certificate, ImageSet]:
    """Certify a test part with a finished run, or as many of its images as the experiment's `certify.images` says.

    Args:
        path: run folder.
        data: folder with a data set whose test part is taken; None takes the run's own data.
        test: the test part itself, where it is in memory already.
        semantics: "real" or "deployed"; None takes that of the experiment.
        arithmetic: "float64" or "float32", of the deployed program; None takes that of the experiment.

    Returns:
        The certificate and the test part it speaks of.
    """
    model, experiment, test = _open(locate(path), data, test)
    wanted = experiment.certify.images
    if wanted is not None and wanted < len(test):
        test = test.subset(torch.arange(wanted) * len(test) // wanted)
    with reporter("certifying", len(test)) as progress:
        certify = partial(
            model.certify,
            batch_size=experiment.certify.batch_size,
            progress=progress.advance,
            semantics=semantics or experiment.certify.semantics,
            arithmetic=arithmetic or experiment.certify.arithmetic,
        )
        return certify_set(certify, test, experiment.certify.batch_size), test


def certify_set(
    certify: Callable[[Tensor], Certificate], test: ImageSet, batch_size: int = 512
) -> Certificate:
    """Certify every image of a set once, with no more of them in memory than `DECODED` bytes or one batch.

    Args:
        certify: maps float32 images `(n, C, H, W)` to their certificate.
        test: what to certify.
        batch_size: images that `certify` evaluates together.

    Returns:
        The certificate of all images, in order.
    """
    batches = max(1, DECODED // (4 * math.prod(test.shape) * batch_size))
    chunks = torch.arange(len(test)).split(batches * batch_size)
    return Certificate.cat([certify(test.float_images(chunk)) for chunk in chunks])


def certify_model(
    model: str,
    data: str | None = None,
    semantics: Semantics | None = None,
    arithmetic: str | None = None,
) -> tuple[Certificate, ImageSet]:
    """Certify a test part with a network of one's own.

    Args:
        model: "file.py:factory", as `deployment.factory.load_factory`.
        data: folder with a data set; None takes the embedded digits.
        semantics: "real" (None) or "deployed".
        arithmetic: "float64" (None), "float32" or "float16", of the deployed program.

    Returns:
        The certificate and the test part it speaks of.
    """
    spec = DataSpec() if data is None else DataSpec(name=detect(Path(data)), path=data)
    test = load_data(spec).test
    net = certify_module(
        load_factory(model),
        test.shape,
        test.classes,
        semantics=semantics or "real",
        dtype=getattr(torch, arithmetic or "float64"),
    )
    with reporter("certifying", len(test)) as progress:
        return certify_set(partial(net.certify, progress=progress.advance), test), test


def analyse(model: str, data: str | None = None, *, eps: str, samples: int = 10) -> dict[str, Any]:
    """Bound local linf constants and certify linf radii for the first images of a test part, with a network of one's own.

    Args:
        model: "file.py:factory", as `deployment.factory.load_factory`.
        data: folder with a data set; None takes the embedded digits.
        eps: linf distances for the constants, "2/255,8/255".
        samples: how many images; all where the test part has no more.

    Returns:
        The certificate's summary, and `images`: for each its label, radius, and by eps the constants of each method and the
        pixels, counted row by row, with which the label's logit can only grow or only fall.

    Raises:
        LipnextError: one line that says what to do.
    """
    wanted = parse_eps_list(eps)
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}")
    spec = DataSpec() if data is None else DataSpec(name=detect(Path(data)), path=data)
    test = load_data(spec).test
    test = test.subset(torch.arange(min(samples, len(test))))
    certifier = ClarkeCertifier(load_factory(model), test.shape)
    if certifier.classes != len(test.classes):
        raise ConfigError(
            f"the network gives {certifier.classes} logits, the data set has {len(test.classes)} classes; "
            "take the data set that the network was trained for"
        )
    certificates, rows = [], []
    with reporter("analysing", len(test)) as progress:
        for index in torch.arange(len(test)).split(ANALYSED_AT_ONCE):
            images = test.float_images(index)
            certificate = certifier(images)
            certificates.append(certificate)
            constants: dict[str, dict[str, list[float]]] = {}
            signs: dict[str, list[list[int]]] = {}
            for name, size in wanted.items():
                constants[name] = {
                    method: certifier.constants(images, size, method).largest.tolist()
                    for method in get_args(Method)
                }
                signs[name] = certifier.monotone(images, size).flatten(1).tolist()
            rows += [
                {
                    "index": int(index[i]),
                    "label": int(certificate.label[i]),
                    "true": int(test.labels[index[i]]),
                    "radius": certificate.radius[i].item(),
                    "margin": certificate.margin[i].item(),
                    "constants": {
                        name: {method: values[i] for method, values in found.items()}
                        for name, found in constants.items()
                    },
                    "growing": {name: _places(found[i], 1) for name, found in signs.items()},
                    "falling": {name: _places(found[i], -1) for name, found in signs.items()},
                }
                for i in range(len(index))
            ]
            progress.advance(len(index))
    return Certificate.cat(certificates).summary(test.labels, wanted) | {"images": rows}


def _places(signs: list[int], sign: int) -> list[int]:
    return [place for place, found in enumerate(signs) if found == sign]


def audit(
    path: str | Path,
    data: str | None = None,
    *,
    samples: int = 100,
    attacks: str | None = None,
    eps: str | None = None,
    seed: int = 0,
    test: ImageSet | None = None,
    semantics: Semantics = "real",
    arithmetic: str | None = None,
) -> Audit:
    """Try to refute the certificates of samples drawn from a test part.

    Args:
        path: run folder.
        data: folder with a data set whose test part is taken; None takes the run's own data.
        samples: how many; all where the test part has no more.
        attacks: names, "minimal-norm,pgd,apgd-ce"; None takes `auditing.audit.USUAL`.
        eps: radii, "36/255,72/255"; None takes those of the experiment.
        seed: decides which samples.
        test: the test part itself, where it is in memory already.
        semantics: what the certificates speak of, "real" arithmetic or the "deployed" program.
        arithmetic: in which that program runs, "float64" or "float32"; None takes the experiment's.

    Returns:
        What was found; `violations` is empty for a sound library.

    Raises:
        LipnextError: one line that says what to do.
    """
    names = list(USUAL) if attacks is None else parse_attacks(attacks)
    wanted = None if eps is None else parse_eps_list(eps)
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}")
    folder = locate(path)
    model, experiment, test = _open(folder, data, test)
    order = torch.randperm(len(test), generator=generator("audit", seed))
    index = order[:samples].sort().values
    stated = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
    with reporter("auditing", len(index)) as progress:
        return run_audit(
            model,
            test.float_images(index),
            test.labels[index],
            parse_eps_list(experiment.certify.eps) if wanted is None else wanted,
            attacks=names,
            index=index,
            stated=stated,
            semantics=semantics,
            arithmetic="float64" if semantics == "real" else arithmetic or experiment.certify.arithmetic,
            progress=progress.advance,
        )


def export(path: str | Path, to: str, out: str | Path, *, dtype: str = "float64") -> dict[str, Any]:
    """Write a run's network for another runtime; see `deployment.export.export`.

    Args:
        path: run folder.
        to: "onnx", "torch" or "safetensors".
        out: the file, which must end in .onnx, .pt2 or .safetensors.
        dtype: in which the program computes, "float64" or "float32".
    """
    check_target(to, Path(out), dtype)
    folder = locate(path)
    return export_network(load_bundle(folder), folder, to, Path(out), dtype)


def export_query(
    path: str | Path, out: str | Path, *, sample: int, eps: str, data: str | None = None
) -> dict[str, Any]:
    """Write a VNN-LIB query about one image of a test part; see `deployment.vnnlib.query`.

    Args:
        path: run folder.
        out: the file, which must end in .vnnlib.
        sample: number of the image in the test part.
        eps: l2 radius of the ball that holds the box, "36/255".
        data: folder with a data set whose test part is taken; None takes the run's own data.

    Returns:
        file, sample, label, radius, eps, certified.
    """
    out, radius = Path(out), parse_eps(eps)
    if out.suffix != ".vnnlib":
        raise ConfigError(f"a file for vnnlib must end in .vnnlib, got '{out}'")
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"the folder {out.resolve().parent} does not exist; create it first")
    model, _, test = _open(locate(path), data)
    if not 0 <= sample < len(test):
        raise ConfigError(f"sample must be in 0..{len(test) - 1}, got {sample}")
    image = test.float_images(torch.tensor([sample]))
    certificate = model.certify(image)
    with atomic_write(out) as file:
        file.write(query(image[0], len(model.classes), certificate, sample, radius))
    return {
        "file": str(out),
        "to": "vnnlib",
        "sample": sample,
        "label": int(certificate.label),
        "radius": float(certificate.radius),
        "eps": eps,
        "certified": bool(certificate.certified_at(radius)),
        "model_sha256": certificate.model_sha256,
    }


def push(
    path: str | Path, name: str, out: str | Path | None = None, *, dry_run: bool = False
) -> dict[str, Any]:
    """Send a finished run to the Hugging Face hub as the model NAME.

    Args:
        path: run folder.
        name: "owner/name".
        out: new folder in which a copy of what is sent is kept; None keeps none.
        dry_run: send nothing.

    Returns:
        repository, files (name to bytes), and url of the commit, None where nothing was sent.

    Raises:
        LipnextError: one line that says what to do.
    """
    check_repository(name)
    if out is not None and Path(out).exists():
        raise ConfigError(f"--out {out} exists; give a new folder")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if out is None else Path(out)
        stage(locate(path), folder)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        url = None if dry_run else upload(folder, name)
    return {"repository": name, "files": files, "url": url}


def data_of(experiment: Experiment, data: str | None) -> DataSpec:
    """The data set of a run: its own, or that of another folder with the same settings."""
    if data is None:
        return experiment.data
    name = detect(Path(data), experiment.data.name)
    return experiment.data.model_copy(update={"name": name, "path": str(data)})


def _open(
    path: Path, data: str | None, test: ImageSet | None = None
) -> tuple[Classifier, Experiment, ImageSet]:
    """Load a finished run and the test part to certify: its own, that of another folder, or the one given."""
    model, experiment = load_bundle(path), load_experiment(path)
    if test is None:
        test = load_data(data_of(experiment, data)).test
    if len(test.classes) != len(model.classes):
        raise ConfigError(
            f"the model knows {len(model.classes)} classes, the data set has {len(test.classes)}; "
            "certify on data with the classes it was trained on"
        )
    # Sources without names number their classes; names, where both have them, must agree in order.
    numbers = tuple(str(k) for k in range(len(test.classes)))
    if test.classes != model.classes and numbers not in (test.classes, model.classes):
        raise ConfigError(
            f"the model's classes are {', '.join(model.classes[:5])}..., those of the data set "
            f"{', '.join(test.classes[:5])}...; certify on data with the same classes in the same order"
        )
    return model, experiment, test


def _check_free(folder: Path, experiment: Experiment) -> bool:
    """Return True for a new run folder, False for a run to go on with; refuse a finished or foreign one."""
    written = folder / EXPERIMENT
    if written.is_file():
        if Experiment.from_yaml(written).digest() != experiment.digest():
            raise BundleError(
                f"{folder} holds a run of another experiment; choose another --out, or continue that one "
                f"with lipnext train {written} --out {folder}"
            )
        if (folder / CERTIFICATE).is_file() and (folder / RESULT).is_file():
            raise BundleError(
                f"{folder} holds this run, finished; see it with lipnext certify {folder}, "
                "or choose another --out"
            )
        return False
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder} is not empty and holds no run; give a new folder")
    return True


def _claim(folder: Path, experiment: Experiment) -> None:
    """Make the run folder this experiment's, after all that a mistyped command can fail at."""
    written = folder / EXPERIMENT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        experiment.to_yaml(written)
    except OSError as error:
        raise TrainingError(
            f"cannot write {written}: {error.strerror or error}; choose another --out"
        ) from error
