import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_boundaries import Case, linear_case, sphere_case
from torch import Tensor

from lipnext.auditing.ascent import AttackResult, distances, rival_margin
from lipnext.auditing.attack import minimal_norm, pgd, violations
from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.errors import ConfigError, DataError, UnsoundError

CASES = [lambda: linear_case(0), lambda: linear_case(1), lambda: sphere_case(0)]


@pytest.mark.parametrize("case", CASES, ids=["linear-0", "linear-1", "spheres"])
def test_minimal_norm_finds_the_true_distance_within_one_percent(case: Callable[[], Case]) -> None:
    logits, images, labels, truth = case()
    result = minimal_norm(logits, images, labels)
    assert result.success.all()
    assert (result.distance >= truth * (1 - 1e-12)).all()
    assert (result.distance <= truth * 1.01).all()
    assert (rival_margin(logits(result.images), labels) > 0).all()


@pytest.mark.parametrize("case", [linear_case, sphere_case], ids=["linear", "spheres"])
@pytest.mark.parametrize("seed", [0, 1])
def test_linf_minimal_norm_finds_the_true_distance_within_one_percent(
    case: Callable[[int, float], Case], seed: int
) -> None:
    logits, images, labels, truth = case(seed, math.inf)
    result = minimal_norm(logits, images, labels, norm=math.inf)
    assert result.norm == math.inf
    assert result.success.all()
    assert (result.distance >= truth * (1 - 1e-12)).all()
    assert (result.distance <= truth * 1.01).all()
    assert ((result.images - images).flatten(1).abs().amax(1) <= result.distance).all()


def test_the_second_nearest_rival_by_linearisation_is_tried_too() -> None:
    """The boundary of rival 1 looks nearer but bends away; that of rival 2 is the true nearest one."""

    def logits(x: Tensor) -> Tensor:
        first, second = x[:, 0], x[:, 1]
        return torch.stack(
            [0 * first, first - 0.5 - first.clamp_min(0.3).sub(0.3) * 0.9, second - 0.6], dim=1
        )

    images = torch.zeros(1, 2, dtype=torch.float64)
    # Along the first axis: slope 1 up to 0.3, then 0.1, so that the margin of 0.5 vanishes at 2.3.
    result = minimal_norm(logits, images, torch.tensor([0]))
    assert result.distance.item() == pytest.approx(0.6, rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=["linear-0", "linear-1", "spheres"])
def test_pgd_succeeds_just_outside_the_true_distance_and_never_inside(case: Callable[[], Case]) -> None:
    logits, images, labels, truth = case()
    outside = pgd(logits, images, labels, 1.05 * truth)
    assert outside.success.all()
    assert (outside.distance <= 1.05 * truth).all()
    assert (logits(outside.images).argmax(1) != labels).all()
    inside = pgd(logits, images, labels, 0.95 * truth)
    assert not inside.success.any()
    assert inside.distance.isinf().all()
    torch.testing.assert_close(inside.images, images, rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_linf_pgd_succeeds_just_outside_the_true_distance_and_never_inside(seed: int) -> None:
    logits, images, labels, truth = linear_case(seed, norm=math.inf)
    outside = pgd(logits, images, labels, 1.05 * truth, norm=math.inf)
    assert outside.success.all()
    assert ((outside.images - images).flatten(1).abs().amax(1) <= 1.05 * truth).all()
    assert not pgd(logits, images, labels, 0.95 * truth, norm=math.inf).success.any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.floats(0.2, 3.0), norm=st.sampled_from([2.0, math.inf]))
def test_pgd_agrees_with_the_exact_answer_at_any_radius(seed: int, factor: float, norm: float) -> None:
    logits, images, labels, truth = linear_case(seed, norm=norm, n=4)
    result = pgd(logits, images, labels, factor * truth, norm=norm, steps=20)
    if factor <= 1:
        assert not result.success.any()
    if factor >= 1.05:
        assert result.success.all()
        assert (result.distance <= factor * truth).all()


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_pgd_in_float32_stays_in_the_ball_as_measured_in_float64(norm: float) -> None:
    logits, images, labels, truth = linear_case(2, norm=norm)
    images = images.float()
    result = pgd(logits, images, labels, 1.05 * truth, norm=norm)
    assert result.images.dtype == torch.float32
    assert result.success.all()
    assert (distances(images, result.images, norm) <= 1.05 * truth).all()


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_minimal_norm_in_float32_is_as_close(norm: float) -> None:
    logits, images, labels, truth = linear_case(2, norm=norm)
    result = minimal_norm(logits, images.float(), labels, norm=norm)
    assert result.images.dtype == torch.float32
    torch.testing.assert_close(result.distance, truth, rtol=1e-4, atol=0)


def test_one_radius_serves_all_images_and_zero_reaches_none() -> None:
    logits, images, labels, truth = linear_case(3)
    radius = float(truth.median()) * 1.001
    result = pgd(logits, images, labels, radius)
    assert torch.equal(result.success, truth < radius)
    assert not pgd(logits, images, labels, 0.0).success.any()


