import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from lipnext.core.seed import generator
from lipnext.data.randaugment import (
    AXES,
    OPERATIONS,
    autocontrast,
    brightness,
    colour,
    contrast,
    equalize,
    geometric_matrices,
    posterize,
    randaugment,
    sharpness,
    solarize,
    warp,
)

RNG = np.random.default_rng(0)
STEP = 1 / 255


def byte_images(count: int = 6, channels: int = 3, height: int = 24, width: int = 20) -> Tensor:
    """Smooth and noisy, dark and bright, one constant: float64 multiples of 1/255."""
    noise = RNG.integers(0, 256, (count, channels, height, width))
    ramp = np.linspace(0, 255, width)[None, None, None] * np.ones_like(noise)
    mix = RNG.random((count, 1, 1, 1))
    offset, scale = 80 * RNG.random((count, 1, 1, 1)), RNG.random((count, 1, 1, 1))
    images = np.clip(offset + scale * (mix * noise + (1 - mix) * ramp), 0, 255).astype(np.uint8)
    images[-1] = 77
    return torch.from_numpy(images).double() / 255


def to_pillow(image: Tensor) -> Image.Image:
    pixels = (image * 255).round().to(torch.uint8)
    return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())


def from_pillow(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(picture)).double() / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


# Two byte steps: Pillow truncates the result (less than one) and rounds the grey pixel, the mean or the
# smoothed pixel (at most one in all), which enters with the weight |1 - factor| <= 0.9.
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.1, 0.73, 1.0, 1.27, 1.9])
@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        (brightness, ImageEnhance.Brightness),
        (colour, ImageEnhance.Color),
        (contrast, ImageEnhance.Contrast),
        (sharpness, ImageEnhance.Sharpness),
    ],
)
def test_blends_against_pillow(ours: object, pillow: object, factor: float, channels: int) -> None:
    images = byte_images(channels=channels)
    after = ours(images, torch.full((len(images), 1, 1, 1), factor))
    for before, result in zip(images, after, strict=True):
        expected = from_pillow(pillow(to_pillow(before)).enhance(factor))
        assert (result - expected).abs().max() <= 2 * STEP


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_posterize_against_pillow(bits: int, channels: int) -> None:
    images = byte_images(channels=channels)
    for before, after in zip(images, posterize(images, bits), strict=True):
        torch.testing.assert_close(after, from_pillow(ImageOps.posterize(to_pillow(before), bits)))


@pytest.mark.parametrize("threshold", [0.0, 77.0, 178.5, 255.0])
def test_solarize_against_pillow(threshold: float) -> None:
    images = byte_images()
    for before, after in zip(images, solarize(images, threshold), strict=True):
        torch.testing.assert_close(
            after, from_pillow(ImageOps.solarize(to_pillow(before), math.ceil(threshold)))
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_autocontrast_against_pillow(channels: int) -> None:
    images = byte_images(channels=channels)
    for before, after in zip(images, autocontrast(images), strict=True):
        assert (after - from_pillow(ImageOps.autocontrast(to_pillow(before)))).abs().max() <= STEP * (
            1 + 1e-9
        )
    assert autocontrast(images)[:-1].amin() == 0
    assert autocontrast(images)[:-1].amax() == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (24, 20), (32, 32), (61, 40)])
def test_equalize_against_pillow(channels: int, size: tuple[int, int]) -> None:
    images = byte_images(channels=channels, height=size[0], width=size[1])
    for before, after in zip(images, equalize(images), strict=True):
        torch.testing.assert_close(after, from_pillow(ImageOps.equalize(to_pillow(before))))


def slow_warp(image: Tensor, matrix: list[list[float]]) -> Tensor:
    result = torch.zeros_like(image)
    height, width = image.shape[1:]
    (a, b, c), (d, e, f) = matrix
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5, row + 0.5
            left, top = math.floor(a * x + b * y + c), math.floor(d * x + e * y + f)
            if 0 <= left < width and 0 <= top < height:
                result[:, row, column] = image[:, top, left]
    return result


