"""The audit: everything that could refute a certificate, tried on the samples of a test part.

Attacks search inside each radius, pairs of points search for a steeper slope than a bound allows, and what can be counted again
is counted again. A certificate that survives is not proved by it; one that does not is refuted by a file that anyone can check.
"""

import io
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipnext.auditing.ascent import distances, rival_margin
from lipnext.auditing.lipschitz import SteepestPair, steepest_pair
from lipnext.auditing.recount import Check, recount
from lipnext.auditing.rounding_search import rounding_search
from lipnext.auditing.runner import IN_A_BALL, MINIMAL, SuiteResult, run_suite
from lipnext.core.bound import norm_label
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.classifier import Classifier
from lipnext.core.errors import ConfigError, DataError, UnsoundError, nearest
from lipnext.core.files import atomic_write, sha256_tensors
from lipnext.core.guard import check_certifiable
from lipnext.core.network import LipschitzNetwork
from lipnext.core.rounding import ARITHMETIC, UNIT_ROUNDOFF

SLOPE_ROUNDING = 1e-9
"""What rounding can add to a slope, relative: pairs are at least 1e-3 apart and float64 values below 1e3 are off by 1e-13."""
ASCENT_IMAGES = 16
BATCH = 32
ATTACKS = (*MINIMAL, *IN_A_BALL)
USUAL = ("minimal-norm", "pgd")
"""What is tried where nothing is asked for."""
GALLERY = 6
"""Images shown of each group."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A bound, and the steepest slope that a search found from below.

    Attributes:
        name: as in the certificate; "K" is everything before the last layer.
        bound: the smaller one of what is proved now and what `certificate.json` states.
        proof: a key of `core.bound.PROOFS`.
        estimate: the slope that was found.
        method: how.
        holds: whether the estimate is at most the bound, up to the rounding of the estimate.
    """

    name: str
    bound: float
    proof: str
    estimate: float
    method: str
    holds: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Violation:
    """A refuted claim, with all that is needed to see it.

    Attributes:
        kind: "attack", "rounding", "slope" or "recount".
        detail: one line.
        arrays: what the reproducer file holds.
    """

    kind: str
    detail: str
    arrays: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """A sample worth a look, with the closest attack on it.

    Attributes:
        group: "least" or "most" robust of the right samples, or "wrong": certified with a wrong label.
        sample: its place among the n samples.
        image: float64 (c, h, w).
        perturbed: float64 (c, h, w), the closest change of the label that any attack found; None where none did.
        becomes: the class that leads there; None where no attack succeeded.
    """

    group: str
    sample: int
    image: Tensor
    perturbed: Tensor | None
    becomes: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Audit:
    """What an audit of n samples has found.

    Attributes:
        certificate: of the samples.
        truth: int64 (n,), the true classes.
        index: int64 (n,), which samples of the test part.
        distance: float64 (n,), the smallest change that any attack found, inf where none did.
        attack: which attack found it, None where none did.
        clean: share of samples that are right.
        cra: by name of eps, the share that is right and certified.
        attacked: by name of eps, the share that is right and was not broken within eps; never below `cra` if all holds.
        closest_by: by attack, for how many samples it found the smallest change.
        slopes: K and every layer.
        checks: what was counted again.
        environment: what the numbers depend on.
        gallery: the least and the most robust samples, and those certified with a wrong label.
        violations: refuted claims; none for a sound library.
    """

    certificate: Certificate
    truth: Tensor
    index: Tensor
    distance: Tensor
    attack: tuple[str | None, ...]
    clean: float
    cra: dict[str, float]
    attacked: dict[str, float]
    closest_by: dict[str, int]
    slopes: tuple[Layer, ...]
    checks: tuple[Check, ...]
    environment: dict[str, Any]
    gallery: tuple[Shown, ...]
    violations: tuple[Violation, ...]

    def document(self) -> dict[str, Any]:
        """Return everything but the images as plain numbers, text, lists and dictionaries."""
        certificate = self.certificate
        columns = (self.index, self.truth, certificate.label, certificate.radius, self.distance)
        rows = zip(*(column.tolist() for column in columns), self.attack, strict=True)
        names = ("idx", "label", "pred", "radius", "distance", "attack")
        samples = [dict(zip(names, row, strict=True)) for row in rows]
        for sample in samples:
            sample["distance"] = sample["distance"] if math.isfinite(sample["distance"]) else None
        return {
            "n": len(samples),
            "holds": not self.violations,
            "violations": [{"kind": v.kind, "detail": v.detail} for v in self.violations],
            "clean": self.clean,
            "cra": self.cra,
            "attacked": self.attacked,
            "gap": {name: self.attacked[name] - self.cra[name] for name in self.cra},
            "closest_by": self.closest_by,
            "closest": self.closest(),
            "slopes": [asdict(layer) for layer in self.slopes],
            "checks": [asdict(check) for check in self.checks],
            "norm": norm_label(certificate.norm),
            "kind": certificate.kind,
            "semantics": certificate.semantics,
            "model_sha256": certificate.model_sha256,
            "environment": self.environment,
            "gallery": [
                {"group": shown.group, "becomes": shown.becomes, **samples[shown.sample]}
                for shown in self.gallery
            ],
            "samples": samples,
        }

    def closest(self) -> float | None:
        """Return the smallest ratio of attack distance to radius, above 1 if all holds; None where nothing was found."""
        found = (self.certificate.radius > 0) & self.distance.isfinite()
        return (self.distance[found] / self.certificate.radius[found]).min().item() if found.any() else None


