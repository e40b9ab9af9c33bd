import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_boundaries import Case, linear_case, sphere_case, trained_digits
from torch import Tensor

from lipnext.auditing.apgd import apgd, checkpoints
from lipnext.auditing.ascent import distances, rival_margin
from lipnext.auditing.attack import minimal_norm, pgd
from lipnext.core.errors import ConfigError, DataError, UnsoundError

OBJECTIVES = ["ce", "dlr", "margin"]


def published_checkpoints(steps: int) -> list[int]:
    """p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06), in exact decimals."""
    from decimal import Decimal

    p = [Decimal(0), Decimal("0.22")]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Decimal("0.03"), Decimal("0.06")))
    return sorted({math.ceil(q * steps) for q in p[1:-1]})


def test_the_checkpoints_are_the_published_ones() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 7, 50, 333):
        assert checkpoints(steps) == published_checkpoints(steps)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_spheres_are_reached_within_one_percent_and_never_inside(objective: str, norm: float) -> None:
    logits, images, labels, truth = sphere_case(0, norm)
    outside = apgd(logits, images, labels, 1.01 * truth, objective=objective, norm=norm)
    assert outside.success.all()
    assert (outside.distance <= 1.01 * truth).all()
    assert (rival_margin(logits(outside.images), labels) > 0).all()
    inside = apgd(logits, images, labels, 0.999 * truth, objective=objective, norm=norm)
    assert not inside.success.any()
    assert torch.equal(inside.images, images)


# With several rivals the cross-entropy and DLR follow a mixture or the runner-up, whose boundary need not be the nearest.
LINEAR = [("ce", 2), ("dlr", 3), ("margin", 2), ("margin", 5), ("margin", 12)]


@pytest.mark.parametrize(("objective", "classes"), LINEAR)
@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_linear_boundaries_are_reached_within_one_percent_and_never_inside(
    objective: str, classes: int, norm: float
) -> None:
    logits, images, labels, truth = linear_case(0, norm, classes=classes)
    outside = apgd(logits, images, labels, 1.01 * truth, objective=objective, norm=norm, restarts=2)
    assert outside.success.all()
    assert (outside.distance <= 1.01 * truth).all()
    inside = apgd(logits, images, labels, 0.999 * truth, objective=objective, norm=norm)
    assert not inside.success.any()


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    factor=st.floats(0.2, 3.0),
    norm=st.sampled_from([2.0, math.inf]),
    objective=st.sampled_from(OBJECTIVES),
)
def test_no_success_is_ever_closer_than_the_truth(
    seed: int, factor: float, norm: float, objective: str
) -> None:
    logits, images, labels, truth = linear_case(seed, norm, n=4)
    result = apgd(logits, images, labels, factor * truth, objective=objective, norm=norm, steps=20)
    assert (result.distance >= truth * (1 - 1e-12)).all()
    found = result.success
    assert (result.distance[found] <= factor * truth[found]).all()
    if objective == "margin" and factor >= 1.05:
        assert found.all()


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_float32_stays_in_the_ball_as_measured_in_float64(norm: float) -> None:
    logits, images, labels, truth = linear_case(2, norm)
    images = images.float()
    result = apgd(logits, images, labels, 1.05 * truth, objective="margin", norm=norm)
    assert result.images.dtype == torch.float32
    assert result.success.all()
    assert (distances(images, result.images, norm) <= 1.05 * truth).all()


def test_on_a_trained_network_it_is_not_weaker_than_pgd_with_as_many_steps() -> None:
    net, images, labels = trained_digits()
    images, labels = images[:50], labels[:50]
    closest = minimal_norm(net, images, labels).distance
    radius = float(closest.median())
    count = {
        name: int(apgd(net, images, labels, radius, objective=name).success.sum()) for name in OBJECTIVES
    }
    plain = int(pgd(net, images, labels, radius, steps=100, restarts=1).success.sum())
    # A single ball and one restart each; one image of fifty may go either way.
    assert max(count.values()) >= plain - 1
    assert min(count.values()) >= int((closest <= radius).sum()) - 4


