import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lipnext.core.errors import DataError
from lipnext.data.pictures import MAX_PIXELS, decode, stack

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 4, 3), np.uint8)
GREY = RNG.integers(0, 256, (6, 4), np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds no pixel."""
    chunks = [
        (b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_back_the_pixels(kind: str, tmp_path: Path) -> None:
    assert np.array_equal(decode(encode(COLOUR, kind)), COLOUR.transpose(2, 0, 1))
    assert np.array_equal(decode(encode(GREY, kind)), GREY[None])
    path = tmp_path / "picture"  # the content tells the format, not the name
    path.write_bytes(encode(GREY, kind))
    assert np.array_equal(decode(path), GREY[None])


def test_channels_are_converted() -> None:
    assert np.array_equal(decode(encode(GREY), channels=3), np.stack([GREY] * 3))
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode(encode(COLOUR), channels=1)[0] - luma).max() <= 1
    alpha = np.concatenate([COLOUR, np.zeros((6, 4, 1), np.uint8)], 2)
    assert np.array_equal(decode(encode(alpha)), COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_camera_rotation_is_applied(orientation: int, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encode(GREY, exif=exif))[0], np.rot90(GREY, turn))


def test_resize_keeps_the_aspect_and_cuts_the_centre() -> None:
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 20:] = 200  # the middle of the picture, hence of the square
    square = decode(encode(wide), size=5)
    assert square.shape == (1, 5, 5)
    assert (square[0, :, 0] == 0).all()
    assert (square[0, :, -1] == 200).all()
    assert decode(encode(wide.T), size=5).shape == (1, 5, 5)
    assert np.array_equal(
        decode(encode(wide), size=10)[0], wide[:, 15:25]
    )  # no resampling where none is needed


def test_resize_is_antialiased() -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    assert (
        np.abs(decode(encode(stripes), size=8)[0].astype(int) - 127).max() <= 8
    )  # plain sampling gives 0 or 255


def test_stack_turns_to_colour_at_the_first_colour_picture() -> None:
    images = stack([("a", encode(GREY)), ("b", encode(COLOUR)), ("c", encode(GREY))], 3)
    assert images.shape == (3, 3, 6, 4)
    expected = [np.stack([GREY] * 3), COLOUR.transpose(2, 0, 1), np.stack([GREY] * 3)]
    assert np.array_equal(images.numpy(), np.stack(expected))
    assert stack([("a", encode(GREY))], 1).shape == (1, 1, 6, 4)


def test_stack_names_the_picture_of_another_size() -> None:
    with pytest.raises(
        DataError, match=r"^b: the picture has 6 x 4 pixels, the first one 4 x 6; all need one size"
    ):
        stack([("a", encode(GREY)), ("b", encode(GREY.T))], 2)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        encode(COLOUR)[:60],
        encode(COLOUR, "JPEG")[:-300],
        encode(COLOUR)[:20],
        png_header(4, 4),
        png_header(0, 4),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",  # a program, not decoded
    ],
)
def test_unreadable_pictures_are_named(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^cat/17.png: unreadable picture \(.+\); replace or remove it$"):
        stack([("cat/17.png", content)], 1)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^x: unreadable picture \(.*No such file"):
        stack([("x", tmp_path / "x.png")], 1)


def test_every_truncation_is_either_refused_or_whole() -> None:
    content = encode(COLOUR)
    for length in range(len(content)):
        try:
            picture = decode(content[:length])
        except DataError:
            continue
        assert np.array_equal(picture, COLOUR.transpose(2, 0, 1))  # only the end mark was lost


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 10_000, 16_000, 2**31 - 1])
def test_decompression_bombs_are_refused_before_decoding(side: int) -> None:
    # 10,000 is where Pillow warns, 16,000 where it refuses by itself.
    with pytest.raises(DataError, match=r"at most 50,000,000 .*make"):
        decode(png_header(side, side))


def test_sixteen_bit_pictures_are_refused() -> None:
    with pytest.raises(DataError, match="pixels of mode 'I;16' have more than 8 bits; convert to 8 bits"):
        decode(encode(GREY.astype(np.uint16) * 257))
