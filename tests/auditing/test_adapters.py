import builtins
import importlib
import math
from typing import Any

import pytest
import torch
from known_boundaries import linear_case, sphere_case, trained_digits
from torch import Tensor

from lipnext.auditing import adapters
from lipnext.auditing.adapters import autoattack, foolbox_attack
from lipnext.auditing.ascent import distances, rival_margin
from lipnext.auditing.attack import minimal_norm
from lipnext.core.errors import ConfigError, DataError, UnsoundError


@pytest.fixture
def foolbox() -> None:
    adapters_need("foolbox")


@pytest.fixture
def pyautoattack() -> None:
    adapters_need("pyautoattack")


def adapters_need(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


@pytest.mark.usefixtures("foolbox")
@pytest.mark.parametrize(("attack", "norm"), [("ddn", 2.0), ("fmn", 2.0), ("fmn", math.inf)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_foolbox_on_a_known_boundary(attack: Any, norm: float, dtype: torch.dtype) -> None:
    logits, images, labels, truth = linear_case(0, norm)
    images = images.to(dtype)
    result = foolbox_attack(logits, images, labels, attack=attack, norm=norm, box=False)
    assert result.success.all()
    assert result.images.dtype == dtype
    assert (result.distance >= truth * (1 - 1e-5)).all()
    assert (rival_margin(logits(result.images), labels) > 0).all()
    if (attack, norm) != ("fmn", 2.0):  # foolbox's l2 FMN is far off here, by a factor of up to 40
        assert (result.distance <= truth * 1.1).all()


@pytest.mark.usefixtures("foolbox")
@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_foolbox_pgd_counts_only_what_lies_in_the_ball(norm: float) -> None:
    logits, images, labels, truth = linear_case(1, norm)
    radius = 1.2 * float(truth.median())
    result = foolbox_attack(logits, images, labels, radius, attack="pgd", norm=norm, box=False)
    assert result.success.any()
    assert (result.distance[result.success] <= radius).all()
    assert not result.success[truth > radius].any()


@pytest.mark.usefixtures("foolbox")
def test_ours_is_not_weaker_than_foolbox_in_l2() -> None:
    net, images, labels = trained_digits()
    for box in (False, True):
        ours = minimal_norm(net, images, labels, box=box).distance
        theirs = foolbox_attack(net, images, labels, attack="ddn", box=box).distance
        assert (ours <= theirs * 1.005).all()
        assert (ours / theirs).mean() < 1


@pytest.mark.usefixtures("foolbox")
def test_ours_is_not_weaker_than_foolbox_in_linf() -> None:
    net, images, labels = trained_digits()
    ours = minimal_norm(net, images, labels, norm=math.inf).distance
    theirs = foolbox_attack(net, images, labels, attack="fmn", norm=math.inf, box=False).distance
    assert (ours <= theirs * 1.005).all()
    assert (ours / theirs).mean() < 1


@pytest.mark.usefixtures("pyautoattack")
@pytest.mark.parametrize(
    ("norm", "classes"),
    [
        (math.inf, 3),
        pytest.param(2.0, 5, marks=pytest.mark.slow),
        pytest.param(2.0, 2, marks=pytest.mark.slow),
    ],
)
def test_autoattack_on_a_known_boundary(norm: float, classes: int) -> None:
    logits, images, labels, truth = linear_case(0, norm, n=6, classes=classes)
    radius = 1.05 * float(truth.max())
    result = autoattack(logits, images, labels, radius, norm=norm, queries=20)
    # The clipped ball is smaller than the one whose distance is known.
    assert result.success.any()
    assert (result.distance[result.success] >= truth[result.success] * (1 - 1e-6)).all()
    assert (result.distance[result.success] <= radius).all()
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    inside = autoattack(logits, images, labels, 0.99 * float(truth.min()), norm=norm, queries=20)
    assert not inside.success.any()


@pytest.mark.slow
@pytest.mark.usefixtures("pyautoattack")
def test_autoattack_on_the_digits_breaks_no_more_than_our_own() -> None:
    net, images, labels = trained_digits()
    ours = minimal_norm(net, images[:30], labels[:30], box=True).distance
    radius = float(ours.median())
    result = autoattack(net, images[:30], labels[:30], radius, queries=50)
    broken = int((ours <= radius).sum())
    assert broken - 2 <= int(result.success.sum()) <= broken + 1
    assert torch.equal(
        result.distance[result.success], distances(images[:30], result.images, 2.0)[result.success]
    )


class _Liar:
    """An attack that returns a point just outside of the ball, and one that is not adversarial."""

    def __init__(self, steps: int) -> None:
        pass

    def __call__(
        self, model: Any, images: Tensor, labels: Tensor, epsilons: float
    ) -> tuple[Tensor, None, None]:
        return images + torch.tensor([[0.51, 0.0], [0.1, 0.0]], dtype=images.dtype), None, None


@pytest.mark.usefixtures("foolbox")
def test_what_the_library_returns_is_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import foolbox.attacks

    monkeypatch.setattr(foolbox.attacks, "L2ProjectedGradientDescentAttack", _Liar)
    images = torch.zeros(2, 2, dtype=torch.float64)

    def logits(x: Tensor) -> Tensor:
        return torch.stack([0.4 - x[:, 0], x[:, 0]], 1)

    result = foolbox_attack(logits, images, torch.tensor([0, 0]), 0.5, attack="pgd")
    assert not result.success.any()
    assert torch.equal(result.images, images)
    assert foolbox_attack(logits, images, torch.tensor([0, 0]), 0.52, attack="pgd").success.tolist() == [
        True,
        False,
    ]


@pytest.mark.usefixtures("foolbox", "pyautoattack")
def test_global_state_is_put_back() -> None:
    logits, images, labels, _ = sphere_case(0)
    images = images.clamp(0, 1)
    labels = logits(images).argmax(1)
    before = torch.get_rng_state(), torch.get_default_dtype()
    first = [foolbox_attack(logits, images, labels, 0.3, attack="pgd", seed=3).images for _ in range(2)]
    assert torch.equal(*first)
    autoattack(logits, images[:1], labels[:1], 0.2, queries=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_default_dtype() == before[1]


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 0])
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("foolbox", "pyautoattack"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(adapters.importlib, "import_module", missing)
    message = r"is not installed; run: pip install 'lipnext\[attacks\]'"
    with pytest.raises(ConfigError, match="foolbox " + message) as caught:
        foolbox_attack(lambda x: x.flatten(1), images, labels)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="pyautoattack " + message):
        autoattack(lambda x: x.flatten(1), images, labels, 0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attack": "cw"}, ConfigError, "unknown foolbox attack 'cw'; known: ddn, fmn, pgd"),
        (
            {"attack": "ddn", "norm": math.inf},
            ConfigError,
            "foolbox's ddn has no linf form; use attack='fmn'",
        ),
        ({"attack": "pgd"}, ConfigError, "foolbox's pgd attacks one radius; pass radius"),
        ({"norm": 1.0}, UnsoundError, r"the norm must be 2\.0 or inf"),
        ({"steps": 0}, ConfigError, "steps must be at least 1"),
        ({"radius": -1.0}, DataError, r"radius must be one finite number above 0, got -1\.0"),
        ({"images": torch.full((2, 1, 8, 8), 1.5)}, DataError, r"needs images in \[0, 1\]"),
    ],
)
@pytest.mark.usefixtures("foolbox")
def test_bad_input_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"images": torch.rand(2, 1, 8, 8), "labels": torch.tensor([0, 1])} | options
    with pytest.raises(error, match=message):
        foolbox_attack(lambda x: x.flatten(1), **given)


@pytest.mark.usefixtures("pyautoattack")
def test_autoattack_refuses_what_it_cannot_do() -> None:
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])

    def logits(x: Tensor) -> Tensor:
        return x.flatten(1)

    with pytest.raises(DataError, match=r"needs images \(n, C, H, W\)"):
        autoattack(logits, images[:, 0], labels, 0.1)
    with pytest.raises(DataError, match=r"needs images in \[0, 1\]"):
        autoattack(logits, images + 1, labels, 0.1)
    with pytest.raises(DataError, match="too small for AutoAttack"):
        autoattack(logits, images, labels, 1e-9)
    assert autoattack(logits, images[:0], labels[:0], 0.1).distance.shape == (0,)
