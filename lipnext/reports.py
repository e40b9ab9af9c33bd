"""What people see of finished runs: the audit as document and page, the gate of a pipeline, figures of several runs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lipnext import runs
from lipnext._version import __version__
from lipnext.auditing.audit import Audit
from lipnext.auditing.overview import overview
from lipnext.core.bound import PROOFS, norm_label
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.eps import parse_eps, parse_eps_list, round_down
from lipnext.core.errors import CheckError, ConfigError, DataError
from lipnext.core.files import check_output
from lipnext.data.dataset import load as load_data
from lipnext.deployment.bundle import load_experiment
from lipnext.deployment.figures import (
    TICKS,
    Curve,
    certified_accuracy,
    check_installed,
    exact_curve,
    save,
    training_curves,
)
from lipnext.deployment.locate import locate
from lipnext.deployment.report import render
from lipnext.training.log import LOG, epochs


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditReport:
    """An audit of samples beside the certificate of the whole test part they were drawn from.

    Attributes:
        audit: of the samples.
        certificate: of the whole test part.
        truth: int64 (N,), its true classes.
        document: all of it as plain numbers, text, lists and dictionaries; what the page shows, but for its pictures.
    """

    audit: Audit
    certificate: Certificate
    truth: Tensor
    document: dict[str, Any]

    def html(self) -> str:
        """Return the page. Raises ConfigError where the extra `report` is not installed."""
        pictures = [(shown.image, shown.perturbed) for shown in self.audit.gallery]
        certificate = self.certificate
        return render(self.document, certificate.radius, certificate.label == self.truth, pictures)

    def check_gates(self) -> None:
        """Raise CheckError for the first required certified accuracy that was not reached."""
        for gate in self.document["gates"]:
            if not gate["holds"]:
                certified = round_down(Fraction(gate["certified"], gate["n"]), 4)
                raise CheckError(
                    f"certified accuracy at {gate['eps']} is {certified} on {gate['n']} images, below the required "
                    f"{gate['required']}"
                )


def audit(
    path: str | Path,
    data: str | None = None,
    *,
    samples: int = 100,
    attacks: str | None = None,
    eps: str | None = None,
    min_cra: Sequence[str] = (),
    semantics: Semantics = "real",
    arithmetic: str | None = None,
) -> AuditReport:
    """Certify a whole test part, and try to refute the certificates of samples drawn from it, as `runs.audit`.

    Args:
        path: run folder, or what else `runs.load` takes.
        data: folder with a data set whose test part is taken; None takes the run's own data.
        samples: how many images are attacked.
        attacks: names, "minimal-norm,pgd"; None takes the usual ones.
        eps: radii, "36/255,72/255"; None takes those of the experiment.
        min_cra: certified accuracies that the whole test part must reach, such as "36/255:0.55".
        semantics: what the certificates speak of, "real" arithmetic or the "deployed" program.
        arithmetic: in which that program runs, "float64" or "float32"; None takes the experiment's.

    Raises:
        LipnextError: one line that says what to do.
    """
    required = parse_min_cra(min_cra)
    folder = locate(path)
    experiment = load_experiment(folder)
    test = load_data(runs.data_of(experiment, data)).test  # once for both
    found = runs.audit(
        folder,
        samples=samples,
        attacks=attacks,
        eps=eps,
        test=test,
        semantics=semantics,
        arithmetic=arithmetic,
    )
    certificate, _ = runs.certify_run(
        folder, test=test, semantics=semantics, arithmetic=found.certificate.arithmetic
    )
    right = certificate.label == test.labels
    gates = []
    for name, (at, least, text) in required.items():
        count = int((right & certificate.certified_at(at)).sum())
        gates.append(
            {
                "eps": name,
                "required": text,
                "certified": count,
                "n": len(test),
                "cra": count / len(test),
                "holds": Fraction(count, len(test)) >= least,
            }
        )
    sampled = found.document()
    proofs = {layer["proof"] for layer in sampled["slopes"]}
    log = folder / LOG
    document = {
        "run": Path(path).resolve().name if Path(path).is_dir() else str(path),
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "lipnext_version": __version__,
        **sampled,
        "gates": gates,
        "test_part": overview(certificate, test.labels, test.classes, parse_eps_list(list(found.cra))),
        "proofs": {proof: PROOFS[proof] for proof in sorted(proofs)},
        "experiment": {
            "preset": experiment.preset,
            "system": experiment.system,
            "seed": experiment.seed,
            "digest": experiment.digest(),
        },
        "data": {
            "name": experiment.data.name if data is None else Path(data).resolve().name,
            "shape": list(test.shape),
            "sha256": test.sha256(),
        },
        "training": epochs(log) if log.is_file() else [],
    }
    return AuditReport(audit=found, certificate=certificate, truth=test.labels, document=document)


def parse_min_cra(texts: Sequence[str]) -> dict[str, tuple[Fraction, Fraction, str]]:
    """Read required certified accuracies, "36/255:0.55", by name of eps: eps and share, exact, and the share as written.

    Raises:
        ConfigError: one line.
    """
    required: dict[str, tuple[Fraction, Fraction, str]] = {}
    for text in texts:
        name, colon, share = (part.strip() for part in text.partition(":"))
        if not colon:
            raise ConfigError(f"--min-cra must be EPS:SHARE, such as 36/255:0.55, got '{text}'")
        try:
            least = float(share)
        except ValueError:
            least = math.nan
        if not 0 <= least <= 1:
            raise ConfigError(f"--min-cra: the share must be a number in [0, 1], such as 0.55, got '{share}'")
        eps = parse_eps(name)
        if eps in [known for known, _, _ in required.values()]:
            raise ConfigError(f"--min-cra: eps {name} is given twice; leave one out")
        # The float came first: Fraction("0e999999999") would fill the memory.
        required[name] = (eps, Fraction(share) if least else Fraction(0), share)
    return required


def plot(sources: Sequence[str], out: str | Path, *, training: bool = False) -> None:
    """Draw several runs in one figure: certified accuracy against radius, or their training.

    Args:
        sources: run folders, whose test parts are certified, or .jsonl files written by `lipnext certify --records`.
        out: a .png or .svg file.
        training: draw the logs of run folders instead.

    Raises:
        ConfigError, DataError: one line; norms or kinds that differ are refused.
    """
    check_output("--out", out, ".png", ".svg")
    check_installed("matplotlib")
    names = _names(sources)
    if training:
        figure = training_curves({name: _log(source) for name, source in names.items()})
    else:
        figure = certified_accuracy([_curve(name, source) for name, source in names.items()])
    save(figure, Path(out))


def _names(sources: Sequence[str]) -> dict[str, str]:
    """Name each run by its folder or file, by the whole path where two are called the same."""
    short = [Path(source).resolve().name.removesuffix(".jsonl") for source in sources]
    names = [text if short.count(text) == 1 else source for text, source in zip(short, sources, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"'{name}' is given twice; leave one out")
    return dict(zip(names, sources, strict=True))


def _log(source: str) -> list[dict[str, Any]]:
    folder = locate(source)
    found = epochs(folder / LOG) if (folder / LOG).is_file() else []
    if not found:
        raise ConfigError(
            f"{folder} has no {LOG} with a finished epoch; --training draws what lipnext train logs"
        )
    return found


def _curve(name: str, source: str) -> Curve:
    if Path(source).is_dir() or not source.endswith(".jsonl"):
        certificate, test = runs.certify_run(source)
        right = (certificate.label == test.labels).cpu().numpy()
        radii, norm = certificate.radius.cpu().numpy(), norm_label(certificate.norm)
        return exact_curve(name, radii, right, norm, certificate.kind)
    return _read_records(name, Path(source))


def _read_records(name: str, path: Path) -> Curve:
    """Read what `Certificate.to_jsonl` wrote with labels."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"cannot read the records {path}: {reason}") from None
    radii, right, claims = [], [], set()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            radius, correct = record["radius"], record["correct"]
            claims.add((record["norm"], record["kind"]))
            valid = isinstance(radius, float) and 0 <= radius < math.inf and isinstance(correct, bool)
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise DataError(
                f"{path}: line {number} is no record of lipnext certify --records FILE.jsonl; write the file again"
            )
        radii.append(radius)
        right.append(correct)
    if len(claims) != 1:
        held = " and ".join(f"{norm} {kind}" for norm, kind in sorted(claims, key=str)) or "no record"
        raise DataError(f"{path} holds {held}; one norm and one kind are needed, write the file again")
    ((norm, kind),) = claims
    if norm not in TICKS:
        raise DataError(f"{path}: the norm must be one of {', '.join(TICKS)}, got {norm!r}")
    return exact_curve(name, np.array(radii), np.array(right), norm, kind)
