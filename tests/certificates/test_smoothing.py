"""Certificates by votes: exact classifiers, coverage, the combinator, and what every radius has to carry."""

import copy
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers import Flatten
from scipy import special
from torch import Tensor

from lipnext.certificates import smoothing
from lipnext.certificates.margin import MarginCertifier
from lipnext.certificates.smoothing import SmoothingCertifier, accuracy_down, combine
from lipnext.core.certificate import ABSTAIN, Certificate
from lipnext.core.errors import ConfigError, DataError, UnsoundError
from lipnext.core.module import LipschitzModule
from lipnext.core.smoothed import SmoothedNetwork
from lipnext.nn.activation import ReLU
from lipnext.nn.clipped import ClippedReLU
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.head import PlainHead
from lipnext.nn.right_half import RightHalf
from lipnext.systems import splitz

SHAPE = (1, 1, 2)
NORMAL, BIAS, POINT = (3.0, 4.0), -1.0, torch.tensor([[[[1.0, 0.0]]]])
DISTANCE = 0.4
"""Of the point (1, 0) from the line 3 x + 4 y = 1."""


def linear(
    *,
    sigma: float = 0.5,
    samples: int = 500,
    alpha: float = 0.001,
    seed: int = 0,
    left: Tensor | None = None,
    normal: tuple[float, ...] = NORMAL,
    selection: int = 20,
) -> SmoothedNetwork:
    """`sign(w z + b)` behind noise, on the image itself or on `left` times it."""
    body: list[LipschitzModule] = [Flatten()]
    if left is not None:
        body.append(Dense(2, len(left), bias=False))
        body[1].weight.data = left.clone()
    right = RightHalf((len(normal), 1, 1), 2)
    right.weight.data = torch.tensor([[-v for v in normal], list(normal)])
    right.bias.data = torch.tensor([-BIAS, BIAS])
    return SmoothedNetwork(
        body, right, SHAPE, sigma=sigma, samples=samples, selection=selection, alpha=alpha, seed=seed
    ).eval()


def certify(network: SmoothedNetwork, images: Tensor = POINT) -> Certificate:
    return SmoothingCertifier(network)(images)


def over_seeds(network: SmoothedNetwork, image: Tensor, count: int) -> Tensor:
    """The radii that `count` seeds give one image."""
    certifier, found = SmoothingCertifier(network), []
    for seed in range(count):
        certifier.network.seed = seed
        found.append(certifier(image).radius)
    return torch.cat(found)


# ---- a linear classifier, whose smoothed radius is its distance


def test_a_linear_classifier_has_its_distance_for_a_radius() -> None:
    network = linear(samples=100_000, selection=100)
    certificate, certifier = certify(network), SmoothingCertifier(network)
    point, _ = certifier.grid_point(POINT.flatten(1)[0])
    votes = certifier.votes(point, torch.Generator().manual_seed(1), 100_000)
    share = special.ndtr(DISTANCE / 0.5)
    assert votes[1].item() / 100_000 == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 1e5))
    assert certificate.label.item() == 1
    assert 0.97 * DISTANCE < certificate.radius.item() <= DISTANCE


def coverage() -> float:
    """How often the radius exceeds the distance, where it may with a probability of 0.1."""
    found = over_seeds(linear(samples=60, alpha=0.1, selection=5), POINT, 200)
    return (found > DISTANCE).double().mean().item()


def test_radii_are_wrong_as_often_as_they_may_be() -> None:
    # 0.1 less the steps of 60 votes; three deviations of 200 draws are 0.064
    assert 0.02 < coverage() < 0.1 + 0.064


def test_noise_and_radius_with_different_deviations_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = SmoothingCertifier.sigma_radius
    monkeypatch.setattr(SmoothingCertifier, "sigma_radius", lambda self, share: 1.5 * honest(self, share))
    assert coverage() > 0.3


def certified_ties() -> float:
    """How often an image on the line gets a label: no class has more than half of the probability."""
    on_the_line = torch.tensor([[[[1 / 3, 0.0]]]])
    found = over_seeds(linear(samples=64, selection=64, alpha=0.1), on_the_line, 250)
    return (found > 0).double().mean().item()


