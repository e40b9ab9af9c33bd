import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lipnext.auditing.exact import exact_within
from lipnext.auditing.rounding_search import Flip, images_near_boundary, rounding_search
from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.errors import ConfigError, DataError
from lipnext.core.rounding import fraction_down, gamma

PIXELS = 36


def certificate_of(label: Tensor, radius: Tensor, norm: float = 2.0) -> Certificate:
    return Certificate(
        label=label,
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


class Linear:
    """Two rows of float32 numbers; everything about it is known in exact arithmetic."""

    def __init__(self, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(2, PIXELS, generator=noise, dtype=torch.float32)
        self.rows = [[Fraction(v) for v in row] for row in self.weight.double().tolist()]
        self.images = torch.rand(40, 1, 6, 6, generator=noise, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """Pixel by pixel: a matrix product may sum in another order for another size of the batch."""
        pixels, weight = x.flatten(1), self.weight.to(x.dtype)
        total = torch.zeros(len(x), 2, dtype=x.dtype)
        for k in range(PIXELS):
            total = total + pixels[:, k : k + 1] * weight[:, k]
        return total

    def beyond(self, images: Tensor, certificate: Certificate) -> Tensor:
        """Points towards which the boundary is nearest."""
        towards_one = (self.weight[1] - self.weight[0]).double().reshape(1, 1, 6, 6)
        if certificate.norm == math.inf:
            towards_one = towards_one.sign()
        sign = (1 - 2 * certificate.label).reshape(-1, 1, 1, 1)
        return (images.double() + sign * towards_one).to(images.dtype)

    def search(self, images: Tensor, certificate: Certificate) -> list[Flip]:
        return rounding_search(self, images, certificate, boundary=self.beyond(images, certificate))

    def exact_margin(self, image: Tensor) -> Fraction:
        pixels = [Fraction(v) for v in image.double().flatten().tolist()]
        return sum((a - b) * p for a, b, p in zip(*self.rows, pixels, strict=True))

    def certify(self, images: Tensor, unit: float = 0.0, norm: float = 2.0) -> Certificate:
        """The exact distance, rounded down; with `unit` less the rounding that an execution can add in the whole ball."""
        difference = [a - b for a, b in zip(*self.rows, strict=True)]
        size = float(sum(abs(a) + abs(b) for a, b in zip(*self.rows, strict=True)))
        labels, radii = [], []
        for image in images:
            margin = self.exact_margin(image)
            # Images in [0, 1] and a radius below 1 keep every pixel below 2 in size.
            margin_left = abs(margin) - Fraction(2 * size * gamma(PIXELS + 1, unit) if unit else 0)
            dual = sum(map(abs, difference)) if norm == math.inf else sum(d * d for d in difference)
            if norm == math.inf:
                radius = fraction_down(margin_left / dual)
            else:
                radius = math.sqrt(fraction_down(margin_left**2 / dual)) if margin_left > 0 else 0.0
                radius = math.nextafter(radius, 0)
            labels.append(0 if margin > 0 else 1)
            radii.append(max(0.0, min(radius, 1.0)))
        return certificate_of(torch.tensor(labels), torch.tensor(radii, dtype=torch.float64), norm)


def assert_true_flips(
    flips: list[Flip], executed: Callable[[Tensor], Tensor], images: Tensor, certificate: Certificate
) -> None:
    """By other means than the search: Fractions for the norm, one image alone for the label."""
    for flip in flips:
        image = images[flip.index]
        assert flip.image.dtype == images.dtype
        pairs = zip(flip.image.double().flatten().tolist(), image.double().flatten().tolist(), strict=True)
        changes = [Fraction(a) - Fraction(b) for a, b in pairs]
        radius = Fraction(float(certificate.radius[flip.index]))
        if certificate.norm == math.inf:
            assert max(map(abs, changes)) <= radius
        else:
            assert sum(c * c for c in changes) <= radius**2
        assert flip.norm <= math.nextafter(math.nextafter(float(radius), math.inf), math.inf)
        assert exact_within(image, flip.image, flip.norm, certificate.norm)
        assert flip.label == int(executed(flip.image[None]).argmax())
        assert flip.label != int(certificate.label[flip.index])


# In linf the nearest point is a corner, and rounding into the cube loses up to a unit in every pixel: flips are rarer.
@pytest.mark.parametrize(("norm", "at_least"), [(2.0, 20), (math.inf, 2)])
def test_a_real_certificate_is_broken_by_float32_and_the_flips_are_true(norm: float, at_least: int) -> None:
    net = Linear(0)
    images = net.images.float()
    certificate = net.certify(images, norm=norm)
    flips = net.search(images, certificate)
    assert len(flips) >= at_least
    assert len({flip.index for flip in flips}) == len(flips)
    assert_true_flips(flips, net, images, certificate)
    # None of them contradicts the certificate: the real margin keeps its sign.
    for flip in flips:
        assert (net.exact_margin(flip.image) > 0) == (int(certificate.label[flip.index]) == 0)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2.0**-24), (torch.float64, 2.0**-53)])
