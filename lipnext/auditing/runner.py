"""A suite of attacks over many images, resumable: a line of JSON for every finished batch.

The first line of the file holds the settings and the hashes of model and data; a second call with the same ones goes on where
the first stopped, one with others is refused.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipnext.auditing.adapters import autoattack, foolbox_attack
from lipnext.auditing.apgd import apgd
from lipnext.auditing.ascent import AttackResult, Logits, check_inputs, radii_of
from lipnext.auditing.attack import minimal_norm, pgd
from lipnext.auditing.recheck import attack_in_float32
from lipnext.core.bound import norm_label
from lipnext.core.eps import eps_label, parse_eps, parse_eps_list
from lipnext.core.errors import ConfigError, DataError, nearest
from lipnext.core.files import sha256_tensors
from lipnext.core.rounding import fraction_down

FORMAT = "lipnext attacks 2"


def _autoattack(
    logits: Logits, images: Tensor, labels: Tensor, radius: float, *, norm: float, seed: int, **_: Any
) -> AttackResult:
    """AutoAttack has its own steps and always clips."""
    return autoattack(logits, images, labels, radius, norm=norm, seed=seed)


# Attacks that look for the smallest perturbation run once, the others once in each ball.
MINIMAL: dict[str, Callable[..., AttackResult]] = {
    "minimal-norm": minimal_norm,
    "foolbox-ddn": partial(foolbox_attack, attack="ddn"),
    "foolbox-fmn": partial(foolbox_attack, attack="fmn"),
}
IN_A_BALL: dict[str, Callable[..., AttackResult]] = {
    "pgd": pgd,
    "apgd-ce": partial(apgd, objective="ce"),
    "apgd-dlr": partial(apgd, objective="dlr"),
    "apgd-margin": partial(apgd, objective="margin"),
}
# These know nothing of `restarts`, take one radius for all images, and clip.
ONE_RADIUS: dict[str, Callable[..., AttackResult]] = {
    "foolbox-pgd": partial(foolbox_attack, attack="pgd"),
    "autoattack": _autoattack,
}
ATTACKS = (*MINIMAL, *IN_A_BALL, *ONE_RADIUS)
STANDARD = ("minimal-norm", "pgd", "apgd-ce", "apgd-margin")
"""Attacks that need no extra and no number of classes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SuiteResult:
    """The closest success of a suite of attacks on each of n images.

    Attributes:
        label: int64 (n,), the labels that were attacked.
        distance: float64 (n,), the smallest distance at which any attack changed the label, rounded up; inf where none did.
        attack: for each image the name of the attack that came closest, or None.
        norm: 2.0 or inf, of `distance`.
        inside: for each image that was broken within its own `radius` the perturbed image, by its index.
        kept: for each image in `keep` the closest success, by its index; none where no attack succeeded.
        eps: the balls that were attacked, by the text that the user wrote; an accuracy is told at no other.
    """

    label: Tensor
    distance: Tensor
    attack: tuple[str | None, ...]
    norm: float
    inside: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    eps: dict[str, Fraction] = field(default_factory=dict)

    def accuracy_at(self, eps: str | int | float | Fraction, labels: Tensor) -> float:
        """Return the attacked accuracy: the share of all samples that are right and were not broken within `eps`.

        It bounds the true robust accuracy from above, as certified robust accuracy does from below.

        Args:
            eps: one of the balls that were attacked; at another the number would mean little.
            labels: int64 (n,), the true classes.

        Raises:
            ConfigError: where that ball was not attacked.
            DataError: where the labels do not fit or there is no sample.
        """
        exact = parse_eps(eps)
        if exact not in self.eps.values():
            known = ", ".join(self.eps) or "none"
            raise ConfigError(
                f"the balls attacked are {known}; run the attacks with eps {eps_label(eps)} as well"
            )
        if labels.dtype != torch.int64 or labels.shape != self.label.shape or len(labels) == 0:
            raise DataError(
                f"labels must be int64 of shape ({len(self.label)},), one a sample, got {labels.dtype} of "
                f"{tuple(labels.shape)}"
            )
        broken = self.distance <= fraction_down(exact)
        return int(((self.label == labels.cpu()) & ~broken).sum()) / len(labels)