def test_the_box_keeps_images_in_0_1() -> None:
    logits, images, labels, truth = linear_case(4)
    free = minimal_norm(logits, images, labels)
    boxed = minimal_norm(logits, images, labels, box=True)
    assert free.images.min() < 0 or free.images.max() > 1
    assert boxed.images.min() >= 0
    assert boxed.images.max() <= 1
    assert (boxed.distance >= truth * (1 - 1e-12)).all()
    ball = pgd(logits, images, labels, 4 * truth, box=True)
    assert ball.success.any()
    assert ball.images.min() >= 0
    assert ball.images.max() <= 1


def test_the_box_distance_is_the_constrained_one() -> None:
    # Two pixels, boundary x + y = 1.9 from (0.95, 0.1): the free projection (1.375, 0.525) leaves the box,
    # the nearest point of the boundary in the box is (1, 0.9).
    images = torch.tensor([[0.95, 0.1]], dtype=torch.float64)

    def logits(x: Tensor) -> Tensor:
        s = x.sum(1) - 1.9
        return torch.stack([-s, s], 1)

    labels = torch.tensor([0])
    assert minimal_norm(logits, images, labels).distance.item() == pytest.approx(
        0.85 / math.sqrt(2), rel=1e-2
    )
    boxed = minimal_norm(logits, images, labels, box=True).distance.item()
    assert math.hypot(0.05, 0.8) <= boxed * (1 + 1e-12)
    assert boxed <= math.hypot(0.05, 0.8) * 1.02


def test_attacks_are_reproducible_and_leave_the_global_generator_alone() -> None:
    logits, images, labels, truth = sphere_case(1)
    before = torch.get_rng_state()
    runs = [pgd(logits, images, labels, 1.2 * truth, seed=5).images for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(*[minimal_norm(logits, images, labels, seed=5).images for _ in range(2)])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_label_that_is_not_predicted_is_at_distance_zero() -> None:
    logits, images, labels, truth = linear_case(5)
    wrong = (labels + 1) % 5
    for result in (minimal_norm(logits, images, wrong), pgd(logits, images, wrong, truth)):
        assert result.success.all()
        assert (result.distance == 0).all()
        assert torch.equal(result.images, images)


def test_a_tie_is_no_success() -> None:
    images = torch.zeros(1, 4, dtype=torch.float64)
    result = pgd(lambda x: x[:, :2] - x[:, :2], images, torch.tensor([1]), 1.0)
    assert not result.success.any()


def test_a_gradient_that_vanishes_is_replaced_by_a_random_direction() -> None:
    # At the centre of the spheres torch's gradient of the norm is 0.
    logits, images, _, _ = sphere_case(0)
    centre = torch.full_like(images[:1], 0.5)
    result = minimal_norm(logits, centre, torch.tensor([0]))
    assert result.distance.item() == pytest.approx(1.0, rel=1e-2)
    assert result.distance.item() >= 1 - 1e-12
    assert pgd(logits, centre, torch.tensor([0]), 1.05).success.all()


def test_a_masked_gradient_is_overcome_by_the_other_images_of_the_batch() -> None:
    """The gradient is 0 everywhere, and random directions in 400 dimensions do not find the other half."""
    direction = torch.zeros(400, dtype=torch.float64)
    direction[0] = 1.0
    images = torch.zeros(3, 400, dtype=torch.float64)
    images[1, 0], images[2, 0] = 800.0, 900.0

    def logits(x: Tensor) -> Tensor:
        side = ((x @ direction) > 500).double() * 2 - 1 + 0 * x.sum(1)
        return torch.stack([-side, side], 1)

    result = minimal_norm(logits, images, torch.tensor([0, 1, 1]), steps=3)
    assert result.success.all()
    assert result.distance.tolist() == pytest.approx([500.0, 300.0, 400.0], rel=1e-6)


def test_progress_counts_the_steps() -> None:
    logits, images, labels, _ = linear_case(0)
    for steps in (1, 2, 7):
        calls: list[int] = []
        minimal_norm(logits, images, labels, steps=steps, progress=calls.append)
        assert sum(calls) == steps


def test_an_empty_batch_has_an_empty_result() -> None:
    logits, images, labels, _ = linear_case(0)
    for result in (pgd(logits, images[:0], labels[:0], 1.0), minimal_norm(logits, images[:0], labels[:0])):
        assert result.success.shape == result.distance.shape == (0,)
        assert result.distance.dtype == torch.float64


def test_distances_are_rounded_up() -> None:
    noise = torch.Generator().manual_seed(0)
    others = torch.randn(50, 300, generator=noise, dtype=torch.float64)
    images = torch.zeros_like(others)
    measured = distances(images, others, 2.0)
    for row, value in zip(others.tolist(), measured.tolist(), strict=True):
        exact = sum(Fraction(v) ** 2 for v in row)
        assert Fraction(value) ** 2 >= exact
        assert Fraction(value) ** 2 <= exact * (1 + Fraction(1, 10**12))


def test_a_difference_whose_square_underflows_is_no_distance_of_zero() -> None:
    images = torch.zeros(2, 3, dtype=torch.float64)
    others = images.clone()
    others[0, 1] = 1e-200
    measured = distances(images, others, 2.0)
    assert measured[0] >= 1e-200
    assert measured[1] == 0


def test_the_rival_margin_against_its_definition() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, -1.0]])
    assert rival_margin(values, torch.tensor([2, 0])).tolist() == [1.0, -5.0]


