"""The nearest-neighbour certificate: it learns nothing, and no system may fall below it.

With `f_k(x) = -min_i ||x - x_i||` over the training images of class k every logit is 1-Lipschitz by the triangle inequality, so
the radius is half the gap between the two best classes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.errors import DataError
from lipnext.core.files import sha256_tensors
from lipnext.core.rounding import UNIT_ROUNDOFF, gamma

CHUNK = 250
"""Images at once: their distances to 50,000 training images take 100 MB."""


class NearestNeighbour:
    """The classifier of a training set; distances are l2, in units of images in [0, 1].

    Args:
        images: uint8 `(N, C, H, W)`, of at most 2^36 numbers an image.
        labels: int64 `(N,)`, each class at least once.
        classes: how many.

    Raises:
        DataError: if a class has no image, or the images are no bytes.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int) -> None:
        self.members = [labels == k for k in range(classes)]
        if not all(bool(mask.any()) for mask in self.members):
            raise DataError("the nearest neighbour needs an image of each class in the training part")
        if images.dtype != torch.uint8:
            raise DataError(f"the nearest neighbour takes images of bytes, uint8, got {images.dtype}")
        self.shape = images.shape[1:]
        # Products of bytes summed over the pixels of an image stay below 2^53: float64 is exact here.
        self.points = images.flatten(1).double()
        self.squares = self.points.square().sum(1)
        self.model_sha256 = sha256_tensors({"images": images, "labels": labels})

    def certify(self, images: Tensor, progress: Callable[[int], object] | None = None) -> Certificate:
        """Certify images of bytes, uint8 `(n, C, H, W)`; radii are rounded down, ties get 0.

        Args:
            images: of the shape of the training images.
            progress: told how many images are done.

        Raises:
            DataError: for images of another type or shape: squared distances are exact for bytes alone.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != self.shape:
            raise DataError(
                f"images must be uint8 of shape (n, {', '.join(map(str, self.shape))}), got {images.dtype} of "
                f"{tuple(images.shape)}"
            )
        distance = self._distances(images, progress)
        best, label = distance.min(1)
        second = distance.scatter(1, label[:, None], math.inf).min(1).values
        # Each distance has a root and a quotient of an exact integer; the difference rounds once more.
        slack = (best + second) * gamma(4, UNIT_ROUNDOFF[torch.float64])
        return Certificate(
            label=label,
            radius=((second - best - slack) / 2).mul(1 - 2.0**-50).clamp_min(0.0),
            margin=second - best,
            slack=slack,
            norm=2.0,
            kind="deterministic",
            confidence=1.0,
            semantics="real",
            arithmetic="float64",
            lipschitz=LipschitzBound(value=1.0, norm=2.0, proof="nearest-neighbour"),
            model_sha256=self.model_sha256,
        )

    def _distances(self, images: Tensor, progress: Callable[[int], object] | None) -> Tensor:
        """Distance to the nearest training image of each class, float64 `(n, K)`."""
        found = torch.full((len(images), len(self.members)), math.inf, dtype=torch.float64)
        for start in range(0, len(images), CHUNK):
            x = images[start : start + CHUNK].flatten(1).double()
            square = x.square().sum(1, keepdim=True) + self.squares - 2 * x @ self.points.T
            for k, mask in enumerate(self.members):
                found[start : start + CHUNK, k] = square[:, mask].min(1).values
            if progress is not None:
                progress(len(x))
        return found.sqrt() / 255
