"""Several runs side by side: same data, same test images, equal training time or epochs, paired intervals.

Radii of another norm, kind or semantics are not comparable: each has its own table, unless one norm is asked for, into which
all radii are then converted with their dimension factor.

A row is a model; runs of one experiment that differ in their seed alone are one row. Intervals are the percentiles of a
bootstrap that draws test images, the same for all rows, and seeds anew.
"""

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lipnext import runs, systems
from lipnext._version import __version__
from lipnext.certificates.conversion import in_norm
from lipnext.certificates.nearest_neighbour import NearestNeighbour
from lipnext.core.bound import norm_label
from lipnext.core.certificate import Certificate
from lipnext.core.classifier import Classifier
from lipnext.core.eps import parse_eps, parse_eps_list
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import Experiment
from lipnext.core.rounding import fraction_down
from lipnext.data.dataset import Dataset, ImageSet, Splits, load
from lipnext.deployment.bundle import load_bundle, load_experiment
from lipnext.deployment.figures import Curve
from lipnext.training.log import LOG, epochs
from lipnext.training.loop import train as train_network
from lipnext.training.progress import reporter

EPS = "36/255,72/255,108/255,1"
RESAMPLES = 1000
LEVEL = 0.95
SHORT_EPOCHS = 5
NEAREST = "nearest neighbour"
Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A certified run.

    Attributes:
        name: of the row that it belongs to, such as "lipnext/digits".
        seed: of the training.
        facts: plain numbers that are no accuracy.
        certificate: of the test part.
        published: the bound that the system's own code would state over the proved one, at most 1 up to rounding; None
            where its own bound is proved too.
        attacked: what the attacks left, by name of eps, and the number of images; None where none were made.
        converted: whether the radii were proved in another norm; attacks in that norm are left out then.
    """

    name: str
    seed: int
    facts: dict[str, Any]
    certificate: Certificate
    published: float | None = None
    attacked: dict[str, Any] | None = None
    converted: bool = False


def compare(
    what: Sequence[str],
    *,
    data: str | None = None,
    folder: str | Path = "runs",
    minutes: float | None = None,
    epochs: int | None = None,
    seeds: int = 1,
    overrides: Sequence[str] = (),
    eps: str = EPS,
    attacked: int = 0,
    images: int | None = None,
    norm: float | None = None,
    nearest_neighbour: bool = True,
) -> dict[str, Any]:
    """Load finished runs and train the experiments that are named, then certify all on one test part.

    Args:
        what: run folders and names of experiments, in the order of the table; intervals of differences are to the first.
        data: folder with the data set, for all.
        folder: where the experiments are trained; a run that is there and finished is not trained again.
        minutes: training time of each experiment: as many epochs as fit, measured before on this machine.
        epochs: number of epochs of each experiment; None and no `minutes` takes the experiment's own.
        seeds: of each experiment, 0, 1, ...
        overrides: "section.key=value", for each experiment.
        eps: radii of the table.
        attacked: test images to attack, 0 for none.
        images: how many test images to certify, evenly spaced, for certificates that take long; None takes the smallest
            `certify.images` of the runs, or all where none has one.
        norm: 2.0 or inf, into which all radii are converted; None keeps each in its own.
        nearest_neighbour: whether the nearest-neighbour certificate of the training part is a row.

    Returns:
        The document that `lipnext compare --json` prints.

    Raises:
        LipnextError: one line, for mixed data sets or splits too.
    """
    wanted = parse_eps_list(eps)
    if minutes is not None and epochs is not None:
        raise ConfigError("compare takes --minutes or --epochs, not both")
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        raise ConfigError(f"--minutes must be above 0, got {minutes:g}")
    if seeds < 1 or attacked < 0 or (images is not None and images < 1):
        raise ConfigError(
            f"seeds and images must be at least 1 and attacked at least 0, got {seeds}, {images} and {attacked}"
        )
    _check_names(what)
    folders: list[tuple[str, Path]] = []
    for name in what:
        if Path(name).is_dir():
            folders.append((_row_name(load_experiment(Path(name))), Path(name)))
            continue
        for seed in range(seeds):
            experiment = runs.resolve(name, data, [*overrides, f"seed={seed}"])
            folders.append((_row_name(experiment), _trained(experiment, Path(folder), minutes, epochs)))
    splits = _common_data([path for _, path in folders], data)
    if images is None:
        counts = [load_experiment(path).certify.images for _, path in folders]
        images = min((count for count in counts if count is not None), default=None)
    if images is not None and images < len(splits.test):
        chosen = torch.arange(images) * len(splits.test) // images
        splits = replace(splits, test=splits.test.subset(chosen))
    found = [measure(name, path, splits, wanted, attacked) for name, path in folders]
    if nearest_neighbour and (norm is not None or any(_is_l2(run) for run in found)):
        found.append(nearest(splits))
    if norm is not None:
        found = [_converted(run, norm, math.prod(splits.test.shape)) for run in found]
    return {
        "lipnext_version": __version__,
        "torch_version": torch.__version__,
        "n": len(splits.test),
        "test_sha256": splits.test.sha256(),
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL},
        "tables": [tabulate(alike, splits.test, wanted) for alike in _alike(found)],
    }


def measure(name: str, path: Path, splits: Splits, eps: Mapping[str, Any], attacked: int = 0) -> Run:
    """Certify one run and time it."""
    model, experiment = load_bundle(path), load_experiment(path)
    test = splits.test
    started = time.perf_counter()
    model.certify(test.float_images(slice(1)))
    proving = time.perf_counter() - started
    started = time.perf_counter()
    with reporter(f"certifying {name}", len(test)) as progress:
        size = experiment.certify.batch_size
        certify = partial(model.certify, batch_size=size, progress=progress.advance)
        certificate = runs.certify_set(certify, test, size)
    seconds = time.perf_counter() - started
    result = (
        json.loads((path / runs.RESULT).read_text(encoding="utf-8")) if (path / runs.RESULT).is_file() else {}
    )
    trained = result.get("minutes")
    facts = {
        "parameters": result.get("parameters", sum(p.numel() for p in model.net.parameters())),
        "minutes": trained,
        "epochs": result.get("epochs"),
        "precision": result.get("precision"),
        "training_images_per_second": result["epochs"] * len(splits.train) / (60 * trained)
        if trained
        else None,
        "certified_images_per_second": len(test) / seconds,
        "proving_seconds": proving,
    }
    estimate = _published(model)
    if estimate is not None:
        facts["published"] = {"constant": estimate.value, "method": estimate.method}
    bound = certificate.lipschitz
    share = None if estimate is None or bound is None else min(estimate.value / bound.value, 1.0)
    return Run(
        name=name,
        seed=experiment.seed,
        facts=facts,
        certificate=certificate,
        published=share,
        attacked=_attacked(path, splits, eps, attacked) if attacked else None,
    )


def nearest(splits: Splits) -> Run:
    """Certify by the nearest neighbour in the training part.

    Raises:
        ConfigError: if the data set is not held in memory.
    """
    train, test = splits.train, splits.test
    if not (isinstance(train, Dataset) and isinstance(test, Dataset)):
        raise ConfigError(
            "the nearest neighbour searches all training images in memory, which data.name=shards does not hold; "
            "take --no-nearest-neighbour"
        )
    model = NearestNeighbour(train.images, train.labels, len(train.classes))
    started = time.perf_counter()
    with reporter("nearest neighbours", len(test)) as progress:
        certificate = model.certify(test.images, progress.advance)
    speed = len(test) / (time.perf_counter() - started)
    facts = {"parameters": train.images.numel(), "minutes": 0.0, "certified_images_per_second": speed}
    return Run(name=NEAREST, seed=0, facts=facts, certificate=certificate)


def _is_l2(run: Run) -> bool:
    """Whether the nearest-neighbour certificate can stand in the same table."""
    certificate = run.certificate
    return (certificate.norm, certificate.kind, certificate.semantics) == (2.0, "deterministic", "real")


def _converted(run: Run, norm: float, numbers: int) -> Run:
    certificate = in_norm(run.certificate, norm, numbers)
    if certificate is run.certificate:
        return run
    return replace(run, certificate=certificate, attacked=None, converted=True)


def _alike(found: Sequence[Run]) -> list[list[Run]]:
    """Runs whose radii mean the same, in the order of their first."""
    groups: dict[tuple[float, str, str], list[Run]] = {}
    for run in found:
        certificate = run.certificate
        groups.setdefault((certificate.norm, certificate.kind, certificate.semantics), []).append(run)
    return list(groups.values())


def tabulate(found: Sequence[Run], test: ImageSet, eps: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table as plain numbers, with intervals over test images and seeds; differences are to its first row.

    Raises:
        ConfigError: if the runs differ in norm, kind or semantics.
    """
    first = found[0].certificate
    for run in found[1:]:
        for field in ("norm", "kind", "semantics"):
            one, other = getattr(first, field), getattr(run.certificate, field)
            if one != other:
                raise ConfigError(
                    f"{found[0].name} is certified with {field} {one} and {run.name} with {other}; radii of another "
                    f"{field} cannot stand in one table, compare them apart"
                )
    columns = ["clean", *eps, "acr"]
    names = list(dict.fromkeys(run.name for run in found))
    samples = {name: np.stack([_samples(r, test, eps) for r in found if r.name == name]) for name in names}
    draws = _bootstrap(samples, len(test))
    rows = []
    for name in names:
        group = [run for run in found if run.name == name]
        value = samples[name].mean(axis=(0, 2))
        table = dict(zip(columns, value.tolist(), strict=True))
        low, high = _interval(draws[name])
        less, more = _interval(draws[name] - draws[names[0]])
        certificate, bound = group[0].certificate, group[0].certificate.lipschitz
        rows.append(
            {
                "name": name,
                "seeds": [run.seed for run in group],
                **group[0].facts,
                "clean": table["clean"],
                "cra": {text: table[text] for text in eps},
                "acr": table["acr"],
                "interval": dict(zip(columns, zip(low, high, strict=True), strict=True)),
                "difference": dict(zip(columns, zip(less, more, strict=True), strict=True)),
                "lipschitz": None if bound is None else {"bound": bound.value, "proof": bound.proof},
                "cra_published": _published_cra(group, test, eps),
                "attacked": group[0].attacked,
                "converted": group[0].converted,
                "curve": _curve(group, test),
                "model_sha256": certificate.model_sha256,
            }
        )
    return {
        "norm": norm_label(first.norm),
        "kind": first.kind,
        "semantics": first.semantics,
        "difference_to": names[0],
        "rows": rows,
    }