def test_the_step_halves_where_it_oscillates() -> None:
    """From (0.49, 0) the top of a cone at the origin is 0.49 away: steps of twice the radius can't come within 1e-3 of it."""
    seen: list[float] = []

    def logits(x: Tensor) -> Tensor:
        height = -x.norm(dim=1)
        seen.append(float(x.detach().norm()))
        return torch.stack([0 * height, height - 1], 1)

    images = torch.tensor([[0.49, 0.0]], dtype=torch.float64)
    apgd(logits, images, torch.tensor([0]), 1.0, objective="margin", steps=100)
    assert min(seen) < 1e-3
    seen.clear()
    apgd(logits, images, torch.tensor([0]), 1.0, objective="margin", steps=10)
    assert min(seen) > 1e-3


def test_restarts_help_and_each_image_is_left_alone_after_its_success() -> None:
    sizes: list[int] = []
    logits, images, labels, truth = linear_case(1)

    def counting(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return logits(x)

    radius = torch.where(torch.arange(12) % 2 == 0, 2 * truth, 0.5 * truth)
    result = apgd(counting, images, labels, radius, objective="margin", restarts=2)
    assert torch.equal(result.success, torch.arange(12) % 2 == 0)
    assert sizes[-1] == 6


def test_the_box_is_kept() -> None:
    logits, images, labels, truth = linear_case(4)
    result = apgd(logits, images, labels, 4 * truth, objective="margin", box=True)
    assert result.success.any()
    assert result.images.min() >= 0
    assert result.images.max() <= 1


def test_it_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    logits, images, labels, truth = sphere_case(1)
    before = torch.get_rng_state()
    runs = [apgd(logits, images, labels, 1.2 * truth, seed=5, restarts=2).images for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_progress_counts_all_steps_even_where_all_images_give_in(factor: float) -> None:
    logits, images, labels, truth = linear_case(0)
    calls: list[int] = []
    apgd(logits, images, labels, factor * truth, steps=9, restarts=3, progress=calls.append)
    assert sum(calls) == 27


def test_ties_and_equal_logits_are_no_success() -> None:
    images = torch.zeros(1, 4, dtype=torch.float64)
    for objective in OBJECTIVES:
        result = apgd(lambda x: x[:, :3] - x[:, :3], images, torch.tensor([1]), 1.0, objective=objective)
        assert not result.success.any()


def test_an_empty_batch_has_an_empty_result() -> None:
    logits, images, labels, _ = linear_case(0)
    assert apgd(logits, images[:0], labels[:0], 1.0).distance.shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"objective": "cw"}, ConfigError, "unknown objective 'cw'; .*known: ce, dlr, margin"),
        ({"objective": "dlr"}, ConfigError, "needs at least 3 classes, got 2; use objective='ce'"),
        ({"steps": 0}, ConfigError, "steps must be at least 1"),
        ({"restarts": 0}, ConfigError, "restarts must be at least 1"),
        ({"norm": 1.0}, UnsoundError, "the norm must be 2.0 or inf"),
        ({"radius": -1.0}, DataError, "a radius must be finite and at least 0"),
        ({"labels_predicted": torch.zeros(2)}, DataError, "labels must be int64"),
        ({"images": torch.zeros(2, 2, dtype=torch.uint8)}, DataError, "needs float32 or float64 images"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    given: dict[str, object] = {
        "images": torch.rand(2, 2),
        "labels_predicted": torch.tensor([0, 1]),
        "radius": 0.1,
    }
    with pytest.raises(error, match=message) as caught:
        apgd(lambda x: x, **(given | change))
    assert "\n" not in str(caught.value)


def test_the_cases_are_what_they_say() -> None:
    """The true distances, from the boundary's own equation and no attack."""
    cases: list[Callable[[], Case]] = [lambda: sphere_case(0, math.inf), lambda: linear_case(0, math.inf)]
    for case in cases:
        logits, images, labels, truth = case()
        assert (truth > 0).all()
        assert torch.equal(logits(images).argmax(1), labels)
