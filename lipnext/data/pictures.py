"""Decoding picture files to bytes (C, H, W), with every failure turned into one sentence."""

import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lipnext.core.errors import DataError
from lipnext.data.dataset import named

# Pillow knows many more; some of them start other programs or are rarely tested.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
GREY = ("1", "L", "LA")
MAX_PIXELS = 50_000_000


def decode(
    source: bytes | Path,
    channels: int | None = None,
    size: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Return one picture as uint8 `(C, H, W)`.

    The rotation noted by a camera is applied; transparency is dropped.

    Args:
        source: the content of a PNG, JPEG, BMP, GIF (first frame), WebP, TIFF or PPM file, or its path.
        channels: 1 (grey) or 3 (red, green, blue); None keeps a grey picture grey and makes others RGB.
        size: if given, the short side is resized to it (bilinear, antialiased) and the central square cut.
        max_pixels: a picture whose header promises more is refused before anything is decoded.

    Raises:
        DataError: if it cannot be decoded, has more than 8 bits a channel, or too many pixels.
    """
    with _open(source, max_pixels) as picture:
        ImageOps.exif_transpose(picture, in_place=True)
        if channels is None:
            channels = 1 if picture.mode in GREY else 3
        mode = "L" if channels == 1 else "RGB"
        image = picture if picture.mode == mode else picture.convert(mode)
        if size is not None:
            image = _resize(image, size)
        pixels = np.asarray(image)
    return pixels[np.newaxis] if channels == 1 else pixels.transpose(2, 0, 1)


def stack(
    sources: Iterable[tuple[object, bytes | Path]],
    count: int,
    channels: int | None = None,
    size: int | None = None,
) -> Tensor:
    """Decode `count` pictures into one tensor, uint8 `(count, C, H, W)`, holding one decoded picture besides.

    Args:
        sources: pairs of a name for messages and what `decode` takes.
        count: the number of pairs.
        channels: 1 or 3; None means 3 if any of the pictures has colour.
        size: as for `decode`; None requires that all pictures have one size.

    Raises:
        DataError: naming the picture, as `decode`, or if its size is not that of the first.
    """
    images = np.empty((0, 1, 1, 1), np.uint8)
    for number, (name, source) in enumerate(sources):
        with named(name):
            picture = decode(source, channels, size)
            if number == 0:
                images = np.empty((count, *picture.shape), np.uint8)
            if picture.shape[1:] != images.shape[2:]:
                came = f"{picture.shape[2]} x {picture.shape[1]}"
                first = f"{images.shape[3]} x {images.shape[2]}"
                raise DataError(f"the picture has {came} pixels, the first one {first}; all need one size")
        if picture.shape[0] > images.shape[1]:  # the first colour picture after grey ones
            images = images.repeat(3, axis=1)
        images[number] = picture  # a grey picture spreads over three channels
    return torch.from_numpy(images)


@contextmanager
def _open(source: bytes | Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open lazily; any exception from Pillow, now or while decoding inside, becomes a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
            picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        with picture:
            if picture.width * picture.height > max_pixels:
                size = f"{picture.width} x {picture.height}"
                raise DataError(f"{size} pixels, at most {max_pixels:,} are read; make the picture smaller")
            if picture.mode[0] in "IF":
                raise DataError(f"pixels of mode '{picture.mode}' have more than 8 bits; convert to 8 bits")
            yield picture
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(
            f"at most {max_pixels:,} pixels are read; make the picture smaller ({error})"
        ) from error
    except Exception as error:  # a damaged file raises OSError, SyntaxError, ValueError, struct.error, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"unreadable picture ({reason}); replace or remove it") from error


def _resize(picture: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size`, then cut the central square."""
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize(
            (width, height), Image.Resampling.BILINEAR
        )  # Pillow's bilinear is antialiased
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
