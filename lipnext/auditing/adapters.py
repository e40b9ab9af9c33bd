"""Attacks of pyautoattack and foolbox (extra `lipnext[attacks]`), every point they return judged again by our own rules.

Both libraries run on their own notion of success and of the norm, and may return points a little outside of the ball. What
counts here is what `attack` counts: a rival strictly above the label, at a distance measured in float64 and rounded up.
"""

import contextlib
import importlib
import math
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lipnext.auditing.ascent import AttackResult, Best, Logits, check_inputs, inner_radii
from lipnext.core.bound import norm_label
from lipnext.core.errors import ConfigError, DataError, nearest
from lipnext.core.seed import seeded

FoolboxAttack = Literal["ddn", "fmn", "pgd"]

# Class, and whether it looks for the smallest perturbation or attacks one radius.
_FOOLBOX: dict[tuple[str, float], tuple[str, bool]] = {
    ("ddn", 2.0): ("DDNAttack", True),
    ("fmn", 2.0): ("L2FMNAttack", True),
    ("fmn", math.inf): ("LInfFMNAttack", True),
    ("pgd", 2.0): ("L2ProjectedGradientDescentAttack", False),
    ("pgd", math.inf): ("LinfProjectedGradientDescentAttack", False),
}

# Foolbox needs some bounds; these are further away than any radius.
_NO_BOX = (-100.0, 100.0)


def foolbox_attack(
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    radius: float | None = None,
    *,
    attack: FoolboxAttack = "ddn",
    steps: int = 100,
    seed: int = 0,
    norm: float = 2.0,
    box: bool = True,
) -> AttackResult:
    """Attack with foolbox: DDN (l2) or FMN for the smallest perturbation, PGD in one radius.

    Args:
        logits: the network.
        images: (n, ...) float32 or float64; in [0, 1] with `box`.
        labels: int64 (n,), the labels that should change.
        radius: of the ball, needed by "pgd"; successes outside of it don't count. None: no limit.
        attack: "ddn", "fmn" or "pgd".
        steps: gradient steps.
        seed: of the attack's own random numbers; the global generators are put back.
        norm: 2.0 or inf.
        box: keep the images in [0, 1].

    Raises:
        ConfigError: where foolbox is not installed, or has no such attack in this norm.
        DataError: where images, labels or the radius do not fit.
        UnsoundError: for another norm.
    """
    norm_label(norm)
    check_inputs(images, labels, steps)
    if attack not in get_args(FoolboxAttack):
        raise ConfigError(f"unknown foolbox attack {attack!r}; {nearest(attack, get_args(FoolboxAttack))}")
    if (attack, norm) not in _FOOLBOX:
        raise ConfigError(f"foolbox's {attack} has no {norm_label(norm)} form; use attack='fmn'")
    name, minimal = _FOOLBOX[attack, norm]
    if radius is None and not minimal:
        raise ConfigError(f"foolbox's {attack} attacks one radius; pass radius")
    if box:
        _check_box(images)
    foolbox = _library("foolbox")
    limit = _limit(radius, images)
    best = Best(images, labels, norm, limit)
    if len(images) == 0:
        return best.result()
    model = foolbox.PyTorchModel(
        _Network(logits, images.dtype).eval(), bounds=(0.0, 1.0) if box else _NO_BOX, device=images.device
    )
    epsilon = None if minimal else float(inner_radii(limit, images)[0])
    with seeded(seed):
        points, _, _ = getattr(foolbox.attacks, name)(steps=steps)(model, images, labels, epsilons=epsilon)
    _judge(best, logits, points)
    return best.result()


def autoattack(
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    radius: float,
    *,
    seed: int = 0,
    norm: float = 2.0,
    queries: int = 5000,
    batch_size: int = 250,
) -> AttackResult:
    """Run AutoAttack (Croce and Hein, ICML 2020): APGD, FAB and Square, as pyautoattack implements them.

    It works in float32 and inside [0, 1]. APGD on the DLR objective needs 3 classes, its targeted form 4; with fewer
    classes they are left out, and so is Square on images of less than 5 pixels a side, where it divides by zero.

    Args:
        logits: the network.
        images: (n, C, H, W) float32 or float64 in [0, 1].
        labels: int64 (n,), the labels that should change.
        radius: of the ball, above 0.
        seed: of the attack's own random numbers; the global generators are put back.
        norm: 2.0 or inf.
        queries: of the Square attack.
        batch_size: images that are attacked together.

    Raises:
        ConfigError: where pyautoattack is not installed.
        DataError: where images, labels or the radius do not fit.
        UnsoundError: for another norm.
    """
    norm_label(norm)
    check_inputs(images, labels, queries)
    if images.dim() != 4:
        raise DataError(f"AutoAttack needs images (n, C, H, W), got {images.dim()}-D ones")
    _check_box(images)
    library = _library("pyautoattack")
    limit = _limit(radius, images)
    best = Best(images, labels, norm, limit)
    if len(images) == 0:
        return best.result()
    with torch.no_grad():
        classes = logits(images[:1]).shape[1]
    attacks = ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
    attacks = [name for name in attacks if classes >= {"apgd-dlr": 3, "apgd-t": 4}.get(name, 2)]
    if min(images.shape[2:]) < 5:
        attacks.remove("square")
    # The library rounds its points to float32, whatever the type of the images.
    epsilon = float(inner_radii(limit[:1] * (1 - 1e-6), images[:1].float())[0])
    if epsilon <= 0:
        raise DataError(f"radius {radius:g} is too small for AutoAttack, which works in float32; use apgd")
    with seeded(seed), _float32_by_default():
        run = library.AutoAttack(
            _Network(logits, images.dtype).eval(),
            attacks=attacks,
            version="custom",
            norm={2.0: "L2", math.inf: "Linf"}[norm],
            eps=epsilon,
            seed=seed,
            device=images.device,
        )
        run.apgd.n_restarts = 1
        run.fab.n_restarts = 1
        run.apgd_targeted.n_target_classes = run.fab.n_target_classes = min(9, classes - 1)
        run.square.n_queries = queries
        points, _ = run.run_standard_evaluation(images.float(), labels, batch_size=batch_size)
    _judge(best, logits, points)
    return best.result()


class _Network(nn.Module):
    """The function as a module that answers in the type of its input, computing in that of the images."""

    def __init__(self, logits: Logits, dtype: torch.dtype) -> None:
        super().__init__()
        self.logits, self.dtype = logits, dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images.to(self.dtype)).to(images.dtype)


@contextlib.contextmanager
def _float32_by_default() -> Iterator[None]:
    """Pyautoattack makes tensors without a type and mixes them with float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _judge(best: Best, logits: Logits, points: Tensor) -> None:
    points = points.detach().to(best.originals.dtype)
    best.offer(torch.arange(len(points), device=points.device), points, logits(points))


def _limit(radius: float | None, images: Tensor) -> Tensor:
    if radius is not None and not (math.isfinite(radius) and radius > 0):
        raise DataError(f"radius must be one finite number above 0, got {radius!r}")
    return torch.full((len(images),), math.inf if radius is None else radius, dtype=torch.float64)


def _check_box(images: Tensor) -> None:
    if len(images) and not bool(((images >= 0) & (images <= 1)).all()):
        raise DataError("this attack needs images in [0, 1]; leave out mean and standard deviation")


def _library(name: str) -> ModuleType | Any:
    try:
        with warnings.catch_warnings():
            # Warnings about the library's own imports are nothing that a user could mend.
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} is not installed; run: pip install 'lipnext[attacks]'") from error
