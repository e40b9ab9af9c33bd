"""The local certificate: a Lipschitz bound around each image, from the units that can vary there (Local-Lip, NeurIPS 2021).

Let x be an image, x' any point with `||x' - x|| <= eps`, and y_i, y'_i the activations of both behind stage i, an affine layer
W_i with monotone layers behind it. Three things are known about y'_i and proved one stage after the other:

    reach    ||y'_i - y_i|| <= r_i
    box      l_i <= y'_i <= u_i
    varying  units outside of the mask V_i are constant on the box: its corners are mapped to the same number

    box of W_i y'   interval arithmetic on the box before, and (W_i y)_o +- r_{i-1} ||w_o V_{i-1}||; both hold
    reach           r_i = r_{i-1} ||F_i W_i V_{i-1}||, F_i the inputs of the activations that still matter

The norm of the masked matrix is the smaller of the layer's own bound and another: Gram iteration on the rows and columns that
are left, where they are few, or, for layers too large to form a matrix, that of its absolute values (Collatz-Wielandt). With
v = y' - y behind the last stage, and the head's rows w_k, the margin over rival j falls by at most the largest `(w_j - w_y) v`
on the intersection of the ball of r and the box (`lipnext.bounds.ball_box`). Where for every j this is below the margin less
its rounding error, the label is proved for eps. The radius is the largest eps that was tried and proved, and never less than
that of the global margin certificate.

All of it runs in float64 and is rounded outwards; the published method takes norms from power iteration, from below, and the
reach from the global constant.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.bounds.ball_box import ball_box_bound
from lipnext.bounds.masked import masked_absolute_bounds, masked_gram_bounds
from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import LipschitzBound
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.local import Stage, stages
from lipnext.core.network import LipschitzNetwork
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState, add_up, gamma, sqrt_up, tensor_down, tensor_up

_U = UNIT_ROUNDOFF[torch.float64]
_TINY = 1e-290  # covers every underflow in the sums of a box
MATRIX = 2**23
"""Numbers in a layer's matrix, up to which it is formed for Gram iteration: 64 MiB."""
SIDE = 128
"""The smaller side of a masked matrix, up to which Gram iteration is worth its cost."""
DOUBLINGS, BISECTIONS = 5, 7
"""From the global radius upwards; what is found is within 1/128 of what the bound could prove."""