def test_choosing_and_counting_by_the_same_votes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 0.1 + 3 * math.sqrt(0.1 * 0.9 / 250)
    assert certified_ties() < limit
    fresh = SmoothingCertifier._source
    monkeypatch.setattr(SmoothingCertifier, "_source", lambda self, image, purpose: fresh(self, image, ""))
    # Twice as often, less the steps of 64 votes: either class may lead.
    assert certified_ties() > limit


def test_a_linear_left_half_gives_at_most_the_distance_in_the_image() -> None:
    stretch = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    # The line 3 x + 4 y = 1 in the coordinates (2 x, y / 2).
    network = linear(left=stretch, normal=(1.5, 8.0), samples=20_000)
    certificate = certify(network)
    latent = (1.5 * 2.0 - 1) / math.hypot(1.5, 8.0)
    assert certificate.lipschitz is not None
    assert certificate.lipschitz.value == pytest.approx(2.0, rel=1e-9)
    assert certificate.lipschitz.value >= 2.0
    assert certificate.margin.item() == pytest.approx(latent, rel=0.1)
    assert certificate.radius.item() == pytest.approx(latent / 2, rel=0.1)
    assert certificate.radius.item() <= DISTANCE


def test_scaling_the_latent_and_its_noise_changes_nothing() -> None:
    plain = certify(linear(left=torch.eye(2)))
    scaled = certify(linear(left=4 * torch.eye(2), sigma=2.0, normal=(0.75, 1.0)))
    torch.testing.assert_close(scaled.radius, plain.radius, rtol=1e-9, atol=0)
    assert plain.radius.item() > 0.2


def test_the_deviation_of_images_is_part_of_the_left_half() -> None:
    deviations = torch.tensor([0.2023, 0.1994])
    network = linear(left=torch.diag(1 / deviations), samples=200)
    certificate = certify(network)
    assert certificate.lipschitz is not None
    # 1 / 0.1994, not 1 / 0.2023 = 4.943
    assert certificate.lipschitz.value == pytest.approx(5.0150451354, abs=1e-9)
    room = certificate.margin - certificate.slack
    assert (certificate.radius <= room / 5.0150451354).all()


# ---- the combinator

RIGHT = 0.5724999888


def steps(gamma: Tensor) -> Tensor:
    bound = torch.full_like(gamma, 0.80)
    for level, until in ((0.60, 1.0), (0.45, 0.5), (0.30, 0.2)):
        bound[gamma < until] = level
    return bound


def smooth(gamma: Tensor) -> Tensor:
    return 0.4 + 0.3 * gamma.tanh()


@pytest.mark.parametrize(
    ("right", "bound", "best"),
    [
        (RIGHT, steps, 0.9541666480),
        (RIGHT, smooth, 0.9255467832),
        (1.0, lambda gamma: torch.full_like(gamma, 2.0), 0.5),
        (1.0, lambda gamma: 1 + gamma, 0.6180339887),
        (0.0, lambda gamma: torch.zeros_like(gamma), 0.0),
    ],
)
def test_the_combinator_gives_the_published_radii(
    right: float, bound: Callable[[Tensor], Tensor], best: float
) -> None:
    found = combine(torch.tensor([right]), bound, 10.0)
    assert found.item() == pytest.approx(best, abs=1e-7)
    if right:
        assert found.item() <= right / bound(found).item()  # it is itself a gamma that works


def test_the_radius_is_never_larger_than_the_gamma_of_its_bound() -> None:
    tried = []

    def spying(gamma: Tensor) -> Tensor:
        tried.append(gamma.clone())
        return smooth(gamma)

    right = torch.tensor([0.01, 0.3, 2.0, 50.0])
    found = combine(right, spying, 10.0)
    candidates = torch.stack([torch.minimum(right / smooth(gamma), gamma) for gamma in tried])
    assert (found <= candidates.amax(0)).all()
    assert (found <= 10.0).all()
    # Without gamma the bound of the smallest ball would be used far outside of it.
    assert found[1] < 0.3 / smooth(torch.tensor(1e-6))


def test_for_a_constant_bound_the_search_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.rand(20)
    whole = combine(right, lambda gamma: torch.full_like(gamma, 1.7), 30.0)
    monkeypatch.setattr(smoothing, "BISECTIONS", 1)
    assert torch.equal(whole, combine(right, lambda gamma: torch.full_like(gamma, 1.7), 30.0))
    assert all(
        Fraction(r) * Fraction(1.7) <= Fraction(v)
        for r, v in zip(whole.tolist(), right.tolist(), strict=True)
    )


