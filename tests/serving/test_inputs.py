"""Bodies of requests: what is read, bit for bit, and what is refused in one line."""

import contextlib
import io
import json
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lipnext.core.errors import DataError
from lipnext.serving.inputs import Shape, from_json, from_pictures
from lipnext.serving.limits import Limits, Refusal

LIMITS = Limits(images=3, json_bytes=2000, picture_pixels=10_000)
GREY, COLOUR = (1, 2, 2), (3, 2, 2)


def body(images: object) -> bytes:
    return json.dumps({"images": images}).encode()


def encoded(pixels: Any, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.sampled_from([GREY, (1, 4, 1), (1, 1, 4)]))
def test_numbers_are_read_bit_for_bit(values: list[float], shape: Shape) -> None:
    image = torch.tensor(values, dtype=torch.float64).reshape(shape)
    for nested in (image.tolist(), image[0].tolist()):
        [given_] = from_json(body([nested]), shape, LIMITS)
        assert torch.equal(given_.pixels, image)
        assert (given_.resized, given_.preprocessing) == (False, "none")


def test_a_float32_image_survives_json() -> None:
    image = torch.rand(COLOUR, dtype=torch.float32)
    [given_] = from_json(body([image.double().tolist()]), COLOUR, LIMITS)
    assert torch.equal(given_.pixels, image.double())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[1, 2]", "got list"),
        (b'{"images": [], "eps": 1}', r"got an object with \['eps', 'images'\]"),
        (b'{"images": []}', "list of 1 to 3 images, got 0"),
        (b'{"images": {}}', "got dict"),
        (body([[[0, 0], [0, 0]]] * 4), "got 4"),
        (
            body([[[0, 0], [0, 0]], [[0, 0]]]),
            r"images\[1\] must be nested lists of shape \(1, 2, 2\) or \(2, 2\)",
        ),
        (body([[[0, 0], [0, 0, 0]]]), r"images\[0\] must be nested"),
        (body([[[0, 0], 0]]), r"images\[0\] must be nested"),
        (body([[[0, 0], [0, [0]]]]), r"numbers in \[0, 1\], got \[0\]"),
        (body([[[0, 0], [0, True]]]), "got True"),
        (body([[[0, 0], [0, "0"]]]), "got 0"),
        (body([[[0, 0], [0, 1.0000001]]]), "got 1.0000001"),
        (body([[[0, 0], [0, -1e-300]]]), "got -1e-300"),
        (b'{"images": [[[0, 0], [0, NaN]]]}', "NaN is no number"),
        (b'{"images": [[[0, 0], [0, 1e999]]]}', "got inf"),
        (b'{"images": [[[0, 0], [0, 1' + b"0" * 400 + b"]]]}", "got 1000"),
        (b'{"images": [[[0, 0], [0, 1' + b"0" * 1900 + b"]]]}", "got 1000"),
    ],
)
def test_other_bodies_are_refused(content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        from_json(content, GREY, LIMITS)
    assert "\n" not in str(error.value)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(DataError, match="too deeply"):
        from_json(b"[" * 200_000, GREY, Limits())


def test_a_long_json_body_is_refused() -> None:
    with pytest.raises(Refusal, match="2,000 bytes, got 2,001") as refusal:
        from_json(b" " * 2001, GREY, LIMITS)
    assert refusal.value.status == 413


def test_a_colour_model_does_not_take_one_plane() -> None:
    with pytest.raises(DataError, match=r"shape \(3, 2, 2\)$"):
        from_json(body([[[0, 0], [0, 0]]]), COLOUR, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_picture_of_the_right_size_is_read_as_the_test_part_is(kind: str) -> None:
    pixels = np.array([[[0, 1, 2], [50, 100, 150]], [[253, 254, 255], [9, 8, 7]]])
    [given_] = from_pictures([("a", encoded(pixels, kind))], COLOUR, LIMITS)
    as_certified = torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1).to(torch.float32).div_(255)
    assert torch.equal(given_.pixels, as_certified.double())
    assert (given_.resized, given_.preprocessing) == (False, "none")


def test_a_resized_picture_says_so() -> None:
    [given_] = from_pictures([("a", encoded(np.full((6, 8, 3), 51)))], GREY, LIMITS)
    assert given_.pixels.shape == GREY
    assert torch.allclose(given_.pixels, torch.full(GREY, 0.2), atol=1e-7)  # 51 / 255 in float32
    assert given_.resized
    assert given_.preprocessing == (
        "converted to grey; resized from 8 x 6 to 2 x 2 (short side, then the middle); the radius is in pixels of "
        "the 2 x 2 picture"
    )


def test_grey_for_a_colour_model_is_told() -> None:
    [given_] = from_pictures([("a", encoded([[0, 255], [255, 0]]))], COLOUR, LIMITS)
    assert torch.equal(given_.pixels[0], given_.pixels[2])
    assert not given_.resized
    assert given_.preprocessing.startswith("grey repeated in three channels; the radius")


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its few bytes hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(101, 100), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"make the picture smaller|unreadable picture"):
        from_pictures([("a", bomb(*size))], GREY, LIMITS)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_picture_with_a_compressed_bomb_beside_it_fills_no_memory(kind: bytes) -> None:
    """PNG keeps texts and profiles compressed: 64 MiB of them arrive as 64 KiB."""
    whole = encoded([[0, 255], [255, 0]])
    head = {b"zTXt": b"a\0\0", b"iCCP": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[kind]
    data = head + zlib.compress(b"\0" * 2**26)
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    content = whole[:33] + chunk + whole[33:]  # behind the header
    tracemalloc.start()
    with contextlib.suppress(DataError):  # Pillow refuses some of them and skips others
        [given_] = from_pictures([("a", content)], GREY, LIMITS)
        assert torch.equal(given_.pixels, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23


@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), st.data())
def test_damaged_pictures_are_refused_or_read(noise: bytes, kind: str, data: st.DataObject) -> None:
    whole = encoded(np.arange(4).reshape(2, 2) * 60, kind)
    place = data.draw(st.integers(0, len(whole)))
    content = whole[:place] + noise + whole[place + len(noise) :]
    refusal = None
    try:
        [given_] = from_pictures([("a", content)], GREY, LIMITS)
        assert given_.pixels.shape == GREY
        assert 0 <= given_.pixels.min() <= given_.pixels.max() <= 1
    except DataError as error:
        refusal = str(error)
    assert refusal is None or (refusal.startswith("a: ") and "\n" not in refusal)


def test_a_model_that_is_not_square_takes_its_own_size_alone() -> None:
    with pytest.raises(DataError, match="has 3 x 3 pixels; this model needs 4 x 2"):
        from_pictures([("a", encoded(np.zeros((3, 3))))], (1, 2, 4), LIMITS)
    assert from_pictures([("a", encoded(np.zeros((2, 4))))], (1, 2, 4), LIMITS)[0].pixels.shape == (1, 2, 4)


def test_too_many_pictures_are_refused() -> None:
    with pytest.raises(DataError, match="1 to 3 images, got 4"):
        from_pictures([("a", b"")] * 4, GREY, LIMITS)