# ---- violations


def certificate_of(labels: Tensor, radius: Tensor, norm: float = 2.0) -> Certificate:
    return Certificate(
        label=labels,
        radius=radius,
        norm=norm,
        kind="deterministic",
        confidence=1.0,
        semantics="real",
        slack=torch.zeros_like(radius),
        margin=radius,
        lipschitz=LipschitzBound(value=1.0, norm=norm, proof="exact"),
        model_sha256="0" * 64,
    )


@pytest.mark.parametrize("attack", ["minimal_norm", "pgd"])
def test_an_over_claimed_radius_is_reported_and_a_true_one_is_not(attack: str) -> None:
    logits, images, labels, truth = linear_case(6)
    claimed = truth.clone()
    planted = torch.tensor([2, 7])
    claimed[planted] *= 1.1

    def found(certificate: Certificate) -> Tensor:
        if attack == "minimal_norm":
            return violations(certificate, minimal_norm(logits, images, labels))
        return violations(certificate, pgd(logits, images, labels, certificate.radius))

    assert torch.equal(found(certificate_of(labels, claimed)), planted)
    assert found(certificate_of(labels, truth * (1 - 1e-9))).numel() == 0


def test_an_over_claimed_linf_radius_is_reported() -> None:
    logits, images, labels, truth = linear_case(7, norm=math.inf)
    certificate = certificate_of(labels, 1.1 * truth, norm=math.inf)
    result = pgd(logits, images, labels, certificate.radius, norm=math.inf)
    assert torch.equal(violations(certificate, result), torch.arange(len(images)))


def test_a_distance_equal_to_the_radius_is_a_violation() -> None:
    labels = torch.tensor([0, 0])
    result = AttackResult(
        success=torch.tensor([True, True]),
        distance=torch.tensor([0.5, 0.5], dtype=torch.float64),
        images=torch.zeros(2, 1),
        label=labels,
        norm=2.0,
    )
    radius = torch.tensor([0.5, math.nextafter(0.5, 0)], dtype=torch.float64)
    assert violations(certificate_of(labels, radius), result).tolist() == [0]


def test_violations_refuses_what_does_not_belong_together() -> None:
    logits, images, labels, truth = linear_case(0)
    result = pgd(logits, images, labels, truth)
    with pytest.raises(
        UnsoundError, match="an attack in l2 says nothing about a radius in linf; attack with norm=inf"
    ):
        violations(certificate_of(labels, truth, norm=math.inf), result)
    with pytest.raises(DataError, match=r"was not on the certified labels; attack certificate\.label"):
        violations(certificate_of((labels + 1) % 5, truth), result)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, dtype=torch.uint8)}, DataError, "needs float32 or float64 images"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, DataError, r"labels must be int64 of shape \(2,\)"),
        ({"labels": torch.zeros(2)}, DataError, r"labels must be int64 of shape \(2,\), got torch.float32"),
        ({"logits": lambda x: x.sum(1)}, DataError, r"needs logits \(n, K\) of K >= 2 classes, got \(2,\)"),
        ({"steps": 0}, ConfigError, "steps must be at least 1, got 0"),
        ({"restarts": 0}, ConfigError, "restarts must be at least 1, got 0"),
        ({"radius": -1.0}, DataError, "a radius must be finite and at least 0"),
        ({"radius": math.nan}, DataError, "a radius must be finite and at least 0"),
        ({"radius": torch.ones(3)}, DataError, "one number or one for each of 2 images"),
        ({"norm": 1.0}, UnsoundError, "the norm must be 2.0 or inf, got 1.0"),
        ({"logits": lambda x: x.detach()}, ConfigError, "the network has no gradient in the image"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    given = {"logits": lambda x: x, "images": torch.rand(2, 3), "labels": torch.tensor([0, 1]), "radius": 0.1}
    given |= change
    options = {key: value for key, value in given.items() if key in ("steps", "restarts", "norm")}
    with pytest.raises(error, match=message) as caught:
        pgd(given["logits"], given["images"], given["labels"], given["radius"], **options)
    assert "\n" not in str(caught.value)


def test_minimal_norm_refuses_the_same() -> None:
    with pytest.raises(DataError, match="labels must be int64"):
        minimal_norm(lambda x: x, torch.rand(2, 3), torch.zeros(2))
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        minimal_norm(lambda x: x, torch.rand(2, 3), torch.zeros(2, dtype=torch.int64), steps=0)
    with pytest.raises(UnsoundError, match=r"the norm must be 2\.0 or inf"):
        minimal_norm(lambda x: x, torch.rand(2, 3), torch.zeros(2, dtype=torch.int64), norm=1.0)