def curves(document: Mapping[str, Any]) -> list[Curve]:
    """Certified accuracy of each row of all tables, for `deployment.figures.certified_accuracy`, which refuses several."""
    return [
        Curve(
            name=row["name"],
            radius=np.array(row["curve"]["radius"]),
            accuracy=np.array(row["curve"]["accuracy"]),
            norm=table["norm"],
            kind=table["kind"],
            dashed=row["name"] == NEAREST,
        )
        for table in document["tables"]
        for row in table["rows"]
    ]


def _check_names(what: Sequence[str]) -> None:
    if not what:
        raise ConfigError(
            "nothing to compare; name run folders or experiments, such as lipnext/digits cll/digits"
        )
    for name in what:
        if not Path(name).is_dir():
            systems.experiment(name)


def _row_name(experiment: Experiment) -> str:
    return f"{experiment.system}/{experiment.preset or 'custom'}"


def _trained(experiment: Experiment, folder: Path, minutes: float | None, epochs: int | None) -> Path:
    """Train an experiment for its share, unless the run is there and finished; an interrupted one goes on."""
    path = folder / f"{_row_name(experiment).replace('/', '-')}-seed{experiment.seed}"
    if (path / runs.RESULT).is_file():
        stated = load_experiment(path)
        same = experiment.model_copy(update={"train": stated.train})
        if stated != same or (epochs is not None and stated.train.epochs != epochs):
            raise ConfigError(f"{path} holds a run of another experiment; choose another --folder")
        return path
    if (path / runs.EXPERIMENT).is_file():
        experiment = Experiment.from_yaml(path / runs.EXPERIMENT)
    elif minutes is not None:
        seconds = epoch_seconds(experiment)
        experiment = experiment.override([f"train.epochs={max(1, math.floor(60 * minutes / seconds))}"])
    elif epochs is not None:
        experiment = experiment.override([f"train.epochs={epochs}"])
    runs.train(experiment, path)
    return path


