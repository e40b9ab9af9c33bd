"""Local Lipschitz constants and l-infinity radii around images, for plain sequential networks.

Let `m_j` be the margin of the label over rival j at the image, from below, and `L_j(eps)` a bound on `||grad (z_y - z_j)||_1`
over the box of all points within eps. Whatever eps is tried, no point within

    min(eps, min_j m_j / L_j(eps))

has another label, since all of it lies in that box. The radius is the largest of these numbers over some tries, found by
bisection; that L_j grows with eps guides the search, and no proof rests on it. The pixels of the ball are not held to [0, 1].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.certificates.clarke.branch import Refined, refine
from lipnext.certificates.clarke.jacobian import (
    Forward,
    Method,
    forward_chain,
    jacobian_bounds,
    slope_boxes,
)
from lipnext.certificates.clarke.layers import Layer, read_layers
from lipnext.certificates.clarke.relaxation import Box
from lipnext.certificates.clarke.substitution import check_range, upper_bounds
from lipnext.certificates.module import ModuleCertifier
from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.eps import parse_eps
from lipnext.core.errors import ConfigError, DataError
from lipnext.core.guard import check_certifiable, check_images
from lipnext.core.rounding import UNIT_ROUNDOFF, add_up, fraction_up, gamma, mul_up

TRIES = 8
"""Sizes of the box that are tried for each image."""
_DOWN = 1 - 2.0**-50  # more than the roundings of a quotient


@dataclass(frozen=True)
class LocalConstants:
    """Bounds on `||grad (z_label - z_rival)||_1` over all points within eps of an image, for pixels in [0, 1].

    Attributes:
        label: int64 (n,).
        rivals: int64 (n, K - 1), all other classes.
        values: float64 (n, K - 1), one bound for each rival.
    """

    label: Tensor
    rivals: Tensor
    values: Tensor

    @property
    def largest(self) -> Tensor:
        """Over all rivals, (n,): the constant of every margin of the label."""
        return self.values.amax(dim=1)


class ClarkeCertifier:
    """Analyses batches of images with a network frozen at construction.

    Args:
        net: in evaluation mode, from images `(n, C, H, W)` in [0, 1] to logits `(n, K)`: affine layers, ReLU, Tanh and
            Sigmoid in sequence. Its weights are copied.
        input_shape: (C, H, W).

    Raises:
        UnsoundError: naming the operation that is not understood, or the setting that breaks the error bounds.
    """

    def __init__(self, net: nn.Module, input_shape: tuple[int, int, int]) -> None:
        module = ModuleCertifier(net, input_shape)  # traces it, compares, and refuses what it must
        self.input_shape = input_shape
        self.classes = module.classes
        self.model_sha256 = module.model_sha256
        self.layers: list[Layer] = [_on_cpu(layer) for layer in read_layers(module.graph)]
        check_range([torch.cat([layer.weight, layer.bias[:, None]], dim=1) for layer in self.layers])
        self.lipschitz = LipschitzBound.compose(*(_row_sums(layer) for layer in self.layers))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Certificate:
        """Certify images `(n, C, H, W)` in [0, 1], float32 or float64: labels, and l-infinity radii rounded down.

        Ties and margins within the rounding error get radius 0.

        Raises:
            DataError: where the images are not of that form.
        """
        x = self._points(images)
        parts = [self._certify(part) for part in self._batches(x)]
        label, rival, radius, margin, slack = (torch.cat(column) for column in zip(*parts, strict=True))
        return Certificate(
            label=label,
            radius=radius,
            rival=rival,
            margin=margin,
            slack=slack,
            norm=math.inf,
            kind="deterministic",
            confidence=1.0,
            semantics="real",
            lipschitz=self.lipschitz,
            per_image=True,
            model_sha256=self.model_sha256,
        )

    @torch.no_grad()
    def constants(
        self,
        images: Tensor,
        eps: str | int | float | Fraction,
        method: Method = "joint",
        forward: Forward = "crown",
    ) -> LocalConstants:
        """Bound the local Lipschitz constants of all margins of the label over the points within eps of each image.

        Args:
            images: as in a call.
            eps: l-infinity distance in pixel units of images in [0, 1].
            method: "interval", "recurjac" or "joint", as in `lipnext.certificates.clarke.jacobian`.
            forward: how activations are bounded, "interval" or "crown".

        Raises:
            ConfigError: where eps, method or forward is not one of these.
            DataError: where the images are not of that form.
        """
        if method not in ("interval", "recurjac", "joint"):
            raise ConfigError(f"method must be interval, recurjac or joint, got {method!r}")
        if forward not in ("interval", "crown"):
            raise ConfigError(f"forward must be interval or crown, got {forward!r}")
        size = fraction_up(parse_eps(eps))
        labels, others, values = [], [], []
        for x in self._batches(self._points(images)):
            label, rivals, _ = self._margins(x)
            labels.append(label)
            others.append(rivals)
            values.append(self._constants(x, torch.full_like(x[:, 0], size), label, rivals, method, forward))
        return LocalConstants(torch.cat(labels), torch.cat(others), torch.cat(values))

    @torch.no_grad()
    def refine(self, image: Tensor, rival: int, eps: str | int | float | Fraction, seconds: float) -> Refined:
        """Tighten the joint bound of one margin of one image by branch and bound for a given time.

        Args:
            image: (1, C, H, W).
            rival: a class other than the label.
            eps: as in `constants`.
            seconds: time to spend; at any time the bound holds.

        Raises:
            ConfigError: where the rival is no other class or the time is negative or no number.
            DataError: where it is not one image of that form.
        """
        x = self._points(image)
        if len(x) != 1:
            raise DataError(f"refine takes one image (1, C, H, W), got {len(x)}")
        if not 0 <= seconds < math.inf:
            raise ConfigError(f"seconds must be a number of at least 0, got {seconds!r}")
        label, rivals, _ = self._margins(x)
        if rival not in rivals[0].tolist():
            raise ConfigError(
                f"rival must be a class in 0..{self.classes - 1} other than the label {label.item()}, got {rival!r}"
            )
        difference = torch.zeros(1, self.classes, dtype=torch.float64)
        difference[0, label], difference[0, rival] = 1.0, -1.0
        size = torch.full((1,), fraction_up(parse_eps(eps)), dtype=torch.float64)
        chain = forward_chain(self.layers, _around(x, size))
        return refine(self.layers, slope_boxes(self.layers, chain), difference, seconds)

    @torch.no_grad()
    def monotone(self, images: Tensor, eps: str | int | float | Fraction) -> Tensor:
        """Say for each pixel whether the label's logit can only grow or only fall with it, within eps of the image.

        Args:
            images: as in a call.
            eps: as in `constants`.

        Returns:
            int8, of the images' shape: 1 where the logit never falls as the pixel grows, -1 where it never grows, 0 where
            neither is proved, as for a pixel without any influence.
        """
        size = fraction_up(parse_eps(eps))
        signs = []
        for x in self._batches(self._points(images)):
            label, _, _ = self._margins(x)
            chain = forward_chain(self.layers, _around(x, torch.full_like(x[:, 0], size)))
            one = nn.functional.one_hot(label, self.classes).double()
            lower, upper = jacobian_bounds(self.layers, slope_boxes(self.layers, chain), one, "joint").box
            signs.append(torch.where(lower >= 0, 1, torch.where(upper <= 0, -1, 0)).to(torch.int8))
        return torch.cat(signs).view(images.shape)

    def describe(self) -> dict[str, Any]:
        """Return the evidence as plain numbers, text, lists and dictionaries."""
        bound = self.lipschitz
        return {
            "kind": "deterministic",
            "semantics": "real",
            "lipschitz": {"bound": bound.value, "proof": bound.proof},
            "layers": [
                {
                    "outputs": layer.weight.shape[0],
                    "inputs": layer.weight.shape[1],
                    "activation": layer.activation,
                }
                for layer in self.layers
            ],
            "local": "A margin falls by at most the largest l1 norm of its Clarke Jacobian over the box, bounded by linear "
            "relaxation with rounding included, times the linf distance.",
            "arithmetic": "float64",
        }

    def _points(self, images: Tensor) -> Tensor:
        check_images(images, self.input_shape)
        check_certifiable(nn.Identity().eval())  # the environment; the weights are copies
        return images.double().cpu().flatten(1)

    def _batches(self, points: Tensor) -> Iterator[Tensor]:
        """Few enough at once for some copies of the largest tensor of coefficients of one row."""
        widest = max(max(layer.weight.shape) for layer in self.layers)
        yield from points.split(max(1, 2**20 // (self.classes * widest)))

    def _certify(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return label, nearest rival, radius, its margin, and what was subtracted from it for rounding, (n,) each."""
        label, rivals, (margins, proved) = self._margins(x)
        best, rival = torch.zeros_like(x[:, 0]), torch.zeros_like(label)
        lower, upper = torch.zeros_like(best), torch.ones_like(best)
        eps = lower
        for _ in range(TRIES):
            constants = self._constants(x, eps, label, rivals, "joint", "crown")
            steps = proved / constants * _DOWN  # bounds are above 0, if only by what covers an underflow
            reach, nearest = torch.where(proved > 0, steps, 0.0).min(dim=1)
            radius = torch.minimum(eps, reach)
            rival = torch.where(radius >= best, nearest, rival)
            best = torch.maximum(best, radius)
            upper = torch.where(reach > eps, upper, torch.minimum(upper, eps))
            upper = torch.minimum(
                upper, reach
            )  # about: the constant at this eps is hardly above that further out
            lower = torch.maximum(lower, best)
            eps = (lower + upper) / 2
        pick = rival[:, None]
        margin, least = margins.gather(1, pick).squeeze(1), proved.gather(1, pick).squeeze(1)
        slack = (margin - least).clamp_min(0) * (1 + 2.0**-50)
        return label, rivals.gather(1, pick).squeeze(1), torch.nan_to_num(best), margin, slack

    def _margins(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return labels, rivals, and the margins over them: as computed, and from below."""
        chain = forward_chain(self.layers, (x, x), "interval")
        logits = (chain[-1].box[0] + chain[-1].box[1]) / 2
        label = logits.argmax(dim=1)
        every = torch.arange(self.classes).expand(len(x), -1)
        rivals = every[every != label[:, None]].view(len(x), self.classes - 1)
        margins = logits.gather(1, label[:, None]) - logits.gather(1, rivals)
        proved, _ = upper_bounds(chain, (x, x), -_differences(label, rivals, self.classes))
        return label, rivals, (margins, -proved)

    def _constants(
        self, x: Tensor, eps: Tensor, label: Tensor, rivals: Tensor, method: Method, forward: Forward
    ) -> Tensor:
        """Bound the constants of the margins over all rivals, (n, K - 1), in the boxes of half width `eps`, (n,)."""
        chain = forward_chain(self.layers, _around(x, eps), forward)
        count = rivals.shape[1]
        known = [
            (low.repeat_interleave(count, 0), high.repeat_interleave(count, 0))
            for low, high in slope_boxes(self.layers, chain)
        ]
        differences = _differences(label, rivals, self.classes).flatten(0, 1)
        return jacobian_bounds(self.layers, known, differences, method).norm.view(-1, count)


def _around(x: Tensor, eps: Tensor) -> Box:
    """The box of all points within eps, rounded outwards; where eps is 0, the point itself."""
    lower, upper = x - eps[:, None], x + eps[:, None]
    wide = (eps > 0)[:, None]
    infinity = torch.full_like(x, math.inf)
    return (
        torch.where(wide, torch.nextafter(lower, -infinity), x),
        torch.where(wide, torch.nextafter(upper, infinity), x),
    )


def _differences(label: Tensor, rivals: Tensor, classes: int) -> Tensor:
    """Rows `e_label - e_rival`, (n, K - 1, K)."""
    one = nn.functional.one_hot(label, classes).double()[:, None]
    return one - nn.functional.one_hot(rivals, classes).double()


def _row_sums(layer: Layer) -> LipschitzBound:
    """`||W||_inf` from above; activations have slopes within [0, 1]."""
    relative = mul_up(2.0, gamma(layer.weight.shape[1] + layer.terms, UNIT_ROUNDOFF[torch.float64]))
    largest = layer.weight.abs().sum(dim=1).max().item()
    return LipschitzBound(value=mul_up(largest, add_up(1.0, relative)), norm=math.inf, proof="row-sum")


def _on_cpu(layer: Layer) -> Layer:
    return Layer(layer.weight.cpu(), layer.bias.cpu(), layer.size.cpu(), layer.terms, layer.activation)