def saturated() -> tuple[SmoothedNetwork, Tensor]:
    network = splitz.build(
        input_shape=(1, 6, 6), classes=3, left="relu-theta", width=3, hidden="", samples=200, sigma=0.02
    )
    clipped = network.body[1]
    assert isinstance(clipped, ClippedReLU)
    clipped.threshold.data.fill_(0.2)
    g = torch.Generator().manual_seed(0)
    network.body[0].bias.data = torch.tensor([0.9, -0.9, 0.1])
    return network.eval(), torch.rand(6, 1, 6, 6, generator=g)


def test_saturated_units_near_an_image_raise_its_radius_but_no_pair_of_points_beats_the_bound() -> None:
    network, images = saturated()
    certifier = SmoothingCertifier(network)
    bound = certifier.bound(images)
    sizes = torch.tensor([0.02, 0.1, 0.5, 5.0])
    table = torch.stack([bound(size.expand(len(images))) for size in sizes])
    assert (table[0] < 0.95 * certifier.body.value).all()
    assert (table <= certifier.body.value).all()
    assert (table.diff(dim=0) >= -1e-9).all()
    g, centre = torch.Generator().manual_seed(1), certifier.network.features(images).flatten(1)
    for row, size in zip(table, sizes, strict=True):
        for _ in range(50):
            step = torch.randn(images.shape, generator=g)
            step = size * step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            moved = certifier.network.features(images + step).flatten(1) - centre
            assert (moved.norm(dim=1) <= row * size).all()
    certificate = certifier(images)
    constant = (certificate.margin - certificate.slack).clamp_min(0) / certifier.body.value
    assert certificate.per_image
    assert (certificate.radius >= constant * (1 - 1e-9)).all()
    assert (certificate.radius > 1.02 * constant)[constant > 0].any()


# ---- what the latent loses on its way to the grid


def test_the_distance_to_the_grid_is_bounded_in_rationals() -> None:
    certifier = SmoothingCertifier(linear(sigma=0.37))
    latent = torch.randn(2, generator=torch.Generator().manual_seed(0))
    point, distance = certifier.grid_point(latent)
    spacing = Fraction(certifier.spacing)
    apart = sum(
        (m * spacing - Fraction(v)) ** 2 for m, v in zip(point.tolist(), latent.tolist(), strict=True)
    )
    assert apart <= Fraction(distance) ** 2
    assert distance <= certifier.spacing / 2 * math.sqrt(2) + certifier.latent_error + 1e-12


def test_the_distance_to_the_grid_and_the_rounding_of_the_left_half_are_taken_off() -> None:
    network = splitz.build(
        input_shape=(1, 8, 8), classes=3, width=16, patch=2, hidden="8", samples=200
    ).eval()
    certifier = SmoothingCertifier(network)
    certificate = certifier(torch.rand(6, 1, 8, 8))
    assert certifier.latent_error > 0
    assert (certificate.slack > certifier.latent_error + 0.1 * certifier.spacing).all()
    assert certificate.lipschitz is not None
    proved = certificate.radius > 0
    assert proved.any()
    for radius, margin, slack in zip(
        certificate.radius[proved].tolist(),
        certificate.margin[proved].tolist(),
        certificate.slack[proved].tolist(),
        strict=True,
    ):
        assert Fraction(radius) * Fraction(certificate.lipschitz.value) <= Fraction(margin) - Fraction(slack)


# ---- abstaining


def test_a_vote_that_nobody_wins_abstains() -> None:
    certificate = certify(linear(), torch.tensor([[[[1 / 3, 0.0]]], [[[1.0, 0.0]]]]))
    assert certificate.label.tolist() == [ABSTAIN, 1]
    assert certificate.radius[0] == 0
    truth = torch.tensor([1, 1])
    assert certificate.clean_accuracy(truth) == 0.5
    assert certificate.accuracy_at("1/255", truth) == 0.5
    assert certificate.summary(truth, {})["abstained"] == 1


