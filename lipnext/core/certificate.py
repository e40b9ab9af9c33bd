"""The certificate: labels with proved radii, and everything that a radius must not travel without."""

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from lipnext.core.bound import LipschitzBound, check_bound, norm_label
from lipnext.core.eps import parse_eps
from lipnext.core.errors import DataError, UnsoundError
from lipnext.core.files import atomic_write
from lipnext.core.rounding import fraction_down

Semantics = Literal["real", "deployed"]

ABSTAIN = -1
"""The label of a sample to which a probabilistic certificate gives no class; never right."""


# Without eq=False the generated comparison would ask a tensor for one truth value.
@dataclass(frozen=True, kw_only=True, eq=False)
class Certificate:
    """For each of n samples: no change of the image with norm at most `radius` changes `label`.

    Attributes:
        label: int64 (n,), the predicted class; `ABSTAIN`, with radius 0, only where probabilistic.
        radius: float64 (n,), proved lower bounds in pixel units of images in [0, 1]; 0 where none is.
        norm: 2.0 or inf, the norm in which `radius` is meant.
        kind: whether the radius holds for certain or with `confidence`.
        confidence: 1.0 if and only if deterministic, else in (0, 1).
        semantics: "real" speaks of the real-arithmetic network with the stored weights, "deployed" of the
            program that evaluates them.
        arithmetic: of that program, "float64", "float32" or "float16"; what computes the margins is always float64.
        slack: float64 (n,), the bound on the floating-point error that was subtracted from the margin.
        margin: float64 (n,), computed logit of the label less the closest rival, before the slack; 0 where a
            logit is not finite. Where probabilistic, the radius at the place of the noise.
        lipschitz: the proved bound behind the radius; needed where deterministic.
        rival: int64 (n,), the class whose boundary the bound puts nearest, for people to look at; None where not told.
        per_image: whether a proof of its own for each image may have raised the radius above what margin and `lipschitz`
            give; `Certifier.describe` says which.
        model_sha256: hash of the weights, 64 hexadecimal digits.

    Raises:
        UnsoundError: where a field is of the wrong shape or type, not finite or negative, or an estimate
            or a bare number stands in for the bound.
    """

    label: Tensor
    radius: Tensor
    norm: float
    kind: Literal["deterministic", "probabilistic"]
    confidence: float
    semantics: Semantics
    arithmetic: str = "float64"
    slack: Tensor
    margin: Tensor
    lipschitz: LipschitzBound | None
    rival: Tensor | None = None
    per_image: bool = False
    model_sha256: str

    def __post_init__(self) -> None:
        self._check_tensors()
        norm_label(self.norm)
        self._check_evidence()
        check_semantics(self.semantics, self.arithmetic)
        if not (isinstance(self.model_sha256, str) and re.fullmatch("[0-9a-f]{64}", self.model_sha256)):
            raise UnsoundError(
                f"certificate: model_sha256 must be 64 hexadecimal digits, got {self.model_sha256!r}; "
                "take it from sha256_tensors(net.state_dict())"
            )

    def _check_tensors(self) -> None:
        _check_vector("label", self.label, torch.int64, None)
        if self.rival is not None:
            _check_vector("rival", self.rival, torch.int64, len(self.label))
        for name in ("radius", "slack", "margin"):
            value = getattr(self, name)
            _check_vector(name, value, torch.float64, len(self.label))
            if not bool(torch.isfinite(value).all()):
                raise UnsoundError(f"certificate: {name} must be finite; put 0 where nothing is proved")
            if name != "margin" and bool((value < 0).any()):
                raise UnsoundError(f"certificate: {name} must not be negative; put 0 where nothing is proved")
        none = self.label < 0
        allowed = (self.label == ABSTAIN) & (self.radius == 0) & (self.kind == "probabilistic")
        if bool((none & ~allowed).any()):
            raise UnsoundError(
                f"certificate: a label must be a class, or {ABSTAIN} with radius 0 in a probabilistic one, got "
                f"{int(self.label.min())}"
            )

    def _check_evidence(self) -> None:
        if self.kind not in ("deterministic", "probabilistic"):
            raise UnsoundError(
                f"certificate: kind must be 'deterministic' or 'probabilistic', got {self.kind!r}"
            )
        if self.kind == "deterministic":
            check_bound(self.lipschitz)
        if (self.kind == "deterministic") != (self.confidence == 1.0) or not 0 < self.confidence <= 1:
            raise UnsoundError(
                "certificate: confidence must be 1.0 for a deterministic and in (0, 1) for a probabilistic "
                f"radius, got {self.confidence!r} for a {self.kind} one"
            )
        if self.lipschitz is not None:
            check_bound(self.lipschitz)
            if self.lipschitz.norm != self.norm:
                raise UnsoundError(
                    f"certificate: a radius in {norm_label(self.norm)} cannot rest on a bound in "
                    f"{norm_label(self.lipschitz.norm)}; use one norm throughout"
                )

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, samples: slice) -> "Certificate":
        """Return the certificate of some of the samples."""
        return replace(
            self,
            label=self.label[samples],
            radius=self.radius[samples],
            slack=self.slack[samples],
            margin=self.margin[samples],
            rival=None if self.rival is None else self.rival[samples],
        )

    def certified_at(self, eps: str | int | float | Fraction) -> Tensor:
        """Return bool (n,): whether `radius > eps`, strictly and exactly.

        Raises:
            ConfigError: where eps is no number in (0, 10].
        """
        # A float exceeds eps if and only if it exceeds the largest float that is not above eps.
        return self.radius > fraction_down(parse_eps(eps))

    def accuracy_at(self, eps: str | int | float | Fraction, labels: Tensor) -> float:
        """Return the certified robust accuracy: the share of all samples that are right with `radius > eps`.

        Args:
            eps: pixel units of images in [0, 1], such as "36/255".
            labels: int64 (n,), the true classes.

        Raises:
            ConfigError: where eps is no number in (0, 10].
            DataError: where the labels do not fit or there is no sample.
        """
        return int((self._correct(labels) & self.certified_at(eps)).sum()) / len(self)

    def clean_accuracy(self, labels: Tensor) -> float:
        """Return the share of all samples whose label is right. Raises DataError as `accuracy_at`."""
        return int(self._correct(labels).sum()) / len(self)

    def acr(self, labels: Tensor) -> float:
        """Return the mean radius over all samples, 0 where wrong (ACR). Raises DataError as `accuracy_at`."""
        return math.fsum(self.radius[self._correct(labels)].tolist()) / len(self)

    def mean_radius_correct(self, labels: Tensor) -> float:
        """Return the mean radius of the right samples, 0 if none is. Raises DataError as `accuracy_at`."""
        radii = self.radius[self._correct(labels)].tolist()
        return math.fsum(radii) / len(radii) if radii else 0.0

    def _correct(self, labels: Tensor) -> Tensor:
        if len(self) == 0:
            raise DataError("an accuracy needs at least one sample, got an empty certificate")
        return self.label == self._checked(labels)

    def _checked(self, labels: Tensor) -> Tensor:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != self.label.shape:
            raise DataError(
                f"labels must be an int64 tensor of shape ({len(self)},), one a sample, got {_form(labels)}"
            )
        return labels.to(self.label.device)

    def summary(self, labels: Tensor, eps: Mapping[str, Fraction]) -> dict[str, Any]:
        """Return the table that `lipnext certify --json` prints; shares in [0, 1], median margin, largest float error.

        Args:
            labels: int64 (n,), the true classes.
            eps: exact values by label, from `parse_eps_list`.

        Raises:
            DataError: where the labels do not fit or there is no sample.
        """
        bound = self.lipschitz
        return {
            "n": len(self),
            "clean": self.clean_accuracy(labels),
            "cra": {name: self.accuracy_at(value, labels) for name, value in eps.items()},
            "acr": self.acr(labels),
            "lipschitz": None if bound is None else {"bound": bound.value, "proof": bound.proof},
            "norm": norm_label(self.norm),
            "kind": self.kind,
            "confidence": self.confidence,
            "abstained": int((self.label == ABSTAIN).sum()),
            "semantics": self.semantics,
            "arithmetic": self.arithmetic,
            "margin": self.margin.median().item(),
            "float_error": self.slack.max().item(),
            "model_sha256": self.model_sha256,
        }

    def records(self, labels: Tensor | None = None) -> Iterator[dict[str, Any]]:
        """Yield one flat dictionary for each sample; `label` and `correct` only where labels are given.

        Raises:
            DataError: where the labels do not fit.
        """
        truth = None if labels is None else self._checked(labels).tolist()
        common = {
            "norm": norm_label(self.norm),
            "kind": self.kind,
            "confidence": self.confidence,
            "semantics": self.semantics,
            "arithmetic": self.arithmetic,
            "model_sha256": self.model_sha256,
        }
        columns = (self.label.tolist(), self.radius.tolist(), self.margin.tolist(), self.slack.tolist())
        for index, (pred, radius, margin, slack) in enumerate(zip(*columns, strict=True)):
            known = {} if truth is None else {"label": truth[index], "correct": truth[index] == pred}
            yield {
                "idx": index,
                **known,
                "pred": pred,
                "radius": radius,
                "margin": margin,
                "slack": slack,
                **common,
            }

    def to_jsonl(self, path: str | os.PathLike[str], labels: Tensor | None = None) -> None:
        """Write `records` as JSON lines, atomically; numbers read back exactly.

        Raises:
            DataError: where the labels do not fit.
            OSError: where the file cannot be written.
        """
        with atomic_write(path) as file:
            for record in self.records(labels):
                file.write(json.dumps(record, allow_nan=False) + "\n")

    def to_csv(self, path: str | os.PathLike[str], labels: Tensor | None = None) -> None:
        """Write `records` as CSV with a header, atomically; numbers read back exactly.

        Raises:
            DataError: where the labels do not fit.
            OSError: where the file cannot be written.
        """
        known = [] if labels is None else ["label", "correct"]
        numbers = ["idx", *known, "pred", "radius", "margin", "slack"]
        names = [*numbers, "norm", "kind", "confidence", "semantics", "arithmetic", "model_sha256"]
        with atomic_write(path) as file:
            # The csv module writes floats by repr, the shortest text that reads back to the same float.
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.records(labels))

    @staticmethod
    def cat(parts: Sequence["Certificate"]) -> "Certificate":
        """Join the certificates of consecutive batches of one model.

        Raises:
            UnsoundError: where there is none, or norm, kind, confidence, semantics, model or bound differ.
        """
        if not parts:
            raise UnsoundError("nothing to join: pass at least one certificate")
        first = parts[0]
        shared = (
            "norm",
            "kind",
            "confidence",
            "semantics",
            "arithmetic",
            "model_sha256",
            "lipschitz",
            "per_image",
        )
        for name in shared:
            for part in parts[1:]:
                if getattr(part, name) != getattr(first, name):
                    raise UnsoundError(
                        f"certificates with different {name} cannot be joined ({getattr(first, name)} and "
                        f"{getattr(part, name)}); report them apart"
                    )
        rivals = [part.rival for part in parts if part.rival is not None]
        if rivals and len(rivals) < len(parts):
            raise UnsoundError("certificates with and without rivals cannot be joined; report them apart")
        return Certificate(
            label=torch.cat([part.label for part in parts]),
            radius=torch.cat([part.radius for part in parts]),
            slack=torch.cat([part.slack for part in parts]),
            margin=torch.cat([part.margin for part in parts]),
            norm=first.norm,
            kind=first.kind,
            confidence=first.confidence,
            semantics=first.semantics,
            arithmetic=first.arithmetic,
            lipschitz=first.lipschitz,
            rival=None if not rivals else torch.cat(rivals),
            per_image=first.per_image,
            model_sha256=first.model_sha256,
        )


def check_semantics(semantics: str, arithmetic: str) -> None:
    """Refuse a semantics that is not known, and an arithmetic that it does not speak of.

    Raises:
        UnsoundError: one line.
    """
    if semantics not in ("real", "deployed"):
        raise UnsoundError(f"certificate: semantics must be 'real' or 'deployed', got {semantics!r}")
    allowed = ("float64",) if semantics == "real" else ("float64", "float32", "float16")
    if arithmetic not in allowed:
        raise UnsoundError(
            f"certificate: arithmetic must be one of {', '.join(allowed)} for semantics {semantics!r}, got "
            f"{arithmetic!r}; only a deployed program executes in another type"
        )


def _check_vector(name: str, value: object, dtype: torch.dtype, length: int | None) -> None:
    fits = isinstance(value, Tensor) and value.dtype == dtype and value.dim() == 1
    if not (fits and isinstance(value, Tensor) and length in (None, len(value))):
        wanted = f"a {dtype} tensor of shape ({'n' if length is None else length},)"
        raise UnsoundError(f"certificate: {name} must be {wanted}, got {_form(value)}")


def _form(value: object) -> str:
    """Describe a value in an error message."""
    return (
        f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )
