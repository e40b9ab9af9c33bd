"""The global margin certificate: all rivals, proved bounds, rounding included.

For a network `f = W g + c` whose body `g` has a proved l2 bound `K`, the label `y` cannot change within

    r(x) = min_{j != y} (f_y(x) - f_j(x) - E_yj) / (K ||w_y - w_j||)

where `E_yj` bounds the floating-point error of the computed margin in float64 (soundness analysis 5.4). Semantics `real`: the
statement is about the real-arithmetic network with exactly the stored weights, on the closed ball around the stored image.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.core.bound import PROOFS, LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.errors import UnsoundError
from lipnext.core.files import sha256_tensors
from lipnext.core.guard import check_images
from lipnext.core.network import LinearHead, LipschitzNetwork
from lipnext.core.propagation import norm_up
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState, add_up, gamma, mul_up, sqrt_up

_U = UNIT_ROUNDOFF[torch.float64]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything a margin is divided by or reduced by, proved once for a network.

    Attributes:
        layers: each layer of the body with its bound.
        body: K, the product of the layers' bounds, rounded up.
        distances: `||w_i - w_j||` of the stored rows, rounded up, shape `(k, k)`, float64.
        margin_error: `E_ij`, bound on the float64 error of the margin between i and j, shape `(k, k)`.
        feature_norm: bound on the norm of the features for any image in [0, 1].
        feature_error: bound on the l2 error of the computed features.
    """

    layers: tuple[tuple[str, LipschitzBound], ...]
    body: LipschitzBound
    distances: Tensor
    margin_error: Tensor
    feature_norm: float
    feature_error: float


class MarginCertifier:
    """Certifies batches of images with a network frozen at construction.

    The network is materialised (products and normalised rows formed once, in its own dtype), those weights are what
    the certificate speaks of, and everything is evaluated in float64.

    Args:
        network: the trained network; it is copied and may change afterwards.

    Raises:
        UnsoundError: if a layer is unknown, a weight is not finite, or a bound cannot be proved.
    """

    def __init__(self, network: nn.Module) -> None:
        if not isinstance(network, LipschitzNetwork):
            raise UnsoundError(
                f"the margin certificate needs a LipschitzNetwork, got a {type(network).__name__}; "
                "build it from layers of lipnext.nn"
            )
        if not isinstance(network.head, LinearHead):
            raise UnsoundError(
                f"the margin certificate needs a LinearHead, got a {type(network.head).__name__}; use "
                "lipnext.nn.head.UnitRowHead"
            )
        frozen = network.materialise()
        self.model_sha256 = sha256_tensors(frozen.state_dict())
        self.network = frozen.double()
        self.evidence = prove(self.network)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Certificate:
        """Certify images `(n, c, h, w)` in [0, 1], float32 or float64: labels, and radii rounded down.

        Ties, margins within the rounding error and non-finite logits get radius 0.

        Raises:
            DataError: if the images are not of that form: the error bounds hold for images in [0, 1] alone.
        """
        check_images(images, self.network.input_shape)
        # Layers may follow an autocast block around this call; the error bounds speak of float64.
        with torch.autocast(images.device.type, enabled=False):
            logits = self.network(images.double())
        labels = logits.argmax(dim=1)
        margin = logits.gather(1, labels[:, None]) - logits
        error = self.evidence.margin_error.to(logits.device)[labels]
        # Every step rounds towards a smaller radius: numerator down, denominator up, quotient down.
        numerator = _down(margin - error)
        ratio = _down(numerator / self._denominator().to(logits.device)[labels])
        ratio.scatter_(1, labels[:, None], math.inf)
        radius, rival = ratio.min(dim=1)
        proved = torch.isfinite(logits).all(dim=1) & (radius > 0)
        rival = rival[:, None]
        return Certificate(
            label=labels,
            radius=torch.where(proved, radius, 0.0),
            margin=torch.nan_to_num(margin.gather(1, rival).squeeze(1)),
            slack=error.gather(1, rival).squeeze(1),
            norm=2.0,
            kind="deterministic",
            confidence=1.0,
            semantics="real",
            lipschitz=self.evidence.body,
            model_sha256=self.model_sha256,
        )

    def describe(self) -> dict[str, Any]:
        """Return the evidence for `certificate.json`."""
        evidence = self.evidence
        return {
            "kind": "deterministic",
            "semantics": "real",
            "certificate": "r = min_j (f_y - f_j - margin_error[y][j]) / (lipschitz.bound * head_distances[y][j])",
            "lipschitz": {"bound": evidence.body.value, "proof": evidence.body.proof},
            "layers": [
                {"name": name, "bound": bound.value, "proof": bound.proof, "statement": PROOFS[bound.proof]}
                for name, bound in evidence.layers
            ],
            "head_distances": evidence.distances.tolist(),
            "margin_error": evidence.margin_error.tolist(),
            "feature_norm": evidence.feature_norm,
            "feature_error": evidence.feature_error,
            "arithmetic": "float64",
        }

    def _denominator(self) -> Tensor:
        """`K ||w_i - w_j||`, rounded up; a floor keeps the radius finite for rows that coincide."""
        product = self.evidence.body.value * self.evidence.distances
        return _up(product).clamp_min(1e-30)


