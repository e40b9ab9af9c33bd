"""From the body of a request to images: JSON numbers as they are, pictures decoded as for certifying a data set."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipnext.core.errors import DataError
from lipnext.data.dataset import named
from lipnext.data.pictures import decode
from lipnext.serving.limits import Limits, Refusal

Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """One image as the model will see it.

    Attributes:
        pixels: float64 (C, H, W) in [0, 1].
        resized: whether the picture had another size.
        preprocessing: "none", or in words what was done to the picture that was sent.
    """

    pixels: Tensor
    resized: bool = False
    preprocessing: str = "none"


def from_json(body: bytes, shape: Shape, limits: Limits) -> list[Given]:
    """Read `{"images": [...]}`, each image nested lists of numbers in [0, 1], (C, H, W), or (H, W) for a grey model.

    The numbers are read as float64. The certificate is about exactly these: an 8-bit value v of a test set is the float32
    `v / 255`, whose digits differ from those of the float64 `v / 255`.

    Raises:
        Refusal: 413 for a body that is too long.
        DataError: one line that says where it is not of that form.
    """
    if len(body) > limits.json_bytes:
        raise Refusal(
            413,
            f"a JSON body may have {limits.json_bytes:,} bytes, got {len(body):,}; send fewer images, or PNG",
        )
    try:
        document = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise DataError("the body is nested too deeply; send lists of rows of numbers") from None
    except ValueError as error:  # also UnicodeDecodeError, and integers of thousands of digits
        raise DataError(f"the body is no JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(document, dict) or set(document) != {"images"}:
        came = (
            f"an object with {sorted(document)[:5]}"
            if isinstance(document, dict)
            else type(document).__name__
        )
        raise DataError(f'the body must be {{"images": [...]}}, got {came}')
    images = document["images"]
    _check_count(images, limits)
    return [Given(pixels=_pixels(value, shape, f"images[{k}]")) for k, value in enumerate(images)]


def from_pictures(files: list[tuple[str, bytes]], shape: Shape, limits: Limits) -> list[Given]:
    """Decode uploaded pictures, pairs of a name for messages and the content of the file.

    A picture with the model's size and channels is taken as it is: each byte divided by 255 in float32, as for the test part.

    Raises:
        DataError: naming the picture, where it cannot be decoded or has too many pixels.
    """
    _check_count(files, limits)
    result = []
    for name, content in files:
        with named(name):
            result.append(_picture(content, shape, limits))
    return result


def _picture(content: bytes, shape: Shape, limits: Limits) -> Given:
    channels, height, width = shape
    pixels = decode(content, max_pixels=limits.picture_pixels)
    came, changes = pixels.shape, []
    resized = came[1:] != (height, width)
    if resized and height != width:
        raise DataError(
            f"the picture has {came[2]} x {came[1]} pixels; this model needs {width} x {height}, resize it first"
        )
    if came != shape:
        pixels = decode(content, channels, height if resized else None, limits.picture_pixels)
    if came[0] != channels:
        changes.append("converted to grey" if channels == 1 else "grey repeated in three channels")
    if resized:
        changes.append(
            f"resized from {came[2]} x {came[1]} to {width} x {height} (short side, then the middle)"
        )
    return Given(
        # The same float32 numbers that Dataset.float_images gives to certify.
        pixels=torch.from_numpy(pixels.copy()).to(torch.float32).div_(255).double(),
        resized=resized,
        preprocessing="; ".join(changes) + f"; the radius is in pixels of the {width} x {height} picture"
        if changes
        else "none",
    )


def _check_count(images: object, limits: Limits) -> None:
    if not isinstance(images, list) or not 1 <= len(images) <= limits.images:
        came = len(images) if isinstance(images, list) else type(images).__name__
        raise DataError(f"a request needs a list of 1 to {limits.images} images, got {came}")


def _pixels(value: Any, shape: Shape, name: str) -> Tensor:
    channels, height, width = shape
    grey = (
        channels == 1
        and _is_list(value, height)
        and not any(_is_list(row) and _is_list(row[0]) for row in value if row)
    )
    planes = [value] if grey else value
    fits = _is_list(planes, channels) and all(
        _is_list(plane, height) and all(_is_list(row, width) for row in plane) for plane in planes
    )
    if not fits:
        also = f" or ({height}, {width})" if channels == 1 else ""
        raise DataError(f"{name} must be nested lists of shape ({channels}, {height}, {width}){also}")
    numbers = [number for plane in planes for row in plane for number in row]
    for number in numbers:
        # bool is an int to Python; comparing first keeps integers that no float can hold from being converted.
        if type(number) not in (int, float) or not 0 <= number <= 1:
            raise DataError(f"{name} must hold numbers in [0, 1], got {str(number)[:40]}")
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


def _is_list(value: object, length: int | None = None) -> bool:
    return isinstance(value, list) and length in (None, len(value))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