def test_no_label_is_told_where_the_test_of_a_majority_is_open() -> None:
    images = torch.tensor([[[[1 / 3, 0.0]]], [[[1.0, 0.0]]], [[[0.0, 0.0]]]])
    assert SmoothingCertifier(linear(samples=1000)).predict(images).tolist() == [ABSTAIN, 1, 0]


def test_an_evaluation_that_is_not_finite_votes_for_no_class() -> None:
    network = linear()

    class Broken(RightHalf):
        def forward(self, latent: Tensor) -> Tensor:
            logits = super().forward(latent)
            logits[: len(logits) // 2] = math.nan
            return logits

    network.head.__class__ = Broken
    certifier = SmoothingCertifier(network)
    votes = certifier.votes(torch.zeros(2, 1, 1, dtype=torch.int64), torch.Generator(), 100)
    assert votes.sum() == 50
    certificate = certifier(POINT)
    assert (certificate.label.item(), certificate.radius.item()) == (ABSTAIN, 0.0)


def test_no_step_inside_the_radius_changes_what_the_votes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst direction is known: straight to the line, and behind it lies the other class."""
    towards = -torch.tensor(NORMAL).view(1, 1, 1, 2) / 5.0
    certifier = SmoothingCertifier(linear(samples=3000))

    def labels(radius: float) -> list[int]:
        steps = torch.tensor([0.5, 0.9, 0.999]).view(3, 1, 1, 1) * radius * towards
        return certifier.predict(POINT + steps).tolist()

    # The point lies at the border of [0, 1]^2; the statement is about the whole ball.
    monkeypatch.setattr(smoothing, "check_images", lambda images, shape: None)
    radius = certifier(POINT).radius.item()
    assert set(labels(radius)) <= {1, ABSTAIN}
    assert labels(radius)[0] == 1
    # A radius of twice the size would be refuted.
    assert labels(2 * radius)[2] == 0


# ---- votes and batches


def test_an_image_gets_the_same_votes_in_any_batch_and_others_with_another_seed() -> None:
    images = torch.rand(5, 1, 1, 2)
    network = linear(samples=300)
    together = certify(network, images)
    alone = Certificate.cat([certify(network, image[None]) for image in images])
    assert torch.equal(together.radius, alone.radius)
    assert torch.equal(together.label, alone.label)
    assert torch.equal(
        certify(network, images.float().double()).radius, certify(network, images.float()).radius
    )
    assert not torch.equal(certify(linear(samples=300, seed=1), images).radius, together.radius)


def test_the_left_half_is_evaluated_once_for_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    network = linear(left=torch.eye(2))
    certifier = SmoothingCertifier(network)
    seen = []
    plain = Dense.forward
    monkeypatch.setattr(Dense, "forward", lambda self, x: (seen.append(len(x)), plain(self, x))[1])
    certifier(torch.rand(8, 1, 1, 2))
    # once for the latents, once for the boxes of the local bound
    assert sum(seen) <= 16


def test_votes_are_split_into_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    certifier = SmoothingCertifier(linear())
    point = torch.zeros(2, 1, 1, dtype=torch.int64)
    monkeypatch.setattr(smoothing, "NUMBERS", 14)
    votes = certifier.votes(point, torch.Generator().manual_seed(0), 100)
    assert votes.sum() == 100


# ---- what is said, and what is refused


def test_a_certificate_carries_votes_confidence_and_seed() -> None:
    network = linear(alpha=0.001, samples=500, seed=7)
    certificate = certify(network)
    assert (certificate.kind, certificate.confidence, certificate.semantics) == (
        "probabilistic",
        0.999,
        "real",
    )
    assert Fraction(certificate.confidence) <= 1 - Fraction(0.001)
    stated = SmoothingCertifier(network).describe()
    assert json.loads(json.dumps(stated, allow_nan=False)) == stated
    told = stated["smoothing"]
    assert {k: told[k] for k in ("sigma", "samples", "selection", "alpha", "seed")} == {
        "sigma": 0.5, "samples": 500, "selection": 20, "alpha": 0.001, "seed": 7,
    }  # fmt: skip
    assert told["total_variation"] == 2 * 2.0**-48
    assert stated["confidence"] == 0.999
    assert any("Mersenne Twister" in text for text in stated["assumed"])
    assert stated["layers"][0]["proof"] == "isometry"


def test_a_dataset_is_confident_of_fewer_right_images() -> None:
    n = 500
    certificate = Certificate(
        label=torch.zeros(n, dtype=torch.int64),
        radius=torch.full((n,), 0.6),
        norm=2.0,
        kind="probabilistic",
        confidence=0.999,
        semantics="real",
        slack=torch.zeros(n),
        margin=torch.ones(n),
        lipschitz=None,
        model_sha256="0" * 64,
    )
    truth = torch.zeros(n, dtype=torch.int64)
    truth[300:] = 1
    assert accuracy_down(certificate, "0.5", truth, 0.001) == (300 - 4) / 500
    assert accuracy_down(certificate, "0.7", truth, 0.001) == 0.0
    # no less than the closed form says for few images: 0.59067978
    assert accuracy_down(certificate, "0.5", truth, 0.001) > 0.59067978


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"samples": 10},
            r"10 votes decide nothing with alpha 0\.001: .* p-value is 0\.00195 .* at least 11 samples",
        ),
        ({"alpha": 1.0}, "alpha: must lie between 0 and 1"),
        ({"alpha": math.nan}, "alpha: must lie between 0 and 1"),
        ({"sigma": 0.0}, r"sigma: must be above 0, got 0\.0"),
        ({"sigma": math.inf}, "sigma: must be above 0"),
        ({"selection": 0}, "at least 1, got 500 and 0"),
    ],
)
def test_numbers_with_which_nothing_can_be_certified_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        linear(**changes)
    assert "\n" not in str(refusal.value)


def test_eleven_votes_are_enough_for_one_in_a_thousand() -> None:
    far = torch.tensor([[[[1.0, 1.0]]]])
    assert certify(linear(samples=11, sigma=0.05), far).radius.item() > 0


def test_what_is_no_smoothed_network_or_cannot_be_proved_is_refused() -> None:
    network = linear()
    with pytest.raises(UnsoundError, match="needs a SmoothedNetwork, got a Linear"):
        SmoothingCertifier(torch.nn.Linear(2, 2))
    for semantics, arithmetic in (("deployed", "float64"), ("deployed", "float32"), ("real", "float32")):
        with pytest.raises(UnsoundError, match="cannot be certified as a deployed program"):
            SmoothingCertifier(network, semantics, arithmetic)  # type: ignore[arg-type]
    with pytest.raises(UnsoundError, match="needs a LinearHead, got a RightHalf"):
        MarginCertifier(network)
    unknown = copy.deepcopy(network)
    unknown.body.append(torch.nn.Tanh())
    with pytest.raises(UnsoundError, match=r"body\.1 is a Tanh, which has no proved Lipschitz bound"):
        SmoothingCertifier(unknown)
    with pytest.raises(DataError, match="must lie in"):
        certify(network, POINT + 1)
    huge = linear(left=1e300 * torch.eye(2))
    with pytest.raises(UnsoundError):
        certify(huge)


def test_the_constant_is_proved_where_five_power_iterations_fall_short() -> None:
    """The published constant: power iteration on the first convolution, from a random start."""
    network = splitz.build(
        input_shape=(3, 8, 8), classes=3, left="relu-theta", width=16, hidden="", samples=20, alpha=0.1
    )
    convolution = network.body[0]
    assert isinstance(convolution, Convolution)
    columns = [
        convolution.product(unit.view(-1, 3, 8, 8), convolution.weight.double())
        for unit in torch.eye(192).split(64)
    ]
    norm = torch.linalg.matrix_norm(torch.cat(columns).flatten(1).detach(), 2).item()
    u = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        u = convolution.adjoint(convolution.product(u, convolution.weight), convolution.weight)
        u = u / u.norm()
    estimate = convolution.product(u, convolution.weight).norm().item()
    proved = SmoothingCertifier(network.eval()).body.value
    assert estimate < 0.99 * norm
    assert norm <= proved < 1.05 * norm


def test_a_head_with_constants_is_certified_by_votes_as_well() -> None:
    network = SmoothedNetwork(
        [Flatten(), Dense(2, 2), ReLU()],
        PlainHead(2, 2),
        SHAPE,
        sigma=0.1,
        samples=50,
        selection=5,
        alpha=0.01,
        seed=0,
    ).eval()
    assert certify(network).kind == "probabilistic"