def run_suite(
    logits: Logits,
    images: Tensor,
    labels_predicted: Tensor,
    path: str | os.PathLike[str],
    *,
    model_sha256: str,
    attacks: Sequence[str] = STANDARD,
    eps: str | Sequence[str] = (),
    radius: float | Tensor | None = None,
    norm: float = 2.0,
    steps: int = 100,
    restarts: int = 1,
    seed: int = 0,
    box: bool = False,
    batch_size: int = 256,
    keep: Sequence[int] = (),
    truth: Tensor | None = None,
    searched: Logits | None = None,
    progress: Callable[[int], None] | None = None,
) -> SuiteResult:
    """Attack all images with all attacks, each only where those before it left something to win.

    An attack for the smallest perturbation runs on every image. An attack in a ball runs in each ball of `eps` and in the
    image's own `radius`, on the images that no attack has broken within that ball so far.

    Args:
        logits: the network, in the type of the images.
        images: (n, ...) float32 or float64.
        labels_predicted: int64 (n,), the labels that should change: what the network predicts, such as `certificate.label`.
        path: the file of finished batches; made where it is missing.
        model_sha256: hash of the weights, such as `certificate.model_sha256`.
        attacks: names from `ATTACKS`; the cheap ones first.
        eps: balls for all images, in pixel units of images in [0, 1], such as "36/255,72/255".
        radius: a ball for each image, such as `certificate.radius`; successes within it are returned as `inside`.
        norm: 2.0 or inf.
        steps: gradient steps of each attack and restart.
        restarts: of `pgd` and `apgd`.
        seed: of everything random.
        box: keep the images in [0, 1].
        batch_size: images that are attacked together.
        keep: indices of images whose closest success is returned as `kept`, wherever it lies.
        truth: int64 (n,), the true classes. Where given, balls of `eps` that can change no count are left out: on images that
            are wrong from the start, and those inside the image's own `radius`, whose larger ball is attacked anyway.
        searched: the same network in float32, in which the attacks then search; a success is what `logits` shows in float64.
        progress: called with the number of images of each finished batch, those of earlier calls included.

    Raises:
        ConfigError: where an attack is not known, attacks nothing or needs another setting, or the file belongs to other
            settings, another model or other data, or `searched` is given for images that are not float64.
        DataError: where images, labels or radii do not fit, or the file is damaged.
        UnsoundError: for another norm.
    """
    balls = parse_eps_list(eps) if eps else {}
    own = None if radius is None else radii_of(radius, images)
    _check(images, labels_predicted, attacks, balls, own, steps, restarts, batch_size, box)
    if searched is not None and images.dtype != torch.float64:
        raise ConfigError(
            f"what float32 finds is checked in float64; pass float64 images, not {images.dtype}"
        )
    if truth is not None and (truth.dtype != torch.int64 or truth.shape != images.shape[:1]):
        raise DataError(
            f"truth must be int64 of shape ({len(images)},), got {truth.dtype} of {tuple(truth.shape)}"
        )
    within = _left_out(labels_predicted, truth, own)
    tensors = {"images": images, "labels": labels_predicted}
    tensors |= {} if own is None else {"radius": own}
    tensors |= {} if truth is None else {"truth": truth}
    header: dict[str, Any] = {
        "format": FORMAT,
        "model_sha256": model_sha256,
        "data_sha256": sha256_tensors(tensors),
        "attacks": list(attacks),
        "eps": list(balls),
        "norm": norm_label(norm),
        "steps": steps,
        "restarts": restarts,
        "seed": seed,
        "box": box,
        "batch_size": batch_size,
        "count": len(images),
        "keep": sorted(keep),
        "search": None if searched is None else "float32",
    }
    path = Path(path)
    done = _resume(path, header)
    options = {"norm": norm, "steps": steps, "seed": seed, "box": box}
    with path.open("a", encoding="utf-8") as file:
        for number, start in enumerate(range(0, len(images), batch_size)):
            part = slice(start, start + batch_size)
            if number == len(done):
                batch = _Batch(logits, searched, images[part], labels_predicted[part], options, restarts)
                batch.attack(
                    attacks,
                    [fraction_down(ball) for ball in balls.values()],
                    None if own is None else own[part],
                    within[part],
                )
                wanted = [k - start for k in header["keep"] if start <= k < start + batch_size]
                done.append(batch.record(number, None if own is None else own[part], wanted))
                file.write(json.dumps(done[-1]) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if progress is not None:
                progress(len(images[part]))
    return _join(done, images, labels_predicted, norm, batch_size, balls)


class _Batch:
    """The closest success so far on each image of a batch, and by which attack."""

    def __init__(
        self,
        logits: Logits,
        searched: Logits | None,
        images: Tensor,
        labels: Tensor,
        options: dict[str, Any],
        restarts: int,
    ) -> None:
        self.logits, self.searched, self.images, self.labels = logits, searched, images, labels
        self.options, self.restarts = options, restarts
        self.distance = torch.full((len(images),), math.inf, dtype=torch.float64, device=images.device)
        self.points = images.clone()
        self.names: list[str | None] = [None] * len(images)

    def attack(self, names: Sequence[str], balls: list[float], own: Tensor | None, within: Tensor) -> None:
        """Run each attack; in balls of eps only where they are larger than `within`."""
        everything = torch.arange(len(self.images), device=self.images.device)
        for name in names:
            if name in MINIMAL:
                self._run(name, everything)
                continue
            limits = [torch.full_like(self.distance, ball) for ball in sorted(balls)]
            limits = [limit.where(limit > within, 0) for limit in limits]
            for limit in limits + ([] if own is None else [own]):
                index = torch.nonzero((self.distance > limit) & (limit > 0)).flatten()
                if len(index) and name in IN_A_BALL:
                    self._run(name, index, limit[index], restarts=self.restarts)
                elif len(index):
                    self._run(name, index, float(limit[index[0]]))

    def _run(self, name: str, index: Tensor, *radius: Tensor | float, **more: Any) -> None:
        options = self.options | more
        function = (MINIMAL | IN_A_BALL | ONE_RADIUS)[name]
        images, labels = self.images[index], self.labels[index]
        if self.searched is None:
            result = function(self.logits, images, labels, *radius, **options)
        else:
            result = attack_in_float32(
                function, self.searched, self.logits, images, labels, *radius, **options
            )
        better = result.distance < self.distance[index]
        self.distance[index[better]] = result.distance[better]
        self.points[index[better]] = result.images[better]
        for k in index[better].tolist():
            self.names[k] = name

    def record(self, number: int, own: Tensor | None, keep: list[int]) -> dict[str, Any]:
        inside = [] if own is None else torch.nonzero(self.distance <= own).flatten().tolist()
        distance = [value if math.isfinite(value) else None for value in self.distance.tolist()]
        return {
            "batch": number,
            "distance": distance,
            "attack": self.names,
            "inside": self._points(inside),
            "kept": self._points([k for k in keep if distance[k] is not None]),
        }

    def _points(self, rows: list[int]) -> dict[str, list[float]]:
        return {str(k): self.points[k].flatten().tolist() for k in rows}


def _left_out(labels: Tensor, truth: Tensor | None, own: Tensor | None) -> Tensor:
    """Return float64 (n,): the radius up to which balls of eps are left out, 0 where none is and inf where all are."""
    if truth is None:
        return torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    within = torch.zeros_like(labels, dtype=torch.float64) if own is None else own
    return within.masked_fill(labels != truth.to(labels.device), math.inf)


def _resume(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the finished batches of an earlier call, and make the file end after them.

    Raises:
        ConfigError: where the file belongs to something else.
        DataError: where it is damaged.
    """
    heading = json.dumps(header) + "\n"
    content = path.read_bytes() if path.exists() else b""
    lines = content.split(b"\n")[:-1]  # what follows the last newline was cut off
    if not lines:
        if not heading.encode().startswith(content):
            raise ConfigError(f"{path} is no file of attacks; give another path")
        path.write_text(heading, encoding="utf-8")
        return []
    try:
        first, *done = [json.loads(line) for line in lines]
    except ValueError:
        raise DataError(f"{path} is damaged or no file of attacks; give another path or delete it") from None
    if not isinstance(first, dict) or first.get("format") != FORMAT:
        raise ConfigError(f"{path} is no file of attacks of this version; give another path")
    for key, value in header.items():
        if first.get(key) != value:
            raise ConfigError(
                f"{path} holds attacks with another {key} ({first.get(key)}, now {value}); give another path or delete it"
            )
    for number, record in enumerate(done):
        if not isinstance(record, dict) or record.get("batch") != number:
            raise DataError(f"{path} is damaged: line {number + 2} is not batch {number}; delete it")
    with path.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return done


def _join(
    done: list[dict[str, Any]],
    images: Tensor,
    labels: Tensor,
    norm: float,
    batch_size: int,
    balls: dict[str, Fraction],
) -> SuiteResult:
    distance = [math.inf if value is None else value for record in done for value in record["distance"]]

    def points(key: str) -> dict[int, Tensor]:
        return {
            record["batch"] * batch_size + int(k): torch.tensor(pixels, dtype=images.dtype).reshape(
                images.shape[1:]
            )
            for record in done
            for k, pixels in record[key].items()
        }

    return SuiteResult(
        label=labels.cpu(),
        distance=torch.tensor(distance, dtype=torch.float64),
        attack=tuple(name for record in done for name in record["attack"]),
        norm=norm,
        inside=points("inside"),
        kept=points("kept"),
        eps=balls,
    )


def _check(
    images: Tensor,
    labels: Tensor,
    attacks: Sequence[str],
    balls: dict[str, Fraction],
    own: Tensor | None,
    steps: int,
    restarts: int,
    batch_size: int,
    box: bool,
) -> None:
    check_inputs(images, labels, steps, restarts)
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    if not attacks or len(set(attacks)) != len(attacks):
        raise ConfigError(
            f"attacks must be different names, at least one, got {list(attacks)}; known: {', '.join(ATTACKS)}"
        )
    for name in attacks:
        if name not in ATTACKS:
            raise ConfigError(f"unknown attack {name!r}; {nearest(name, ATTACKS)}")
        if name not in MINIMAL and not balls and own is None:
            raise ConfigError(f"attack {name} works in a ball; give eps or radius")
        if name in ONE_RADIUS and own is not None:
            raise ConfigError(f"attack {name} takes one radius for all images; give eps and leave out radius")
        if name == "autoattack" and not box:
            raise ConfigError("attack autoattack keeps images in [0, 1]; pass box=True")