def epoch_seconds(experiment: Experiment, batches: int = 12) -> float:
    """Measure how long an epoch takes here: short epochs on the first images, of which the fastest after the first counts.

    Other work on the machine only ever slows one down.
    """
    splits = load(experiment.data)
    size = experiment.train.batch_size
    few = splits.train.subset(torch.arange(min(batches * size, len(splits.train))))
    network = systems.build_network(experiment, few.shape, len(few.classes))
    trial = experiment.override(
        [f"train.{key}={SHORT_EPOCHS}" for key in ("epochs", "evaluate_every", "checkpoint_every")]
    )
    with tempfile.TemporaryDirectory() as folder:
        losses = systems.get(experiment.system).losses
        train_network(
            network, trial, few, splits.validation.subset(torch.arange(2)), Path(folder), losses=losses
        )
        seconds = [event["seconds"] for event in epochs(Path(folder) / LOG)]
    fastest: float = min(later - earlier for earlier, later in pairwise(seconds))
    return fastest * len(splits.train) / len(few)


def _common_data(folders: Sequence[Path], data: str | None) -> Splits:
    """The data set of all runs; refused if two runs were trained on different ones, or on different splits.

    Raises:
        ConfigError: one line.
    """
    specs = [runs.data_of(load_experiment(path), data) for path in folders]
    first = load(specs[0])
    loaded = {specs[0]: first}
    for path, spec in zip(folders[1:], specs[1:], strict=True):
        if spec not in loaded:
            loaded[spec] = load(spec)
        for part in ("test", "train"):
            if getattr(loaded[spec], part).sha256() != getattr(first, part).sha256():
                raise ConfigError(
                    f"{path} has another {part} part than {folders[0]}; compare runs of the same data and split"
                )
    return first