def test_a_certificate_that_pays_for_rounding_is_never_broken(dtype: torch.dtype, unit: float) -> None:
    net = Linear(1)
    images = net.images.to(dtype)
    certificate = net.certify(images, unit=unit)
    assert (certificate.radius > 0).sum() > 35
    assert net.search(images, certificate) == []


def test_a_radius_that_is_too_long_by_a_millionth_is_broken_in_float64() -> None:
    net = Linear(2)
    honest = net.certify(net.images, unit=2.0**-53)
    claimed = certificate_of(honest.label, honest.radius * (1 + 1e-6))
    flips = net.search(net.images, claimed)
    # Radii were cut at 1.
    assert len(flips) == int((honest.radius < 1).sum())
    assert_true_flips(flips, net, net.images, claimed)


def near(net: Linear, dtype: torch.dtype, offset: float) -> Tensor:
    labels = net(net.images).argmax(1)
    first, second = net.images[labels == 0], net.images[labels == 1]
    pairs = min(len(first), len(second))
    return images_near_boundary(net, first[:pairs], second[:pairs], dtype=dtype, offset=offset)


@pytest.mark.parametrize("offset", [0.0, 1e-6, 1e-5])
def test_images_at_the_boundary_are_where_float32_breaks_first(offset: float) -> None:
    net = Linear(3)
    images = near(net, torch.float32, offset)
    certificate = net.certify(images)
    # The end of the segment lies within the rounding of the cast, sqrt(36) 2^-24, or the offset of the boundary.
    assert (certificate.radius <= offset + 6 * 2.0**-24).all()
    flips = net.search(images, certificate)
    assert flips
    assert_true_flips(flips, net, images, certificate)
    assert net.search(images, net.certify(images, unit=2.0**-24)) == []


def test_images_near_the_boundary_in_float64() -> None:
    net = Linear(4)
    images = near(net, torch.float64, 0.0)
    assert images.dtype == torch.float64
    assert (net.certify(images).radius < 1e-15).all()
    moved = near(net, torch.float64, 1e-3)
    assert (net(moved).argmax(1) == 0).all()
    assert (net.certify(moved).radius > 1e-6).all()


def test_the_given_boundary_points_are_used() -> None:
    """A single bad direction that neither random directions nor a gradient would find."""
    image = torch.full((1, 400), 0.5, dtype=torch.float64)
    needle = torch.zeros(400, dtype=torch.float64)
    needle[7] = 1.0

    def executed(x: Tensor) -> Tensor:
        bad = (x - 0.5) @ needle > 0.0999999
        return torch.stack([(~bad).double(), bad.double()], 1)

    certificate = certificate_of(torch.tensor([0]), torch.tensor([0.1], dtype=torch.float64))
    (flip,) = rounding_search(executed, image, certificate, boundary=image + 3 * needle)
    assert_true_flips([flip], executed, image, certificate)
    assert rounding_search(executed, image, certificate, boundary=image - needle) == []


def test_a_radius_of_zero_claims_nothing() -> None:
    net = Linear(0)
    wrong = 1 - net(net.images).argmax(1)
    certificate = certificate_of(wrong, torch.zeros(40, dtype=torch.float64))
    assert rounding_search(net, net.images, certificate, boundary=net.images) == []


def test_it_is_reproducible_and_tells_its_progress() -> None:
    net = Linear(0)
    images = net.images[:20].float()
    certificate = net.certify(images)
    before = torch.get_rng_state()
    calls: list[int] = []
    runs = [rounding_search(net, images, certificate, rounds=3, progress=calls.append) for _ in range(2)]
    assert runs[0]
    assert [(f.index, f.norm) for f in runs[0]] == [(f.index, f.norm) for f in runs[1]]
    assert sum(calls) == 6
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_input_is_refused_in_one_line() -> None:
    net = Linear(0)
    certificate = net.certify(net.images)
    with pytest.raises(DataError, match="needs the 40 certified images"):
        rounding_search(net, net.images[:3], certificate)
    with pytest.raises(DataError, match="boundary must have the images' shape"):
        rounding_search(net, net.images, certificate, boundary=net.images[:3])
    with pytest.raises(ConfigError, match="directions must be at least 1, got 0"):
        rounding_search(net, net.images, certificate, directions=0)
    with pytest.raises(ConfigError, match="rounds must be at least 1, got 0"):
        rounding_search(net, net.images, certificate, rounds=0)
    with pytest.raises(DataError, match="must have different labels"):
        images_near_boundary(net, net.images, net.images, dtype=torch.float32)
    with pytest.raises(DataError, match="must come in pairs"):
        images_near_boundary(net, net.images, net.images[:2], dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"float32 or float64, got torch\.float16"):
        images_near_boundary(net, net.images, net.images, dtype=torch.float16)
