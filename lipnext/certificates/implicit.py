"""The certificate of implicit networks, in the l-infinity norm: pair by pair, image by image, solver error included.

The network is `y = C z_t + c`, `z_t` the iterate after the network's own number of steps t towards the solution z* of
`z = relu(A z + B x + b)`. `mu(A) < 1` is proved for the stored A (`lipnext.bounds.matrix_measure`); with it

    z*      |z*(x) - z*(x')| <= h ||x - x'||_inf, unit by unit; every iterate from 0 obeys the same
    solver  ||z_t - z*|| <= left ||z*||, left = (1 - alpha (1 - mu_+))^t, at every point of the ball
    centre  ||z - z*(x)|| <= ||z - relu(A z + B x + b)|| / (1 - mu_+), for the z that was computed for the image

Pairwise: the label y cannot change within `r = min_j (y_y - y_j - E_yj) / (|c_y - c_j| h)`, E the sum of
`||c_y - c_j||_1` times centre and solver error, and the rounding of both logits. The paper has
`||c_y - c_j||_1 ||B|| / (1 - mu_+)` in place of `|c_y - c_j| h`, which is never smaller.

Boxes: around one image more is known. With the diagonal solved for, a unit is `z_i = relu(s_i) / (1 - a_ii)`,
`s_i = sum_{j != i} a_ij z_j + v_i`, which grows with `s_i`. So a box that holds z* for every x' of the ball gives a smaller
one by interval arithmetic, again and again (the "embedding network" of Jafarpour et al., 2208.03889, with its diagonal solved
for); the first one is `z +- (h eps + error)`. Units that cannot leave 0 drop out. Where `(c_y - c_j) z` is positive on the box
by more than the errors, for all j, the label is proved for eps; the radius is the largest eps that was tried and proved, at
least the pairwise one.

Everything runs in float64 and is rounded outwards. Semantics `deployed` adds the error of the executed program at every point
of the ball, followed through its steps: each adds a rounding error, and brings those before it down by `1 - alpha (1 - mu_+)`.
Both semantics: radii are at most 1/2, so that inputs lie in [-1/2, 3/2], for which the errors are bounded.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.bounds.matrix_measure import (
    Averaging,
    averaging,
    comparison_up,
    diagonal,
    off_diagonal,
    per_unit,
)
from lipnext.certificates.margin import freeze, whole_blocks
from lipnext.core.bound import PROOFS, LipschitzBound, layer_evidence
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.errors import UnsoundError
from lipnext.core.guard import check_images, refuse_fast_convolution
from lipnext.core.implicit import ImplicitModule, implicit_parts
from lipnext.core.local import AffineModule, ReshapeModule
from lipnext.core.network import LinearHead, LipschitzNetwork
from lipnext.core.rounding import (
    ARITHMETIC,
    LARGEST,
    UNDERFLOW,
    UNIT_ROUNDOFF,
    add_up,
    gamma,
    tensor_down,
    tensor_up,
)

_U = UNIT_ROUNDOFF[torch.float64]
_TINY = 1e-290  # covers every underflow in a sum
_UP = 1 + 2.0**-40  # covers the rounding of a few thousand sums, products and quotients of positive numbers
LARGEST_RADIUS = 0.5
"""The image of 0.5 everywhere is that near to every other: nothing but a constant has larger radii."""
BOX_STEPS = 8
"""Times that a box is made smaller."""
DOUBLINGS, BISECTIONS = 4, 6
"""From the pairwise radius upwards; what is found is within 1/64 of what the boxes could prove."""


@dataclass(frozen=True)
class _Stored:
    """The tensors of a frozen network, float64, and what is proved for all images.

    Attributes:
        before: reshapes before the affine map.
        affine: x to `B x + b`.
        implicit: the layer with A.
        iteration: its steps.
        matrix: A.
        rest, sizes: A without its diagonal, and the sizes of that.
        room: `1 - a_ii`, in the shape of z.
        forcing: `sum_j |b_ij|`, rounded up, in the shape of z, batch 1.
        sensitivity: h, in the shape of z, batch 1.
        shift: |b| in the shape of z, batch 1.
    """

    before: list[ReshapeModule]
    affine: AffineModule
    implicit: ImplicitModule
    iteration: Averaging
    matrix: Tensor
    rest: Tensor
    sizes: Tensor
    room: Tensor
    forcing: Tensor
    sensitivity: Tensor
    shift: Tensor

    @property
    def terms(self) -> int:
        """Products in a sum of `A z`, at most."""
        return self.matrix[0].numel()

    def injection(self, images: Tensor) -> Tensor:
        """Return `B x + b` as the network computes it."""
        for layer in self.before:
            images = layer(images)
        return self.affine(images)

    def injection_error(self, largest: float, unit: float) -> Tensor:
        """Bound the error of `B x + b` for `|x| <= largest`, unit by unit."""
        relative = gamma(self.affine.terms + 4, unit)
        return tensor_up(relative * (self.forcing * largest + self.shift) * (1 + 2.0**-50)) + UNDERFLOW[unit]


def _read(network: LipschitzNetwork) -> _Stored:
    """Prove what holds for all images, for weights taken as exact in float64.

    Raises:
        UnsoundError: if the network is of another form, A is not contracting, or convolutions may not be sums of products.
    """
    before, affine, implicit = implicit_parts(network)
    weight, a = affine.weight.detach().double(), implicit.matrix().detach().double()
    if a.dim() == 4:
        refuse_fast_convolution(a.device, torch.float64)
    ones = torch.ones(1, *network.input_shape, dtype=torch.float64, device=a.device)
    for layer in before:
        ones = layer(ones)
    forcing = affine.product(ones, weight.abs()) * add_up(1.0, gamma(2 * affine.terms + 8, _U)) + _TINY
    bias = torch.zeros(1) if affine.bias is None else affine.bias.detach()
    rest = off_diagonal(a)
    return _Stored(
        before=before,
        affine=affine,
        implicit=implicit,
        iteration=averaging(a),
        matrix=a,
        rest=rest,
        sizes=rest.abs(),
        room=1.0 - per_unit(diagonal(a), forcing),
        forcing=forcing,
        sensitivity=comparison_up(implicit.product, a, forcing),
        shift=per_unit(bias.double().abs().to(a.device), forcing).expand_as(forcing),
    )


def sensitivity_up(network: LipschitzNetwork) -> Tensor:
    """Return h with `|z(x) - z(x')| <= h ||x - x'||_inf` for the features z, unit by unit, rounded up, batch 1, float64.

    Raises:
        UnsoundError: if the network is of another form, or A is not proved to be contracting.
    """
    return _read(network).sensitivity


class ImplicitCertifier:
    """Certifies batches of images with an implicit network frozen at construction, in the l-infinity norm.

    Args:
        network: an affine and an implicit layer with reshapes around them, and a `LinearHead`; it is copied.
        semantics: what the certificate speaks of, "real" arithmetic or the "deployed" program; both take the network's
            own number of steps.
        arithmetic: of the deployed program, "float64" or "float32"; float32 needs weights stored in float32.

    Raises:
        UnsoundError: if the network is of another form, mu(A) is not below 1, or no error bound is proved.
    """

    def __init__(
        self, network: nn.Module, semantics: Semantics = "real", arithmetic: str = "float64"
    ) -> None:
        self.network, self.model_sha256 = freeze(
            network, LinearHead, "lipnext.nn.head.PlainHead", semantics, arithmetic
        )
        self.stored = _read(self.network)
        self.rows = self.network.head.weight.detach()
        terms = self.rows.shape[1]
        # |c_i - c_j| summed against positive numbers: one rounding for the difference, t + 1 for the sum.
        factor = add_up(1.0, gamma(2 * terms + 16, _U))
        h = self.stored.sensitivity.flatten()
        differences = [(self.rows - row).abs() for row in self.rows]
        self.steepness = torch.stack([d @ h for d in differences]) * factor + _TINY
        self.reach = torch.stack([d.sum(1) for d in differences]) * factor
        self.semantics, self.arithmetic = semantics, arithmetic
        self.ball_error = self._ball_error(None if semantics == "real" else arithmetic)
        self.body = LipschitzBound(value=float(h.max()), norm=math.inf, proof="comparison")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Certificate:
        """Certify images `(n, c, h, w)` in [0, 1], float32 or float64: labels, and l-infinity radii rounded down.

        Ties, margins within the errors and non-finite logits get radius 0.

        Raises:
            DataError: if the images are not of that form.
        """
        check_images(images, self.network.input_shape)
        count = len(images)
        with torch.autocast(images.device.type, enabled=False):
            x = whole_blocks(images.double())
            z = self.network.features(x)
            logits = self.network.head(z)
            v = self.stored.injection(x)
            z, v, logits = z[:count].view_as(v[:count]), v[:count], logits[:count]
            labels = logits.argmax(dim=1)
            centre = self._centre_error(z, v)
            error = self._margin_error(z, centre, labels)
            margin = logits.gather(1, labels[:, None]) - logits
            ratio = tensor_down(tensor_down(tensor_down(margin) - error) / self.steepness[labels])
            ratio.scatter_(1, labels[:, None], math.inf)
            radius, rival = ratio.min(dim=1)
            radius = radius.clamp(max=LARGEST_RADIUS)
            proved = torch.isfinite(logits).all(dim=1) & (radius > 0)
            radius = torch.where(proved, radius, 0.0)
            radius = self._grow(z, v, centre, labels, radius)
        rival = rival[:, None]
        return Certificate(
            label=labels,
            radius=radius,
            margin=torch.nan_to_num(margin.gather(1, rival).squeeze(1)),
            slack=torch.nan_to_num(error.gather(1, rival).squeeze(1)),
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
        """Return the evidence for `certificate.json`, for both semantics; an arithmetic without a bound is left out."""
        iteration = self.stored.iteration
        bounds = ((name, layer.lipschitz_bound()) for name, layer in self.network.named_layers())
        layers = layer_evidence((name, bound) for name, bound in bounds if bound.norm == math.inf)
        ball = {"real": self._ball_error(None).tolist()}
        for arithmetic in ARITHMETIC:
            with contextlib.suppress(UnsoundError):
                ball[arithmetic] = self._ball_error(arithmetic).tolist()
        return {
            "kind": "deterministic",
            "semantics": ["real", "deployed"],
            "certificate": "per image: the largest eps tried for which boxes around the solution prove the label; at least "
            "min_j (y_y - y_j - E) / steepness[y][j], E = head_reach[y][j] * centre error + rounding of both "
            "logits + ball_error[real, or the arithmetic of the deployed program][y][j]",
            "lipschitz": {
                "bound": self.body.value,
                "proof": self.body.proof,
                "statement": PROOFS[self.body.proof],
            },
            "implicit": {
                "layers": layers,
                "measure": iteration.measure,
                "step": iteration.step,
                "steps": iteration.count,
                "left": iteration.left,
                "sensitivity": [self.stored.sensitivity.min().item(), self.body.value],
            },
            "steepness": self.steepness.tolist(),
            "head_reach": self.reach.tolist(),
            "ball_error": ball,
            "largest_radius": LARGEST_RADIUS,
            "arithmetic": "float64",
        }

    def _ball_error(self, arithmetic: str | None) -> Tensor:
        """Bound, for every point of a ball, what separates the margins from those of the solution, shape `(k, k)`.

        Args:
            arithmetic: in which they are executed, or None for exact arithmetic: then it is the number of steps alone.
        """
        stored, iteration = self.stored, self.stored.iteration
        largest = 1.0 + LARGEST_RADIUS
        injected = float((stored.forcing * largest + stored.shift).max()) * _UP
        if arithmetic is None:
            distance = iteration.left * injected / iteration.gap * _UP
            return self.reach * (distance * _UP) * _UP
        dtype = ARITHMETIC[arithmetic]
        unit = UNIT_ROUNDOFF[dtype]
        if stored.matrix.dim() == 4:
            refuse_fast_convolution(stored.matrix.device, dtype)
        # The program solves the equation for the v that it has computed.
        wrong = float(stored.injection_error(largest, unit).max())
        injected = (injected + wrong) * _UP
        solution = injected / iteration.gap * _UP
        rows = float(stored.matrix.abs().flatten(1).sum(1).max()) * _UP
        # No iterate from 0 exceeds `solution`. Where no computed one exceeds Z, a step rounds off at most
        # alpha rounding ((rows + 2) Z + injected) + 2 unit Z, and all steps together 1 / (alpha gap) times that: their error e
        # obeys e <= grown Z + added with Z = solution + e.
        rounding, rate = gamma(stored.terms + 8, unit), _UP / (iteration.step * iteration.gap)
        grown = (rounding * (rows + 2) / iteration.gap + 2 * unit * rate) * _UP
        added = (rounding * injected / iteration.gap + UNDERFLOW[unit] * rate) * _UP
        if grown > 0.5:
            raise UnsoundError(
                f"a program in {arithmetic} cannot be certified: the rounding errors of the implicit layer's steps may grow; "
                "deploy in float64"
            )
        steps = (grown * solution + added) / (1 - grown) * _UP
        size = (solution + steps) * _UP
        if (rows + 2) * size + injected > LARGEST[unit]:
            raise UnsoundError(
                f"a program in {arithmetic} may overflow; deploy in float64, or check the weights"
            )
        distance = (iteration.left * solution + wrong / iteration.gap + steps) * _UP
        logit = self.rows.abs().sum(1) * size + self.network.head.bias.detach().abs()
        both = logit[:, None] + logit
        return (
            self.reach * distance + gamma(self.rows.shape[1] + 4, unit) * both + 2 * UNDERFLOW[unit]
        ) * _UP

    def _centre_error(self, z: Tensor, v: Tensor) -> Tensor:
        """Bound `||z - z*||_inf` for what was computed for each image, `(n,)`, from what is left of its equation."""
        stored = self.stored
        residual = (z - torch.relu(stored.implicit.product(z, stored.matrix) + v)).abs()
        size = stored.implicit.product(z.abs(), stored.matrix.abs()) + v.abs() + z.abs()
        rounding = gamma(stored.terms + 8, _U) * size + stored.injection_error(1.0, _U)
        return ((residual + rounding) * _UP + _TINY).flatten(1).amax(1) / stored.iteration.gap * _UP

    def _margin_error(self, z: Tensor, centre: Tensor, labels: Tensor) -> Tensor:
        """Bound what the computed margins at the image may lack of those in the ball, `(n, k)`."""
        size = z.abs().flatten(1) @ self.rows.abs().mT + self.network.head.bias.abs()
        both = size.gather(1, labels[:, None]) + size
        rounding = gamma(self.rows.shape[1] + 8, _U) * both
        return (self.reach[labels] * centre[:, None] + rounding + self.ball_error[labels]) * _UP + _TINY

    def _grow(self, z: Tensor, v: Tensor, centre: Tensor, labels: Tensor, radius: Tensor) -> Tensor:
        """Raise the pairwise radius: double it while boxes prove that, then bisect; every radius returned was proved."""
        proved = radius.clone()
        todo = (radius > 0).nonzero().squeeze(1)
        z, v, centre, labels = z[todo], v[todo], centre[todo], labels[todo]
        low, high = radius[todo], torch.full_like(radius[todo], math.inf)
        for _ in range(DOUBLINGS):
            growing = (high == math.inf).nonzero().squeeze(1)
            if not len(growing):
                break
            eps = (2 * low[growing]).clamp_max(LARGEST_RADIUS)
            holds = self._holds(z[growing], v[growing], centre[growing], labels[growing], eps)
            low[growing] = torch.where(holds, eps, low[growing])
            high[growing] = torch.where(holds, math.inf, eps)
        high = torch.where(high == math.inf, low, high)
        for _ in range(BISECTIONS):
            eps = (low + high) / 2
            holds = self._holds(z, v, centre, labels, eps)
            low, high = torch.where(holds, eps, low), torch.where(holds, high, eps)
        proved[todo] = low
        return proved

    def _holds(self, z: Tensor, v: Tensor, centre: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        """Return whether no point of the closed ball of `eps (n,)` around each image gets another label."""
        lower, upper = (side.flatten(1) for side in self.box(z, v, centre, eps))
        middle = (lower + upper) / 2
        half = tensor_up(torch.maximum(upper - middle, middle - lower))
        bias = self.network.head.bias
        relative = gamma(self.rows.shape[1] + 12, _U)
        holds = torch.ones(len(z), dtype=torch.bool, device=z.device)
        for rival in range(len(self.rows)):
            difference = self.rows[labels] - self.rows[rival]
            least = (difference * middle - difference.abs() * half).sum(1) + (bias[labels] - bias[rival])
            size = (difference.abs() * (middle.abs() + half)).sum(1) + bias[labels].abs() + bias[rival].abs()
            error = (relative * size + self.ball_error[labels, rival]) * _UP + _TINY
            holds &= (least > error) | (labels == rival)
        return holds

    def box(self, z: Tensor, v: Tensor, centre: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the corners of a box that holds `z*(x')` for every x' within eps of the image.

        Args:
            z: computed for each image, `(n, ...)`.
            v: `B x + b` computed for each image.
            centre: bound on `||z - z*||_inf`, `(n,)`.
            eps: `(n,)`.
        """
        stored, wide = self.stored, [-1] + [1] * (z.dim() - 1)
        reach, relative = eps.view(wide), gamma(stored.terms + 8, _U)
        width = (stored.sensitivity * reach + centre.view(wide)) * _UP
        lower, upper = tensor_down(z - width).clamp_min(0.0), tensor_up(z + width)
        spread_v = (stored.forcing * reach + stored.injection_error(1.0, _U) + relative * v.abs()) * _UP
        for _ in range(BOX_STEPS):
            middle = (lower + upper) / 2
            half = tensor_up(torch.maximum(upper - middle, middle - lower))
            sums = stored.implicit.product(middle, stored.rest) + v
            # `relative` of the sizes is the error of the sums above; the factor that of the spread itself.
            spread = stored.implicit.product(half + relative * upper, stored.sizes) + spread_v
            spread = spread * add_up(1.0, gamma(2 * stored.terms + 32, _U)) + _TINY
            low, high = tensor_down(sums - spread).clamp_min(0.0), tensor_up(sums + spread).clamp_min(0.0)
            lower = torch.maximum(lower, low / stored.room / _UP)
            upper = torch.minimum(upper, high / stored.room * _UP)
        return lower, upper
