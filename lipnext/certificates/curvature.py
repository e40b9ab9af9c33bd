"""The curvature certificate (CRC) for a last layer with one hidden layer: all rivals, proved curvatures, rounding included.

Let `f` be the margin of the label over one rival as a function of the features, whose Hessian is nowhere below `-m`. At any
point p, with `F = f(p)` and `G` its gradient there, `f(p + e) >= F + G e - m |e|^2 / 2`. So f is positive inside the ball with
centre `p + G / m` and radius `sqrt(|G|^2 + 2 m F) / m`, and the features h are at least

    R(p) = (2 F - 2 G d - m |d|^2) / (sqrt(|G|^2 + 2 m F) + |G + m d|),    d = p - h,

away from the rival. `R(h)` is the closed form of Singla & Feizi (NeurIPS 2022, theorem 2). For other points it is the value of
their dual problem, maximised over the multiplier in `[0, 1/m)`, with the residual of a point that is not stationary paid for by
strong convexity: their tight certificate without the claim that it was solved. Every p proves a radius, so the points may
come from any search; here from the linearised boundary, `d <- -eta G`, `eta = min((F - G d) / |G|^2, 1/m)`. For each rival the
largest R(p) counts, over the rivals the smallest, and the body's constant K carries it to the image: `r = (min R - e) / K`, e
the error of the computed features.

`m = |U^T diag(max(-w, 0)) U| / 4` for the hidden weight U and the difference w of two rows is bounded from above for each pair
of classes. F and G are computed in float64 with running error bounds. They rest on the library's exponential and logarithm: the
assumption is that torch's `exp` and `log1p` are right to within 4 units in the last place, 8 u. Then softplus is off by at
most `8 u + 8 u (log 2 + max(t, 0))` and the logistic function by less, of which `16 u (1 + |t|)` and 16 u are allowed for.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipnext.bounds.factor import factor_bound
from lipnext.bounds.spectral import absolute_norm_bound
from lipnext.certificates.margin import (
    freeze,
    head_distances,
    longest_deployed_radius,
    longest_image,
    margin_errors,
    whole_blocks,
)
from lipnext.core.bound import LipschitzBound, layer_evidence
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.errors import UnsoundError
from lipnext.core.guard import check_images
from lipnext.core.network import SOFTPLUS_THRESHOLD, SoftplusHead
from lipnext.core.rounding import (
    ARITHMETIC,
    UNIT_ROUNDOFF,
    RoundingState,
    add_up,
    gamma,
    mul_up,
    tensor_down,
    tensor_up,
)

_U = UNIT_ROUNDOFF[torch.float64]
RIVALS = 9
"""Of which more than one point is tried, those with the smallest radii in closed form."""
POINTS = 8
"""Tried for each of them, beside the features themselves."""
_CHUNK = 2**22  # numbers in a tensor of points at once
_TINY = 1e-290  # covers every underflow


class CurvatureCertifier:
    """Certifies batches of images with a network frozen at construction, whose head is a `SoftplusHead`.

    Args:
        network: the trained network; it is copied and may change afterwards.
        semantics: what the certificate speaks of, "real" arithmetic or the "deployed" program.
        arithmetic: of the deployed program, "float64" or "float32"; float32 needs weights stored in float32.

    Raises:
        UnsoundError: if a layer is unknown, a weight is not finite, a bound cannot be proved, or the semantics does not
            speak of the arithmetic.
    """

    def __init__(
        self, network: nn.Module, semantics: Semantics = "real", arithmetic: str = "float64"
    ) -> None:
        self.network, self.model_sha256 = freeze(
            network, SoftplusHead, "lipnext.nn.curvature_head.CurvatureHead", semantics, arithmetic
        )
        head = self.network.head
        assert isinstance(head, SoftplusHead)
        self.head: SoftplusHead = head
        self.layers = tuple((name, layer.lipschitz_bound()) for name, layer in self.network.named_layers())
        self.body = LipschitzBound.compose(*(bound for _, bound in self.layers))
        self.curvatures = curvature_bounds(head)
        self.absolute = absolute_norm_bound(head.inner)
        self.features = self._state(longest_image(self.network), _U)
        self.semantics, self.arithmetic = semantics, arithmetic
        classes = len(head.bias)
        self.ball_error = torch.zeros(classes, classes, dtype=torch.float64)
        self.largest_radius = math.inf
        if semantics == "deployed":
            self.ball_error = self._ball_error(arithmetic)
            self.largest_radius = longest_deployed_radius(self.network)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Certificate:
        """Certify images `(n, c, h, w)` in [0, 1], float32 or float64: labels, and radii rounded down.

        Ties, margins within the rounding error and non-finite logits get radius 0.

        Raises:
            DataError: if the images are not of that form: the error bounds hold for images in [0, 1] alone.
        """
        check_images(images, self.network.input_shape)
        with torch.autocast(images.device.type, enabled=False):
            features = self.network.features(whole_blocks(images.double()))
            logits = self.head(features)[: len(images)]
        features = features[: len(images)]
        labels = logits.argmax(dim=1)
        size = max(1, _CHUNK // (len(self.head.bias) * max(self.head.inner.shape)))
        parts = [
            self._around(h, y) for h, y in zip(features.split(size), labels.split(size), strict=True)
        ] or [self._around(features, labels)]
        reach, rival = (torch.cat(column) for column in zip(*parts, strict=True))
        nearest = self._pairs(features, labels, rival)
        value, error, length = nearest.margin(features)
        radius = tensor_down(tensor_down(reach - self.features.error) / max(self.body.value, 1e-30))
        radius = radius.clamp(max=self.largest_radius)
        proved = torch.isfinite(logits).all(dim=1) & torch.isfinite(radius) & (radius > 0)
        return Certificate(
            label=labels,
            radius=torch.where(proved, radius, 0.0),
            margin=torch.nan_to_num(value),
            slack=torch.nan_to_num(
                tensor_up(error + tensor_up(length * self.features.error)) + nearest.deduction
            ),
            norm=2.0,
            kind="deterministic",
            confidence=1.0,
            semantics=self.semantics,
            arithmetic=self.arithmetic,
            lipschitz=self.body,
            rival=rival,
            per_image=True,
            model_sha256=self.model_sha256,
        )

    def describe(self) -> dict[str, Any]:
        """Return the evidence for `certificate.json`, for both semantics; an arithmetic without a bound is left out."""
        tables = {}
        for arithmetic in ARITHMETIC:
            try:
                tables[arithmetic] = self._ball_error(arithmetic).tolist()
            except UnsoundError:
                continue
        return {
            "kind": "deterministic",
            "semantics": ["real", "deployed"],
            "certificate": "per image: r = (min_j max_p R_j(p) - feature_error) / lipschitz.bound, "
            "R_j(p) = (2 F - 2 G d - m d^2) / (sqrt(G^2 + 2 m F) + |G + m d|), d = p - features, "
            "F = (f_y - f_j)(p), less ball_error[arithmetic][y][j] for deployed, G its gradient, m = curvatures[y][j]",
            "lipschitz": {"bound": self.body.value, "proof": self.body.proof},
            "layers": layer_evidence(self.layers),
            "curvatures": self.curvatures.tolist(),
            "points": {"rivals": RIVALS, "each": POINTS},
            "assumption": "exp and log1p of torch are right to within 4 units in the last place",
            "ball_error": tables,
            "feature_norm": self.features.norm,
            "feature_error": self.features.error,
            "arithmetic": "float64",
        }

    def _around(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each sample a radius in which no rival reaches the label, float64 (n,), and the nearest rival."""
        n, classes = len(features), len(self.head.bias)
        rivals = torch.arange(classes, device=labels.device).expand(n, -1)
        every = self._pairs(
            features.repeat_interleave(classes, 0), labels.repeat_interleave(classes), rivals.flatten()
        )
        reach = every.radius(every.centres)[0].view(n, classes)
        reach = reach.scatter(1, labels[:, None], math.inf)
        chosen = reach.topk(min(RIVALS, classes - 1), dim=1, largest=False).indices
        count = chosen.shape[1]
        near = self._pairs(
            features.repeat_interleave(count, 0), labels.repeat_interleave(count), chosen.flatten()
        )
        reach = reach.scatter(1, chosen, near.search().view(n, count))
        nearest, rival = reach.min(dim=1)
        return nearest, rival

    def _pairs(self, features: Tensor, labels: Tensor, rivals: Tensor) -> "_Pairs":
        head, device = self.head, features.device
        return _Pairs(
            centres=features,
            inner=head.inner,
            inner_bias=head.inner_bias,
            rows=head.weight[labels] - head.weight[rivals],
            shift=head.bias[labels] - head.bias[rivals],
            curvature=self.curvatures.to(device)[labels, rivals],
            deduction=self.ball_error.to(device)[labels, rivals],
            absolute=self.absolute,
        )

    def _state(self, longest: float, unit: float) -> RoundingState:
        """Norm and error of the features for inputs of norm at most `longest`."""
        return self.network.rounding(RoundingState(norm=longest, error=0.0, unit=unit))

    def _ball_error(self, arithmetic: str) -> Tensor:
        """Bound the error of the executed margins for any input up to twice as long as an image, shape `(k, k)`."""
        state = self._state(2 * longest_image(self.network), UNIT_ROUNDOFF[ARITHMETIC[arithmetic]])
        hidden = self.head.hidden_rounding(state)
        return margin_errors(self.head.weight, self.head.bias, hidden, head_distances(self.head.weight))


