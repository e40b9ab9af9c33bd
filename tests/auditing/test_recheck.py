import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from known_boundaries import linear_case, sphere_case, trained_digits
from torch import Tensor

from lipnext.auditing.apgd import apgd
from lipnext.auditing.ascent import AttackResult, distances, rival_margin
from lipnext.auditing.attack import minimal_norm, pgd
from lipnext.auditing.recheck import attack_in_float32
from lipnext.auditing.runner import run_suite
from lipnext.core.errors import ConfigError, DataError


@pytest.mark.parametrize("norm", [2.0, math.inf])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", [linear_case, sphere_case])
def test_known_distances_within_one_percent(case: Any, seed: int, norm: float) -> None:
    logits, images, labels, truth = case(seed, norm)
    result = attack_in_float32(minimal_norm, logits, logits, images, labels, norm=norm)
    assert result.success.all()
    assert result.images.dtype == result.distance.dtype == torch.float64
    assert (result.distance >= truth * (1 - 1e-12)).all()
    assert (result.distance <= truth * 1.01).all()


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_an_attack_in_a_ball_finds_what_lies_just_inside(attack: Any) -> None:
    logits, images, labels, truth = linear_case(3)
    assert attack_in_float32(attack, logits, logits, images, labels, truth * 1.01).success.all()
    assert not attack_in_float32(attack, logits, logits, images, labels, truth * (1 - 1e-9)).success.any()


def test_every_success_is_one_in_float64_and_none_is_lost() -> None:
    net, images, labels = trained_digits()
    images, labels = images[:40], labels[:40]
    result = attack_in_float32(minimal_norm, deepcopy(net).float(), net, images, labels, steps=20)
    alone = minimal_norm(net, images, labels, steps=20)
    assert result.success.all()
    assert (rival_margin(net(result.images), labels) > 0).all()
    assert torch.equal(result.distance, distances(images, result.images, 2.0))
    assert (result.distance <= alone.distance * 1.01).all()


def test_a_success_of_float32_alone_does_not_count() -> None:
    """A float32 network that sees the boundaries too near."""
    logits, images, labels, truth = linear_case(4)

    def deceived(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return logits(x) - 0.01 * torch.nn.functional.one_hot(labels, 5).to(x.dtype)

    radius = truth * (1 - 1e-6)
    options: dict[str, Any] = {"restarts": 1, "steps": 10}
    # One image at a time: those that are broken already are left out of a batch.
    images, labels, radius = images[:1], labels[:1], radius[:1]
    fooled = pgd(deceived, images.float(), labels, radius, **options)
    assert fooled.success.all()
    judged = attack_in_float32(pgd, deceived, logits, images, labels, radius, **options)
    assert not judged.success.any()
    assert judged.distance.isinf().all()


def test_a_planted_claim_without_any_change_of_label_is_dropped() -> None:
    logits, images, labels, _ = linear_case(5)

    def liar(_: Any, images: Tensor, labels: Tensor, **options: Any) -> AttackResult:
        return AttackResult(
            success=torch.ones(len(images), dtype=torch.bool),
            distance=torch.full((len(images),), 1e-3, dtype=torch.float64),
            images=images + 1e-9,
            label=labels,
            norm=2.0,
        )

    assert not attack_in_float32(liar, logits, logits, images, labels).success.any()


def test_a_claim_that_float64_does_not_see_is_searched_again_in_float64() -> None:
    """A float32 network that takes every image for another class ends each search at once, at distance 0."""
    logits, images, labels, truth = linear_case(6)

    def inverted(x: Tensor) -> Tensor:
        return -logits(x)

    result = attack_in_float32(minimal_norm, inverted, logits, images, labels)
    assert result.success.all()
    assert (result.distance <= truth * 1.01).all()
    assert (result.distance >= truth * (1 - 1e-12)).all()


def suite(path: Path, radius: Tensor, case: Any, **options: Any) -> Any:
    logits, images, labels, _ = case
    options = {"searched": logits, "steps": 20, "batch_size": 5, "eps": "0.2"} | options
    return run_suite(logits, images, labels, path, model_sha256="0" * 64, radius=radius, **options)


def test_a_false_certificate_is_refuted_and_an_honest_one_is_not(tmp_path: Path) -> None:
    case = linear_case(7)
    logits, images, labels, truth = case
    radius = truth * (1 - 1e-9)
    assert suite(tmp_path / "honest.jsonl", radius, case).inside == {}
    radius[[1, 8]] *= 1.02
    found = suite(tmp_path / "false.jsonl", radius, case)
    assert sorted(found.inside) == [1, 8]
    for k, point in found.inside.items():
        assert point.dtype == torch.float64
        assert rival_margin(logits(point[None]), labels[k : k + 1]) > 0
        assert float(distances(images[k : k + 1], point[None], 2.0)) == float(found.distance[k]) <= radius[k]


def test_balls_that_change_no_count_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lipnext.auditing import runner

    case = linear_case(8)
    _, _, labels, distance = case
    truth = labels.clone()
    truth[:3] = (labels[:3] + 1) % 5
    radius = distance * 0.9
    seen: list[Tensor] = []

    def counting(logits: Any, images: Tensor, labels: Tensor, ball: Tensor, **options: Any) -> AttackResult:
        seen.append(ball)
        return pgd(logits, images, labels, ball, **options)

    monkeypatch.setitem(runner.IN_A_BALL, "pgd", counting)
    options = {"attacks": ["pgd"], "eps": "0.05,0.1", "truth": truth, "batch_size": 12}
    found = suite(tmp_path / "a.jsonl", radius, case, **options)
    assert len(seen) == 3
    broken = torch.zeros_like(labels, dtype=torch.bool)
    for eps, balls in zip((0.05, 0.1), seen, strict=False):
        assert torch.allclose(balls, torch.full_like(balls, eps))
        assert len(balls) == int(((labels == truth) & (radius < eps) & ~broken).sum())
        broken |= (distance < eps) & (labels == truth)
    assert set(seen[-1].tolist()) <= set(radius.tolist())
    assert len(seen[-1]) == len(labels)
    everything = suite(tmp_path / "b.jsonl", radius, case, **(options | {"truth": None}))
    for eps in ("0.05", "0.1"):
        assert found.accuracy_at(eps, truth) == everything.accuracy_at(eps, truth)


def test_settings_are_part_of_the_file_and_checked(tmp_path: Path) -> None:
    case = linear_case(9, n=3)
    logits, images, labels, truth = case
    path = tmp_path / "a.jsonl"
    suite(path, truth, case, attacks=["pgd"], steps=3)
    with pytest.raises(ConfigError, match="another search"):
        suite(path, truth, case, attacks=["pgd"], steps=3, searched=None)
    with pytest.raises(ConfigError, match="another data_sha256"):
        suite(path, truth, case, attacks=["pgd"], steps=3, truth=labels)
    single = (logits, images.float(), labels, truth)
    with pytest.raises(ConfigError, match="checked in float64; pass float64 images"):
        suite(tmp_path / "b.jsonl", truth, single)
    with pytest.raises(DataError, match=r"truth must be int64 of shape \(3,\)"):
        suite(tmp_path / "b.jsonl", truth, case, truth=labels[:2])
