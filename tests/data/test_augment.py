import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lipnext.core.experiment import AugmentSpec
from lipnext.core.seed import generator
from lipnext.data.augment import Augment, crop, cutout, flip

ALL = AugmentSpec(flip=True, crop=2, randaugment=0.5, cutout=3)


def random_images(count: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Positive values, all different within an image, so that a pixel tells where it came from."""
    numbers = torch.stack(
        [torch.randperm(channels * height * width, generator=generator(seed, i)) for i in range(count)]
    )
    return (numbers.reshape(count, channels, height, width) + 1.0) / (channels * height * width)


shapes = st.tuples(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 7))


@given(shapes, st.integers(0, 99))
def test_flip_gives_each_image_or_its_mirror(shape: tuple[int, int, int, int], seed: int) -> None:
    images = random_images(*shape)
    flipped = flip(images, generator(seed))
    for before, after in zip(images, flipped, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
    assert torch.equal(flip(flipped, generator(seed)), images)  # the same choices undo themselves


def test_flip_is_fair() -> None:
    images = random_images(1, 1, 1, 2).expand(10_000, -1, -1, -1)
    mirrored = int((flip(images, generator(0)) != images).any(3).sum())
    assert abs(mirrored - 5000) < 250  # five standard deviations


@given(shapes, st.integers(0, 4), st.integers(0, 99))
def test_crop_is_a_shift_with_black_from_outside(
    shape: tuple[int, int, int, int], padding: int, seed: int
) -> None:
    images = random_images(*shape)
    for before, after in zip(images, crop(images, padding, generator(seed)), strict=True):
        assert any(
            torch.equal(after, shifted(before, dy, dx))
            for dy in range(-padding, padding + 1)
            for dx in range(-padding, padding + 1)
        )


def shifted(image: Tensor, dy: int, dx: int) -> Tensor:
    result = torch.zeros_like(image)
    height, width = image.shape[1:]
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                result[:, y, x] = image[:, y + dy, x + dx]
    return result


def test_crop_reaches_every_offset_equally_often() -> None:
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 1
    places = (
        crop(image.expand(25_000, -1, -1, -1), 2, generator(0)).flatten(1).argmax(1).bincount(minlength=25)
    )
    assert ((places - 1000).abs() < 160).all()  # five standard deviations


@given(shapes, st.integers(1, 5), st.integers(0, 99))
def test_cutout_blackens_one_square(shape: tuple[int, int, int, int], side: int, seed: int) -> None:
    images = random_images(*shape)
    after = cutout(images, side, generator(seed))
    height, width = shape[2:]
    for hidden in (after == 0).unbind():
        assert (hidden == hidden[:1]).all()  # the same in each channel
        rows, columns = hidden[0].any(1).nonzero().flatten(), hidden[0].any(0).nonzero().flatten()
        assert hidden[0].sum() == len(rows) * len(columns) > 0
        for found, length in ((rows, height), (columns, width)):
            assert len(found) <= side
            assert int(found[-1] - found[0]) == len(found) - 1
            at_border = int(found[0]) == 0 or int(found[-1]) == length - 1
            assert len(found) == side or at_border
    assert torch.equal(after[after > 0], images[after > 0])


def test_what_ends_before_the_training_does() -> None:
    spec = ALL.model_copy(update={"until": 0.75})
    assert spec.at(0.0) == spec
    assert spec.at(0.74) == spec
    assert Augment(spec.at(0.75)).spec == AugmentSpec(flip=True, until=0.75)
    assert ALL.at(0.999) == ALL
    assert ALL.model_copy(update={"until": 0.0}).at(0.0) == AugmentSpec(flip=True, until=0.0)


def test_nothing_asked_for_changes_nothing() -> None:
    images = random_images(4, 3, 5, 5)
    assert torch.equal(Augment(AugmentSpec())(images, generator(0)), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_chain_keeps_shape_type_range_and_its_input(channels: int, dtype: torch.dtype) -> None:
    images = random_images(64, channels, 9, 8).to(dtype)
    before = images.clone()
    after = Augment(ALL)(images, generator(0))
    assert torch.equal(images, before)
    assert after.shape == images.shape
    assert after.dtype == dtype
    assert after.min() >= 0
    assert after.max() <= 1
    assert not torch.equal(after, images)


def test_the_generator_decides() -> None:
    images = random_images(64, 3, 8, 8)
    first, again, other = (Augment(ALL)(images, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(7)  # the global state has no say
    assert torch.equal(Augment(ALL)(images, generator(0)), first)


def test_the_default_dtype_has_no_say_in_the_choices() -> None:
    images = random_images(64, 3, 8, 8).float()
    wide = Augment(ALL)(images, generator(0))
    torch.set_default_dtype(torch.float32)
    assert torch.equal(Augment(ALL)(images, generator(0)), wide)