@dataclass(frozen=True)
class _Pairs:
    """N margins `f = w . softplus(U p + a) + c` of a label over a rival, each around its own centre; all float64.

    The differences `w` and `c` of stored numbers are rounded once. Sums have at most `terms` terms in all, and what is computed
    from numbers that are not negative is too small by less than the factor `grow`.

    Attributes:
        centres: computed features `(N, C)`, taken as exact.
        inner: U `(m, C)`.
        inner_bias: a `(m,)`.
        rows: w `(N, m)`.
        shift: c `(N,)`.
        curvature: m, `(N,)`, from above.
        deduction: what the margin must exceed `(N,)`.
        absolute: bound on the norm of |U|.
    """

    centres: Tensor
    inner: Tensor
    inner_bias: Tensor
    rows: Tensor
    shift: Tensor
    curvature: Tensor
    deduction: Tensor
    absolute: float

    @property
    def relative(self) -> float:
        """Relative error of a sum of products over channels or hidden units, with a few operations more."""
        return gamma(sum(self.inner.shape) + 32, _U)

    @property
    def grow(self) -> float:
        """Above 1 by more than the error of anything that is computed from errors, norms and sizes."""
        return 1.0 + 8 * self.relative

    def evaluate(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return F `(N,)`, a bound on its error, G `(N, C)` and a bound on its l2 error `(N,)` at `points (N, C)`."""
        relative, grow, weight = self.relative, self.grow, self.rows.abs()
        t = functional.linear(points, self.inner, self.inner_bias)
        off = relative * functional.linear(points.abs(), self.inner.abs(), self.inner_bias.abs()) * grow
        soft, slope = functional.softplus(t, threshold=SOFTPLUS_THRESHOLD), torch.sigmoid(t)
        soft_error = off + 16 * _U * (1.0 + t.abs())
        slope_error = off / 4 + 16 * _U
        value = (self.rows * soft).sum(1) + self.shift
        value_error = (
            relative * ((weight * soft).sum(1) + self.shift.abs()) + (weight * soft_error).sum(1)
        ) * grow
        gradient = (self.rows * slope) @ self.inner
        spread = torch.linalg.vector_norm(weight * (relative * slope + slope_error), dim=1)
        return value, value_error + _TINY, gradient, self.absolute * spread * grow + _TINY

    def margin(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return F, a bound on its error, and a bound on the length of G."""
        value, error, gradient, gradient_error = self.evaluate(points)
        return value, error, (torch.linalg.vector_norm(gradient, dim=1) + gradient_error) * self.grow

    def radius(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return R(p) rounded down `(N,)`, at most 0 where nothing is proved, and a point near the boundary `(N, C)`."""
        relative, grow, m = self.relative, self.grow, self.curvature
        value, value_error, gradient, gradient_error = self.evaluate(points)
        value = value - self.deduction
        value_error = value_error + _U * value.abs()
        d = points - self.centres
        along, square = (gradient * d).sum(1), d.square().sum(1)
        steep, far = torch.linalg.vector_norm(gradient, dim=1), square.sqrt()
        # Every term with its error, then the error of adding them.
        errors = value_error + gradient_error * far + relative * (steep * far + m * square)
        errors = errors + 6 * _U * (value.abs() + along.abs() + m * square)
        above = 2 * value - 2 * along - m * square - 2 * grow * errors - _TINY
        bent = torch.linalg.vector_norm(gradient + m[:, None] * d, dim=1)
        longest = steep + gradient_error
        root = torch.sqrt(longest.square() + 2 * m * (value + value_error).clamp_min(0.0))
        below = (root + bent + gradient_error + relative * (steep + m * far) + _TINY) * grow
        found = torch.where(above > 0, above / (below * grow), above)
        # The next point: on the linearised boundary, if strong convexity allows to go as far.
        eta = torch.minimum((value - along) / steep.square().clamp_min(1e-30), 0.999 / m.clamp_min(1e-30))
        return torch.nan_to_num(found, nan=-math.inf), self.centres - eta[:, None] * gradient

    def search(self) -> Tensor:
        """Return the largest R(p) of the centre and `POINTS` further points, `(N,)`."""
        best, points = self.radius(self.centres)
        for _ in range(POINTS):
            found, points = self.radius(points)
            best = torch.maximum(best, found)
        return best


def curvature_bounds(head: SoftplusHead) -> Tensor:
    """Bound `m_ij = ||U^T diag(max(v_j - v_i, 0)) U|| / 4` from above for all pairs of classes, shape `(K, K)`, float64.

    It is `||diag(sqrt(max(v_j - v_i, 0))) U||^2 / 4`. The entries of that matrix have a relative error below 4 u, a difference,
    a root and a product, which adds at most `gamma_4` times its Frobenius norm to the norm, and that is at most the root of its
    smaller side times the norm.

    Raises:
        UnsoundError: if a weight holds NaN or infinity.
    """
    inner, weight = head.inner.detach().double(), head.weight.detach().double()
    entries = add_up(1.0, mul_up(gamma(5, _U), math.sqrt(min(inner.shape)) + 1.0))
    table = torch.zeros(len(weight), len(weight), dtype=torch.float64)
    for i, row in enumerate(weight):
        for j, other in enumerate(weight):
            if i != j:
                falling = (other - row).clamp_min(0.0).sqrt()[:, None] * inner
                norm = add_up(mul_up(factor_bound(falling).value, entries), _TINY)
                table[i, j] = mul_up(mul_up(norm, norm), 0.25)
    return table