def _published(model: Classifier) -> Any:
    published = systems.get(model.system).published
    return None if published is None else published(model.net)


def _attacked(path: Path, splits: Splits, eps: Mapping[str, Any], samples: int) -> dict[str, Any]:
    found = runs.audit(path, test=splits.test, samples=samples, eps=",".join(eps))
    return {
        "n": len(found.certificate),
        "accuracy": found.attacked,
        "cra": found.cra,
        "violations": len(found.violations),
    }


def _samples(run: Run, test: ImageSet, eps: Mapping[str, Any]) -> Matrix:
    """A row for each column of the table, a column for each test image: their means are the table."""
    right, radius = _right_and_radius(run, test)
    rows = [
        right,
        *(right & (radius > fraction_down(parse_eps(value))) for value in eps.values()),
        right * radius,
    ]
    return np.stack([row.astype(np.float64) for row in rows])


def _right_and_radius(run: Run, test: ImageSet) -> tuple[NDArray[np.bool_], Matrix]:
    certificate = run.certificate
    right = (certificate.label == test.labels).cpu().numpy()
    return right, certificate.radius.cpu().numpy()


def _published_cra(group: Sequence[Run], test: ImageSet, eps: Mapping[str, Any]) -> dict[str, float] | None:
    """Certified accuracy as the system's own constant would have it: every radius is larger by the ratio of the constants."""
    shares = [run.published for run in group if run.published is not None]
    if len(shares) < len(group):
        return None
    found = []
    for run, share in zip(group, shares, strict=True):
        right, radius = _right_and_radius(run, test)
        found.append([np.mean(right & (radius / share > float(parse_eps(v)))) for v in eps.values()])
    return dict(zip(eps, np.mean(found, axis=0).tolist(), strict=True))


def _curve(group: Sequence[Run], test: ImageSet) -> dict[str, list[float]]:
    """Certified accuracy on a grid of radii, the mean over the seeds."""
    grid = [n * 3 / 255 for n in range(128)]
    pairs = [_right_and_radius(run, test) for run in group]
    shares = [[float(np.mean(right & (radius > r))) for r in grid] for right, radius in pairs]
    return {"radius": grid, "accuracy": np.mean(shares, axis=0).tolist()}


def _bootstrap(samples: Mapping[str, Matrix], n: int) -> dict[str, Matrix]:
    """Draw test images, the same for all rows, and seeds of each row with replacement; return the means, `(draws, columns)`."""
    rng = np.random.default_rng(0)
    draws: dict[str, list[Matrix]] = {name: [] for name in samples}
    for _ in range(RESAMPLES):
        weights = np.bincount(rng.integers(n, size=n), minlength=n) / n
        for name, table in samples.items():
            seeds = rng.integers(len(table), size=len(table))
            draws[name].append(table[seeds].mean(axis=0) @ weights)
    return {name: np.stack(values) for name, values in draws.items()}


def _interval(draws: Matrix) -> tuple[list[float], list[float]]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low.tolist(), high.tolist()