def parse_attacks(text: str) -> list[str]:
    """Read names of attacks, "pgd,minimal-norm".

    Raises:
        ConfigError: for an unknown name, one that comes twice, or none.
    """
    names = [name.strip() for name in text.split(",")]
    for place, name in enumerate(names):
        if name not in ATTACKS:
            raise ConfigError(f"unknown attack '{name}'; {nearest(name, ATTACKS)}")
        if name in names[:place]:
            raise ConfigError(f"attack '{name}' is given twice; leave one out")
    return names


def audit(
    model: Classifier,
    images: Tensor,
    truth: Tensor,
    eps: Mapping[str, Fraction],
    *,
    attacks: Sequence[str] = USUAL,
    index: Tensor | None = None,
    stated: Mapping[str, Any] | None = None,
    steps: int = 100,
    batch_size: int = BATCH,
    semantics: Semantics = "real",
    arithmetic: str = "float64",
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Certify some images and try to refute what the certificate says.

    What is attacked is what the certificate speaks of, the stored weights in float64. An attack's success counts only if this
    function sees it again: another logit above the label's, at a distance measured in float64 and rounded up. Of a deployed
    program the representable points around each certified sphere are searched besides, and the label that it gives decides.

    Args:
        model: the classifier, with a `LipschitzNetwork`.
        images: float32 or float64 (n, c, h, w) in [0, 1], n >= 1.
        truth: int64 (n,), the true classes.
        eps: exact values by name, from `parse_eps_list`.
        attacks: names from `ATTACKS`.
        index: int64 (n,), the numbers of the images in their test part; default 0, 1, ...
        stated: the content of `certificate.json`.
        steps: gradient steps of each attack; pairs of points move half as often.
        batch_size: images that are attacked together.
        semantics: what the certificate speaks of, "real" arithmetic or the "deployed" program.
        arithmetic: in which that program runs, "float64" or "float32"; the images are cast to it.
        progress: called after each batch that was attacked, with the number of images in it.

    Raises:
        DataError: where images or labels do not fit.
        ConfigError: for an unknown attack, or one that cannot search in the norm of the certificate.
        UnsoundError: where the network or the environment cannot be certified.
    """
    net = model.net
    if not isinstance(net, LipschitzNetwork):
        raise UnsoundError(f"an audit needs a LipschitzNetwork, got a {type(net).__name__}")
    if len(images) == 0:
        raise DataError("an audit needs at least one image")
    if model.certify(images[:0]).kind != "deterministic":
        raise UnsoundError(
            "an audit holds one network against its certificate; the label of a smoothed classifier is a vote of many noisy "
            "evaluations, and its radii may fail with probability alpha: certify it again with another model.seed"
        )
    if semantics == "deployed":
        images = images.to(ARITHMETIC[arithmetic])
    certificate = _on_cpu(model.certify(images, semantics=semantics, arithmetic=arithmetic))
    clean = certificate.clean_accuracy(truth)  # checks the labels before anything takes long
    frozen = net.materialise()
    sha256 = sha256_tensors(frozen.state_dict())
    exact = frozen.double().requires_grad_(False)
    device = next(exact.parameters(), images).device
    points = images.to(device, torch.float64)
    with torch.no_grad():
        logits = torch.cat([exact(part) for part in points.split(batch_size)])
    groups = _groups(certificate, truth)
    shown = [k for members in groups.values() for k in members]

    with tempfile.TemporaryDirectory() as folder:
        attacked = run_suite(
            exact,
            points,
            certificate.label.to(device),
            Path(folder) / "attacks.jsonl",
            model_sha256=certificate.model_sha256,
            attacks=attacks,
            eps=list(eps),
            radius=certificate.radius.to(device),
            norm=certificate.norm,
            steps=steps,
            batch_size=batch_size,
            keep=range(len(images)) if semantics == "deployed" else shown,
            progress=progress,
        )
    slopes, pairs = _slopes(exact, points[:ASCENT_IMAGES], certificate, stated, (steps + 1) // 2)
    checks = recount(exact, logits.cpu(), points, truth, certificate, eps, sha256, stated)
    found = [
        *_broken(exact, points, logits, attacked, certificate),
        *(_flipped(net, images.to(device), attacked, certificate) if semantics == "deployed" else ()),
        *(_too_steep(row, pair, sha256) for row, pair in zip(slopes, pairs, strict=True) if not row.holds),
        *(_miscounted(check, sha256) for check in checks if not check.holds),
    ]
    return Audit(
        certificate=certificate,
        truth=truth,
        index=torch.arange(len(images)) if index is None else index,
        distance=attacked.distance,
        attack=attacked.attack,
        clean=clean,
        cra={name: certificate.accuracy_at(value, truth) for name, value in eps.items()},
        attacked={name: attacked.accuracy_at(value, truth) for name, value in eps.items()},
        closest_by={name: attacked.attack.count(name) for name in attacks},
        slopes=tuple(slopes),
        checks=tuple(checks),
        environment=_environment(net, device, arithmetic),
        gallery=tuple(_gallery(exact, points, attacked, groups)),
        violations=tuple(found),
    )


def write_reproducers(violations: Sequence[Violation], folder: Path) -> list[Path]:
    """Write `reproducer-<k>.npz` for each violation, atomically; return the paths.

    Raises:
        OSError: where a file cannot be written.
    """
    paths = []
    for number, violation in enumerate(violations):
        path = folder / f"reproducer-{number}.npz"
        content = io.BytesIO()
        np.savez(content, kind=violation.kind, detail=violation.detail, **violation.arrays)
        with atomic_write(path, "wb") as file:
            file.write(content.getvalue())
        paths.append(path)
    return paths


def _on_cpu(certificate: Certificate) -> Certificate:
    tensors = ("label", "radius", "slack", "margin")
    return replace(certificate, **{name: getattr(certificate, name).cpu() for name in tensors})


@torch.no_grad()
def _broken(
    net: LipschitzNetwork, images: Tensor, logits: Tensor, attacked: SuiteResult, certificate: Certificate
) -> Iterator[Violation]:
    """Look again at every success within a radius: an attack is not believed."""
    for k, point in attacked.inside.items():
        image, label = images[k : k + 1], certificate.label[k : k + 1].to(images.device)
        perturbed = point[None].to(image)
        values = net(perturbed)
        radius, distance = certificate.radius[k].item(), distances(image, perturbed, attacked.norm).item()
        if not (rival_margin(values, label).item() > 0 and distance <= radius):
            continue
        yield Violation(
            kind="attack",
            detail=f"sample {k}: {attacked.attack[k]} changes the label at {distance!r}, within the radius {radius!r}",
            arrays={
                "image": image[0].cpu().numpy(),
                "perturbed": perturbed[0].cpu().numpy(),
                "label": label.item(),
                "logits": logits[k].cpu().numpy(),
                "logits_perturbed": values[0].cpu().numpy(),
                "radius": radius,
                "distance": distance,
                "norm": norm_label(attacked.norm),
                "model_sha256": certificate.model_sha256,
            },
        )


def _flipped(
    net: LipschitzNetwork, images: Tensor, attacked: SuiteResult, certificate: Certificate
) -> Iterator[Violation]:
    """Search at float resolution, towards the closest success of an attack, for what the program labels otherwise."""
    executed = net.materialise().to(images.dtype).requires_grad_(False)
    towards = images.roll(1, 0)  # where no attack succeeded, any direction
    for k, point in attacked.kept.items():
        towards[k] = point.to(images)
    for flip in rounding_search(executed, images, certificate, boundary=towards):
        k, radius = flip.index, certificate.radius[flip.index].item()
        yield Violation(
            kind="rounding",
            detail=f"sample {k}: the program says {flip.label} at {flip.norm!r}, within the radius {radius!r}",
            arrays={
                "image": images[k].cpu().numpy(),
                "perturbed": flip.image.cpu().numpy(),
                "label": certificate.label[k].item(),
                "label_perturbed": flip.label,
                "radius": radius,
                "distance": flip.norm,
                "norm": norm_label(certificate.norm),
                "arithmetic": certificate.arithmetic,
                "model_sha256": certificate.model_sha256,
            },
        )


def _groups(certificate: Certificate, truth: Tensor) -> dict[str, list[int]]:
    """Choose by the certified radius alone, before anything is attacked; no sample stands in two groups."""
    order = certificate.radius.argsort(stable=True).tolist()
    right = [k for k in order if certificate.label[k] == truth[k]]
    wrong = [k for k in reversed(order) if certificate.label[k] != truth[k] and certificate.radius[k] > 0]
    half = min(GALLERY, (len(right) + 1) // 2)
    return {"least": right[:half], "most": right[half:][::-1][:GALLERY], "wrong": wrong[:GALLERY]}


@torch.no_grad()
def _gallery(
    net: LipschitzNetwork, images: Tensor, attacked: SuiteResult, groups: Mapping[str, list[int]]
) -> Iterator[Shown]:
    """Say for each point what it is taken for: the rival that leads there, however narrowly."""
    for group, members in groups.items():
        for k in members:
            point, becomes = attacked.kept.get(k), None
            if point is not None:
                rivals = net(point[None].to(images))[0]
                rivals[attacked.label[k]] = -math.inf
                becomes = int(rivals.argmax())
            yield Shown(group=group, sample=k, image=images[k].cpu(), perturbed=point, becomes=becomes)


# ---- Slopes ----


def _slopes(
    net: LipschitzNetwork,
    images: Tensor,
    certificate: Certificate,
    stated: Mapping[str, Any] | None,
    steps: int,
) -> tuple[list[Layer], list[SteepestPair]]:
    """Search for the steepest pair of the whole body and of each layer, at the layer's own inputs."""
    told = {layer["name"]: float(layer["bound"]) for layer in (stated or {}).get("layers", [])}
    rows, pairs = [], []
    if certificate.lipschitz is not None:
        proved = certificate.lipschitz
        bound = min(proved.value, float((stated or {}).get("lipschitz", {}).get("bound", math.inf)))
        pairs.append(steepest_pair(net.features, images, steps=steps, norm=proved.norm))
        rows.append(_layer("K", bound, proved.proof, pairs[-1]))
    x = images
    for name, layer in net.named_layers():
        proved = layer.lipschitz_bound()
        pairs.append(steepest_pair(layer, x, steps=steps, norm=proved.norm))
        rows.append(_layer(name, min(proved.value, told.get(name, math.inf)), proved.proof, pairs[-1]))
        with torch.no_grad():
            x = layer(x)
    return rows, pairs


def _layer(name: str, bound: float, proof: str, pair: SteepestPair) -> Layer:
    estimate = pair.estimate
    holds = estimate.value <= bound * (1 + SLOPE_ROUNDING)
    return Layer(
        name=name, bound=bound, proof=proof, estimate=estimate.value, method=estimate.method, holds=holds
    )


def _too_steep(layer: Layer, pair: SteepestPair, sha256: str) -> Violation:
    return Violation(
        kind="slope",
        detail=f"{layer.name}: a pair with the slope {layer.estimate!r}, above the bound {layer.bound!r}",
        arrays={
            "layer": layer.name,
            "image": pair.first.cpu().numpy(),
            "perturbed": pair.last.cpu().numpy(),
            "bound": layer.bound,
            "slope": layer.estimate,
            "model_sha256": sha256,
        },
    )


def _miscounted(check: Check, sha256: str) -> Violation:
    return Violation(
        kind="recount",
        detail=f"{check.name}: {check.detail}",
        arrays={"check": check.name, "model_sha256": sha256},
    )


def _environment(net: LipschitzNetwork, device: torch.device, arithmetic: str) -> dict[str, Any]:
    """Ask the guard again, now that all is done, and write down what it has looked at."""
    check_certifiable(net)
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "weights": str(next(net.parameters()).dtype).removeprefix("torch."),
        "arithmetic": arithmetic,
        "unit_roundoff": UNIT_ROUNDOFF[ARITHMETIC[arithmetic]],
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "autocast": torch.is_autocast_enabled(device.type),
        "guard": "passed: eval mode, no hooks, finite weights, subnormal numbers, exact products",
    }
