"""The certificate of networks of l-infinity neurons: half the margin, and the tighter one of boxes, image by image.

Margin: the logits' differences are `D_yj`-Lipschitz in the l-infinity norm, so the label y cannot change within
`min_j (z_y - z_j) / D_yj`; for a network that is 1-Lipschitz in each logit, half the margin. The margin comes from the box
around a point: what it is wider than a point is the rounding error.

Boxes: the box `[x - eps, x + eps]` is followed through the layers (interval arithmetic). Where it leaves every rival's logit
below that of the label, no point of it has another label. In 1-Lipschitz layers a side never moves by more than eps, so this
proves at least what the margin does. In a network of distances alone it is hardly more, for all distances move by eps, but
behind an MLP it is much more. The radius is the largest eps that was tried and proved, or that of the margin.

Boxes are not cut off at [0, 1]: the radius speaks of the whole ball (the published code cuts, and speaks of images alone).

Everything is in float64 and rounded outwards. Semantics `deployed` follows the boxes with the rounding of the executed program
added in every layer, for it and any order of summation; its radii are proved by boxes alone.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.certificates.margin import freeze, whole_blocks
from lipnext.core.bound import layer_evidence
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.errors import UnsoundError
from lipnext.core.guard import check_images
from lipnext.core.interval import IntervalHead, IntervalModule
from lipnext.core.local import ReshapeModule
from lipnext.core.rounding import ARITHMETIC, UNIT_ROUNDOFF, tensor_down, tensor_up

WORTH, GROWTH, GROWN, BISECTIONS = 1.02, 1.5, 2, 4
"""From the radius of the margin upwards: where 2 % more cannot be proved, no more is tried; else times 1.5 at most twice, then
bisection, which ends within 4 % of what boxes prove, up to 2.25."""
SHRINKING = 40
"""Bisections below the radius of the margin, for programs whose rounding takes a part of it."""


class IntervalCertifier:
    """Certifies batches of images with a network frozen at construction, in the l-infinity norm.

    Args:
        network: reshapes and layers that answer for boxes (`IntervalModule`), and an `IntervalHead`; it is copied.
        semantics: what the certificate speaks of, "real" arithmetic or the "deployed" program.
        arithmetic: of the deployed program, "float64" or "float32"; float32 needs weights stored in float32.

    Raises:
        UnsoundError: if a layer is of another kind, a weight is not finite, or the semantics does not speak of the arithmetic.
    """

    def __init__(
        self, network: nn.Module, semantics: Semantics = "real", arithmetic: str = "float64"
    ) -> None:
        self.network, self.model_sha256 = freeze(
            network, IntervalHead, "lipnext.nn.sort_neuron.SortHead", semantics, arithmetic
        )
        self.layers = [_known(name, layer) for name, layer in self.network.named_layers()]
        for name, tensor in self.network.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise UnsoundError(f"cannot certify: {name} holds NaN or infinity; load a good checkpoint")
        assert isinstance(self.network.head, IntervalHead)
        self.head = self.network.head
        self.body = self.network.lipschitz_bound()
        # A floor keeps the radius finite for classes that coincide.
        constants = tensor_up(self.head.constants() * self.body.value)
        self.constants = constants.clamp_min(1e-30)
        self.semantics, self.arithmetic = semantics, arithmetic
        self.unit = None if semantics == "real" else UNIT_ROUNDOFF[ARITHMETIC[arithmetic]]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Certificate:
        """Certify images `(n, c, h, w)` in [0, 1], float32 or float64: labels, and l-infinity radii rounded down.

        Ties, margins within the rounding errors and non-finite logits get radius 0.

        Raises:
            DataError: if the images are not of that form.
        """
        check_images(images, self.network.input_shape)
        with torch.autocast(images.device.type, enabled=False):
            x = images.double()
            logits = self.network(whole_blocks(x))[: len(x)]
            labels = logits.argmax(dim=1)
            point = self._margins(x, labels, torch.zeros_like(logits[:, 0]), unit=None)
            ratio = tensor_down(point / self.constants.to(x.device)[labels])
            ratio.scatter_(1, labels[:, None], math.inf)
            radius, rival = ratio.min(dim=1)
            sure = torch.isfinite(logits).all(dim=1) & torch.isfinite(radius) & (radius > 0)
            radius = torch.where(sure, radius, 0.0)
            if self.unit is not None:
                radius = self._shrink(x, labels, radius)
            radius = self._grow(x, labels, radius)
        rival = rival[:, None]
        margin = logits.gather(1, labels[:, None]) - logits.gather(1, rival)
        return Certificate(
            label=labels,
            radius=radius,
            margin=torch.nan_to_num(margin.squeeze(1)),
            slack=torch.nan_to_num(margin - point.gather(1, rival)).squeeze(1).clamp_min(0.0),
            norm=math.inf,
            kind="deterministic",
            confidence=1.0,
            semantics=self.semantics,
            arithmetic=self.arithmetic,
            lipschitz=self.body,
            rival=rival.squeeze(1),
            per_image=True,
            model_sha256=self.model_sha256,
        )

    def describe(self) -> dict[str, Any]:
        """Return the evidence for `certificate.json`."""
        bounds = [
            (name, layer.lipschitz_bound())
            for name, layer in self.network.named_layers()
            if isinstance(layer, IntervalModule)
        ]
        return {
            "kind": "deterministic",
            "semantics": ["real", "deployed"],
            "certificate": "per image: the largest eps tried for which interval arithmetic on [x - eps, x + eps] proves the "
            "label; for real arithmetic at least min_j (z_y - z_j) / constants[y][j]",
            "lipschitz": {"bound": self.body.value, "proof": self.body.proof},
            "layers": layer_evidence(bounds),
            "constants": self.constants.tolist(),
            "arithmetic": "float64",
        }

    def box(self, images: Tensor, eps: Tensor, unit: float | None = None) -> tuple[Tensor, Tensor]:
        """Return a box around the features of all inputs within `eps (n,)` of each image, float64.

        Args:
            images: float64.
            eps: at least 0.
            unit: roundoff of the program that computes the features, None for exact arithmetic.
        """
        wide = eps.view(-1, *[1] * (images.dim() - 1))
        lower, upper = images, images
        if bool((eps > 0).any()):
            lower, upper = tensor_down(images - wide), tensor_up(images + wide)
        finite = torch.ones_like(eps, dtype=torch.bool)
        for layer in self.layers:
            if isinstance(layer, ReshapeModule):
                lower, upper = layer(lower), layer(upper)
            else:
                lower, upper = layer.box(lower, upper, unit)
            finite &= (torch.isfinite(lower) & torch.isfinite(upper)).flatten(1).all(dim=1)
        overflowed = ~finite.view(-1, *[1] * (lower.dim() - 1))  # nothing is known there
        return lower.masked_fill(overflowed, -math.inf), upper.masked_fill(overflowed, math.inf)

    def _margins(self, images: Tensor, labels: Tensor, eps: Tensor, unit: float | None) -> Tensor:
        return self.head.margins(*self.box(images, eps, unit), labels, unit)

    def holds(self, images: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        """Return whether no point of the closed ball of `eps (n,)` around each image has another label than the one given."""
        margins = self._margins(images, labels, eps, self.unit)
        proved = (margins > 0) & (margins < math.inf)  # false for NaN
        return proved.scatter(1, labels[:, None], True).all(dim=1)

    def _shrink(self, images: Tensor, labels: Tensor, radius: Tensor) -> Tensor:
        """Return a radius up to the one given that boxes prove, for the program's own rounding."""
        low, high = torch.zeros_like(radius), radius
        eps = radius * (1 - 2.0**-20)
        for _ in range(SHRINKING):
            holds = self.holds(images, labels, eps) & (eps > 0)
            low, high = torch.where(holds, eps, low), torch.where(holds, high, eps)
            if bool((high - low <= 2.0**-8 * high).all()):
                break
            eps = torch.where(high - low <= 2.0**-8 * high, low, (low + high) / 2)
        return low

    def _grow(self, images: Tensor, labels: Tensor, radius: Tensor) -> Tensor:
        """Raise radii while boxes prove that; every radius returned was proved."""
        proved = radius.clone()
        todo = ((radius > 0) & self.holds(images, labels, WORTH * radius)).nonzero().squeeze(1)
        x, labels, low = images[todo], labels[todo], WORTH * radius[todo]
        high = torch.full_like(low, math.inf)
        for _ in range(GROWN):
            growing = (high == math.inf).nonzero().squeeze(1)
            if not len(growing):
                break
            eps = GROWTH * low[growing]
            holds = self.holds(x[growing], labels[growing], eps)
            low[growing] = torch.where(holds, eps, low[growing])
            high[growing] = torch.where(holds, math.inf, eps)
        bounded = (high < math.inf).nonzero().squeeze(1)
        x, labels, below, above = x[bounded], labels[bounded], low[bounded], high[bounded]
        for _ in range(BISECTIONS):
            eps = (below + above) / 2
            holds = self.holds(x, labels, eps)
            below, above = torch.where(holds, eps, below), torch.where(holds, above, eps)
        low[bounded] = below
        proved[todo] = low
        return proved


def _known(name: str, layer: nn.Module) -> IntervalModule | ReshapeModule:
    if not isinstance(layer, IntervalModule | ReshapeModule):
        raise UnsoundError(
            f"{name} is a {type(layer).__name__}, which does not answer for boxes; use layers of lipnext.nn.sort_neuron and "
            "lipnext.nn.mean_shift, or derive it from IntervalModule"
        )
    return layer