def prove(network: LipschitzNetwork) -> Evidence:
    """Prove the constants of a materialised float64 network.

    Raises:
        UnsoundError: as `MarginCertifier`.
    """
    layers = tuple((name, layer.lipschitz_bound()) for name, layer in network.named_layers())
    body = LipschitzBound.compose(*(bound for _, bound in layers))
    # Images lie in [0, 1]^n, so their norm is at most sqrt(n).
    start = RoundingState(norm=sqrt_up(float(math.prod(network.input_shape))), error=0.0, unit=_U)
    state = network.rounding(start)
    distances = head_distances(network.head.weight)
    errors = _margin_errors(network.head.weight, network.head.bias, state, distances)
    return Evidence(
        layers=layers,
        body=body,
        distances=distances,
        margin_error=errors,
        feature_norm=state.norm,
        feature_error=state.error,
    )


def head_distances(rows: Tensor) -> Tensor:
    """Return `||w_i - w_j||` of stored rows `(k, c)`, each rounded up, shape `(k, k)`, float64.

    Differences are formed first (`2 - 2 <w_i, w_j>` would cancel). Each difference, square and the sum of `c` of them and
    the root are covered by `gamma_(c + 6)`.
    """
    w = rows.detach().double()
    distance = torch.stack([(w - row).square().sum(-1).sqrt() for row in w])  # row by row: K x C at a time
    factor = add_up(1.0, gamma(w.shape[1] + 6, _U))
    rounded = _up(distance * factor)
    rounded.fill_diagonal_(0.0)
    return rounded


def _margin_errors(rows: Tensor, bias: Tensor, state: RoundingState, distances: Tensor) -> Tensor:
    """Bound the error of `f_i - f_j`: the features' error seen by `w_i - w_j`, and the rounding of both logits.

    A logit has `c` products and one addition, and the margin one subtraction, relative to terms of size at most
    `||w_k|| ||g|| + |c_k|`: together below `gamma_(c + 2)`.
    """
    channels = rows.shape[1]
    size = add_up(state.norm, state.error)
    rounding = gamma(channels + 2, _U)
    logit = torch.tensor(
        [
            mul_up(rounding, add_up(mul_up(norm_up(row), size), abs(float(constant))))
            for row, constant in zip(rows.detach(), bias.detach(), strict=True)
        ],
        dtype=torch.float64,
    )
    table = _up(_up(distances.cpu() * state.error) + _up(logit.unsqueeze(1) + logit))
    if not bool(torch.isfinite(table).all()):
        raise UnsoundError(
            "the head holds NaN, infinity or numbers that overflow; nothing can be proved about it"
        )
    return table


def _up(tensor: Tensor) -> Tensor:
    return torch.nextafter(tensor, torch.full_like(tensor, math.inf))


def _down(tensor: Tensor) -> Tensor:
    return torch.nextafter(tensor, torch.full_like(tensor, -math.inf))