@given(st.lists(st.floats(-1.5, 1.5), min_size=4, max_size=4), st.floats(-9, 9), st.floats(-9, 9))
def test_warp_against_a_loop(linear: list[float], right: float, down: float) -> None:
    a, b, d, e = (round(value, 3) for value in linear)
    matrix = [
        [a, b, round(right, 3) + 1e-5],
        [d, e, round(down, 3) + 1e-5],
    ]  # never on an edge between pixels
    image = torch.rand(2, 5, 6)
    after = warp(image[None], torch.tensor(matrix)[None])[0]
    assert torch.equal(after, slow_warp(image, matrix))


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.0, 0.3, 1.0])
def test_geometry_against_pillow(name: str, strength: float) -> None:
    images = byte_images(count=2, height=24, width=20)
    matrices = geometric_matrices(name, torch.tensor([strength, strength]), 24, 20)
    for before, after in zip(images, warp(images, matrices), strict=True):
        picture = to_pillow(before)
        if name == "rotate":
            expected = picture.rotate(30 * strength)
        else:
            a, b = {"shear-x": (0.3 * strength, 0), "shear-y": (0, 0.3 * strength)}.get(name, (0, 0))
            c = int(150 / 331 * 20 * strength) if name == "translate-x" else 0
            f = int(150 / 331 * 24 * strength) if name == "translate-y" else 0
            expected = picture.transform(picture.size, Image.Transform.AFFINE, (1, a, c, b, 1, f))
        # Pillow steps through a row in fixed point: a pixel at the edge of two may fall to the other.
        moved = (after != from_pillow(expected)).any(0).sum()
        assert moved <= 0.01 * 24 * 20
        if strength == 0:
            assert torch.equal(after, before)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_operation_keeps_shape_type_range_and_its_input(
    name: str, magnitude: int, channels: int
) -> None:
    for side in (1, 2, 8):
        images = torch.rand(5, channels, side, side, dtype=torch.float32)
        before = images.clone()
        signs = torch.tensor([1, -1, 1, -1, 1.0], dtype=torch.float32)[:, None, None, None]
        after = OPERATIONS[name](images, magnitude, signs)
        assert torch.equal(images, before)
        assert after.shape == images.shape
        assert after.dtype == torch.float32
        assert after.min() >= 0
        assert after.max() <= 1


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_image_is_worked_on_alone(name: str) -> None:
    images = byte_images()
    signs = torch.tensor([1, -1, 1, -1, 1, -1.0])[:, None, None, None]
    together = OPERATIONS[name](images, 9, signs)
    alone = [OPERATIONS[name](images[i : i + 1], 9, signs[i : i + 1]) for i in range(len(images))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [*AXES, "brightness", "colour", "contrast", "sharpness", "posterize"])
def test_magnitude_zero_is_the_identity(name: str) -> None:
    images = byte_images()
    torch.testing.assert_close(OPERATIONS[name](images, 0, torch.ones(6, 1, 1, 1)), images)


@pytest.mark.parametrize("name", [*AXES, "brightness", "colour", "contrast", "sharpness"])
def test_the_sign_matters(name: str) -> None:
    images = byte_images()[:1]
    plus, minus = (OPERATIONS[name](images, 20, torch.full((1, 1, 1, 1), sign)) for sign in (1.0, -1.0))
    assert not torch.equal(plus, minus)
    assert not torch.equal(plus, images)


def test_magnitudes_are_the_standard_ones() -> None:
    assert OPERATIONS["brightness"](torch.full((1, 1, 1, 1), 0.5), 30, -torch.ones(1, 1, 1, 1)).item() == (
        pytest.approx(0.05)
    )
    ramp = (torch.arange(256.0) / 255).reshape(1, 1, 16, 16)
    for magnitude, bits in ((0, 8), (9, 7), (30, 4)):  # torchvision: 8 - round(magnitude / 7.5)
        after = OPERATIONS["posterize"](ramp, magnitude, torch.ones(1, 1, 1, 1))
        assert len(after.unique()) == 2**bits
    after = OPERATIONS["solarize"](ramp, 9, torch.ones(1, 1, 1, 1))
    assert int((after == ramp).sum()) == 179  # the bytes below 178.5


def test_probability_is_the_share_of_images_touched() -> None:
    images = torch.rand(1, 3, 8, 8).expand(4000, -1, -1, -1)
    touched = (randaugment(images, generator(0), probability=0.5) != images).flatten(1).any(1).double().mean()
    always = (randaugment(images, generator(0), probability=1.0) != images).flatten(1).any(1).double().mean()
    assert abs(touched / always - 0.5) < 0.05  # five standard deviations
    assert torch.equal(randaugment(images, generator(0), probability=0.0), images)


def test_every_operation_is_drawn_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = dict.fromkeys(OPERATIONS, 0)

    def count(name: str) -> object:
        def operation(images: Tensor, magnitude: int, signs: Tensor) -> Tensor:
            assert magnitude == 17
            drawn[name] += len(images)
            return images

        return operation

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, count(name))
    randaugment(torch.zeros(14_000, 1, 1, 1), generator(0), ops=3, magnitude=17)
    assert sum(drawn.values()) == 42_000
    assert all(abs(number - 3000) < 265 for number in drawn.values())  # five standard deviations


def test_more_operations_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda images, magnitude, signs: images + 1)
    images = torch.zeros(50, 1, 2, 2)
    assert (randaugment(images, generator(0), ops=4) == 4).all()
    assert (images == 0).all()