@dataclass(frozen=True)
class _Proved:
    """A stage with everything about it that holds for all images.

    Attributes:
        stage: the layers.
        bound: of the whole affine layer, its own.
        error: bound on the l2 error of its outputs at any image in [0, 1], computed in float64.
        sizes: |W|.
        squares: W^2, entry by entry.
        matrix: of the map `(outputs, inputs)`, where it is small enough.
    """

    stage: Stage
    bound: float
    error: float
    sizes: Tensor
    squares: Tensor
    matrix: Tensor | None

    @property
    def proofs(self) -> list[str]:
        """By which the norm of a masked layer is bounded."""
        return ["layer", "collatz-wielandt" if self.matrix is None else "gram-iteration"]

    def box(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Interval arithmetic: with middle m and half width h, `|fl(W m + b) - W y - b| <= |W| h + gamma (|W| |m| + |b|)`."""
        layer = self.stage.affine
        middle = (lower + upper) / 2
        half = tensor_up(torch.maximum(upper - middle, middle - lower))
        relative = gamma(layer.terms + 4, _U)
        spread = layer.product(half + relative * torch.maximum(lower.abs(), upper.abs()), self.sizes)
        if layer.bias is not None:
            spread = spread + relative * layer.bias.abs().view(-1, *[1] * (spread.dim() - 2))
        spread = spread * add_up(1.0, gamma(2 * layer.terms + 32, _U)) + _TINY
        centre = layer(middle)
        return tensor_down(centre - spread), tensor_up(centre + spread)

    def row_norms(self, varying: Tensor) -> Tensor:
        """`||w_o V||` for every output, rounded up."""
        layer = self.stage.affine
        squares = layer.product(varying.double(), self.squares)
        return squares.sqrt() * add_up(1.0, gamma(layer.terms + 16, _U)) + 1e-140

    def norm(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Bound the norm of the masked layer for every sample, `(n,)`, by no more than that of the whole layer."""
        if self.matrix is not None:
            bound = masked_gram_bounds(self.matrix, rows.flatten(1), columns.flatten(1), SIDE)
        else:
            layer = self.stage.affine
            bound = masked_absolute_bounds(
                lambda x: layer.product(x, self.sizes), lambda y: layer.adjoint(y, self.sizes), rows, columns
            )
        return bound.clamp_max(self.bound)


class LocalBody:
    """Follows a ball and a box around each image through a body of affine and monotone layers (`lipnext.core.local`).

    Args:
        network: materialised, in float64.
        bounds: of its layers, by name.

    Raises:
        UnsoundError: for a layer of another kind.
    """

    def __init__(self, network: LipschitzNetwork, bounds: Mapping[str, LipschitzBound]) -> None:
        self.network = network
        self.first, chain = stages(network)
        self.proved = self._prove(chain, bounds)

    def hidden(self, images: Tensor) -> list[Tensor]:
        """What every affine layer returns for the images themselves."""
        x, outputs = self._start(images), []
        for stage in (p.stage for p in self.proved):
            outputs.append(stage.affine(x))
            x = stage.activate(outputs[-1])
        return outputs

    def reach(self, images: Tensor, hidden: list[Tensor], eps: Tensor) -> Tensor:
        """Bound `||f(x') - f(x)||` for the features f and all x' within `eps (n,)` of each image, `(n,)`, rounded up.

        Args:
            images: float64.
            hidden: of these images, from `hidden`.
            eps: at least 0.
        """
        return self._propagate(images, hidden, eps)[0]

    def _prove(self, chain: list[Stage], bounds: Mapping[str, LipschitzBound]) -> list[_Proved]:
        """Prove what holds for all images, layer by layer."""
        state = RoundingState(norm=sqrt_up(float(math.prod(self.network.input_shape))), error=0.0, unit=_U)
        like = torch.zeros(1, *self.network.input_shape, dtype=torch.float64)
        for layer in self.first:
            state, like = layer.rounding(state), layer(like)
        proved = []
        for stage in chain:
            state = stage.affine.rounding(state)
            weight = stage.affine.weight.detach()
            proved.append(
                _Proved(
                    stage=stage,
                    bound=bounds[stage.name].value,
                    error=state.error,
                    sizes=weight.abs(),
                    squares=weight.square(),
                    matrix=_matrix(stage, like.to(weight.device)),
                )
            )
            like = stage.activate(stage.affine(like.to(weight.device)))
            for layer in stage.monotone:
                state = layer.rounding(state)
        return proved

    def _start(self, images: Tensor) -> Tensor:
        """Apply what comes before the first affine layer."""
        for layer in self.first:
            images = layer(images)
        return images

    def _propagate(self, images: Tensor, hidden: list[Tensor], eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reach `(n,)` behind the last stage, and the box around the features as offsets `(n, C)`."""
        reach, box = eps, None
        varying = torch.ones_like(self._start(images), dtype=torch.bool)
        for proved, centre in zip(self.proved, hidden, strict=True):
            stage = proved.stage
            width = reach.view(-1, *[1] * (centre.dim() - 1)) * proved.row_norms(varying)
            width = (width + proved.error) * add_up(1.0, gamma(8, _U))
            below, above = tensor_down(centre - width), tensor_up(centre + width)
            if box is not None:  # around the image itself nothing is known but the ball
                lower, upper = proved.box(*box)
                below, above = torch.maximum(below, lower), torch.minimum(above, upper)
            box = lower, upper = stage.activate(below), stage.activate(above)
            before, varying = varying, lower < upper
            reach = tensor_up(reach * proved.norm(stage.feeds(varying, centre), before))
        features, error = stage.activate(centre), proved.error
        keep = varying.double()
        return (
            reach,
            tensor_down(tensor_down(lower - features) - error) * keep,
            tensor_up(tensor_up(upper - features) + error) * keep,
        )


class LocalCertifier(LocalBody):
    """Certifies batches of images with a network frozen at construction, image by image.

    Args:
        network: a `LipschitzNetwork` whose body is made of affine and monotone layers (`lipnext.core.local`); it is copied.
        semantics: what the certificate speaks of; "deployed" adds the error of the executed program at every point of the
            ball, as `lipnext.certificates.margin` proves it.
        arithmetic: of the deployed program, "float64" or "float32".

    Raises:
        UnsoundError: for a layer of another kind, or as `MarginCertifier`.
    """

    def __init__(
        self, network: nn.Module, semantics: Semantics = "real", arithmetic: str = "float64"
    ) -> None:
        self.margin = MarginCertifier(network, semantics, arithmetic)
        super().__init__(self.margin.network, dict(self.margin.evidence.layers))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Certificate:
        """Certify images `(n, c, h, w)` in [0, 1], float32 or float64: labels, and radii rounded down.

        Raises:
            DataError: as `MarginCertifier`.
        """
        certificate = self.margin(images)
        with torch.autocast(images.device.type, enabled=False):
            radius = self._radius(images.double(), certificate)
        return replace(certificate, radius=torch.maximum(radius, certificate.radius), per_image=True)

    def describe(self) -> dict[str, Any]:
        """Return the evidence for `certificate.json`: that of the global certificate, and how the local one goes beyond."""
        stated = self.margin.describe()
        stated["certificate"] = (
            "per image: the largest eps tried for which all j have max {(w_j - w_y) v : ||v|| <= r, v in the box} < "
            "f_y - f_j - E[y][j], r and the box followed through the ball of eps around the image; at least "
            + stated["certificate"]
        )
        stated["local"] = {
            "reach": "r = eps * the product of ||F W V|| over the stages, each the smaller of the bounds named there",
            "gram_side": SIDE,
            "stages": [
                {"name": p.stage.name, "bounds": p.proofs, "centre_error": p.error} for p in self.proved
            ],
        }
        return stated

    def _radius(self, images: Tensor, certificate: Certificate) -> Tensor:
        """Raise the global radius: double it while that is proved, then bisect; every radius returned was proved."""
        proved = certificate.radius.clone()
        todo = (proved > 0).nonzero().squeeze(1)
        images, label = images[todo], certificate.label[todo]
        outputs = self._outputs(images)
        low, high = proved[todo], torch.full_like(proved[todo], math.inf)
        for _ in range(DOUBLINGS):
            growing = (high == math.inf).nonzero().squeeze(1)
            if not len(growing):
                break
            eps = (2 * low[growing]).clamp_max(self.margin.largest_radius)
            holds = self._holds(images[growing], label[growing], [z[growing] for z in outputs], eps)
            low[growing] = torch.where(holds, eps, low[growing])
            high[growing] = torch.where(holds, math.inf, eps)
        high = torch.where(high == math.inf, low, high)
        for _ in range(BISECTIONS):
            eps = (low + high) / 2
            holds = self._holds(images, label, outputs, eps)
            low, high = torch.where(holds, eps, low), torch.where(holds, high, eps)
        proved[todo] = low
        return proved

    def _outputs(self, images: Tensor) -> list[Tensor]:
        """What every affine layer returns for the images themselves, and the logits."""
        hidden = self.hidden(images)
        return [*hidden, self.network.head(self.proved[-1].stage.activate(hidden[-1]))]

    def _holds(self, images: Tensor, label: Tensor, outputs: list[Tensor], eps: Tensor) -> Tensor:
        """Return whether no point of the closed ball of `eps (n,)` around each image gets another label."""
        *hidden, logits = outputs
        reach, lower, upper = self._propagate(images, hidden, eps)
        error = self.margin.error.to(logits.device)[label]
        room = tensor_down(tensor_down(logits.gather(1, label[:, None]) - logits) - error)
        rows = self.network.head.weight
        holds = torch.isfinite(logits).all(dim=1)
        for rival in range(len(rows)):
            shift = ball_box_bound(rows[rival] - rows[label], reach, lower, upper)
            holds &= (shift < room[:, rival]) | (label == rival)
        return holds


def _matrix(stage: Stage, like: Tensor) -> Tensor | None:
    """Form the matrix of an affine layer column by column, exactly: each output is one entry of the weight, or 0."""
    layer = stage.affine
    inputs = like.numel()
    if inputs * layer.product(like, layer.weight).numel() > MATRIX:
        return None
    unit = torch.eye(inputs, dtype=like.dtype, device=like.device)
    columns = [layer.product(part.view(-1, *like.shape[1:]), layer.weight) for part in unit.split(256)]
    return torch.cat([column.flatten(1) for column in columns]).mT.contiguous()
