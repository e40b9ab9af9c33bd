import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipnext.certificates.nearest_neighbour import NearestNeighbour
from lipnext.core.errors import DataError


def bytes_of(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 2, 3), generator=generator, dtype=torch.uint8)


@given(seed=st.integers(0, 10_000))
def test_radii_are_half_the_gap_and_never_above_it(seed: int) -> None:
    train, labels, images = bytes_of(12, seed), torch.arange(12) % 3, bytes_of(4, seed + 1)
    certificate = NearestNeighbour(train, labels, 3).certify(images)
    for k, image in enumerate(images):
        squares = [
            min(int((image.long() - x.long()).square().sum()) for x in train[labels == c]) for c in range(3)
        ]
        best, second = sorted(squares)[:2]
        assert squares[certificate.label[k]] == best
        # The exact half gap by integer roots of numbers scaled by 10^40: right to 1e-20.
        gap = Fraction(math.isqrt(second * 10**40) - math.isqrt(best * 10**40), 2 * 255 * 10**20)
        assert Fraction(certificate.radius[k].item()) <= gap + Fraction(1, 10**19)
        assert certificate.radius[k].item() >= float(gap) - 1e-12


def test_points_at_the_edge_of_the_radius_keep_their_label() -> None:
    train, labels = bytes_of(30, 0), torch.arange(30) % 3
    images = bytes_of(20, 1)
    certificate = NearestNeighbour(train, labels, 3).certify(images)
    points = train.flatten(1).double() / 255
    for image, label, radius in zip(images, certificate.label, certificate.radius, strict=True):
        x = image.flatten().double() / 255
        for target in points[labels != label]:  # the worst direction is towards an image of another class
            moved = x + radius * (target - x) / (target - x).norm()
            assert labels[(points - moved).norm(dim=1).argmin()] == label


def test_a_tie_has_radius_zero_and_an_empty_batch_an_empty_certificate() -> None:
    train = torch.tensor([0, 200], dtype=torch.uint8).reshape(2, 1, 1, 1)
    model = NearestNeighbour(train, torch.tensor([0, 1]), 2)
    assert model.certify(torch.tensor([[[[100]]]], dtype=torch.uint8)).radius.tolist() == [0.0]
    assert len(model.certify(train[:0])) == 0


def test_a_class_without_an_image_is_refused() -> None:
    with pytest.raises(DataError, match="needs an image of each class"):
        NearestNeighbour(bytes_of(2, 0), torch.tensor([0, 0]), 2)


def test_anything_but_bytes_of_one_shape_is_refused() -> None:
    train, labels = bytes_of(4, 0), torch.arange(4) % 2
    with pytest.raises(DataError, match=r"takes images of bytes, uint8, got torch\.float32"):
        NearestNeighbour(train.float(), labels, 2)
    model = NearestNeighbour(train, labels, 2)
    for wrong in (train.float(), train.transpose(2, 3)):
        with pytest.raises(DataError, match=r"images must be uint8 of shape \(n, 1, 2, 3\), got torch\."):
            model.certify(wrong)
