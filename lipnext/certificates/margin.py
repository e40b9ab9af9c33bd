"""The global margin certificate: all rivals, proved bounds, rounding included.

For a network `f = W g + c` whose body `g` has a proved l2 bound `K`, the label `y` cannot change within

    r(x) = min_{j != y} (f_y(x) - f_j(x) - E_yj) / (K ||w_y - w_j||)

where `E_yj` bounds the floating-point error of the computed margin in float64 (soundness analysis 5.4).

Semantics `real`: the statement is about the real-arithmetic network with exactly the stored weights, on the closed ball
around the stored image. Semantics `deployed`: it is about the program that evaluates the stored weights in float64 or
float32, with any order of summation, at every point of the ball that this type represents; `E_yj` then also holds the error
of that evaluation at *every* point of the ball. Radii are at most `sqrt(n)`, n the number of inputs, so that no point of the
ball is longer than `2 sqrt(n)`; the error is bounded for inputs of that norm.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.core.bound import LipschitzBound, layer_evidence
from lipnext.core.certificate import Certificate, Semantics, check_semantics
from lipnext.core.errors import UnsoundError
from lipnext.core.files import sha256_tensors
from lipnext.core.guard import check_images
from lipnext.core.network import LinearHead, LipschitzNetwork
from lipnext.core.propagation import norm_up
from lipnext.core.rounding import (
    ARITHMETIC,
    UNIT_ROUNDOFF,
    RoundingState,
    add_up,
    gamma,
    mul_up,
    sqrt_up,
    tensor_down,
    tensor_up,
)

_U = UNIT_ROUNDOFF[torch.float64]
BLOCK = 8
"""Images are evaluated in whole blocks, filled up with zeros: a matrix product of few rows adds in another order."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything a margin is divided by or reduced by, proved once for a network.

    Attributes:
        layers: each layer of the body with its bound.
        body: K, the product of the layers' bounds, rounded up.
        distances: `||w_i - w_j||` of the stored rows, rounded up, shape `(k, k)`, float64.
        margin_error: bound on the float64 error of the margin between i and j for any image in [0, 1], shape `(k, k)`.
        feature_norm: bound on the norm of the features for any image in [0, 1].
        feature_error: bound on the l2 error of the features computed in float64.
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
            network, LinearHead, "lipnext.nn.head.UnitRowHead", semantics, arithmetic
        )
        self.evidence = prove(self.network)
        self.semantics, self.arithmetic = semantics, arithmetic
        self.error = self.evidence.margin_error
        self.largest_radius = math.inf
        if semantics == "deployed":
            self.error = tensor_up(self.error + ball_error(self.network, self.evidence.distances, arithmetic))
            self.largest_radius = longest_deployed_radius(self.network)

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
            logits = self.network(whole_blocks(images.double()))[: len(images)]
        labels = logits.argmax(dim=1)
        margin = logits.gather(1, labels[:, None]) - logits
        error = self.error.to(logits.device)[labels]
        # Every step rounds towards a smaller radius: numerator down, denominator up, quotient down.
        numerator = tensor_down(margin - error)
        ratio = tensor_down(numerator / self._denominator().to(logits.device)[labels])
        ratio.scatter_(1, labels[:, None], math.inf)
        radius, rival = ratio.min(dim=1)
        radius = radius.clamp(max=self.largest_radius)
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
            semantics=self.semantics,
            arithmetic=self.arithmetic,
            lipschitz=self.evidence.body,
            rival=rival.squeeze(1),
            model_sha256=self.model_sha256,
        )

    def describe(self) -> dict[str, Any]:
        """Return the evidence for `certificate.json`, for both semantics; an arithmetic without a bound is left out."""
        evidence, tables = self.evidence, {}
        for arithmetic in ARITHMETIC:
            with contextlib.suppress(UnsoundError):
                tables[arithmetic] = ball_error(self.network, evidence.distances, arithmetic).tolist()
        return {
            "kind": "deterministic",
            "semantics": ["real", "deployed"],
            "certificate": "r = min_j (f_y - f_j - E[y][j]) / (lipschitz.bound * head_distances[y][j]), "
            "E = margin_error, and for deployed margin_error + ball_error[arithmetic]",
            "lipschitz": {"bound": evidence.body.value, "proof": evidence.body.proof},
            "layers": layer_evidence(evidence.layers),
            "head_distances": evidence.distances.tolist(),
            "margin_error": evidence.margin_error.tolist(),
            "ball_error": tables,
            "feature_norm": evidence.feature_norm,
            "feature_error": evidence.feature_error,
            "arithmetic": "float64",
        }

    def _denominator(self) -> Tensor:
        """`K ||w_i - w_j||`, rounded up; a floor keeps the radius finite for rows that coincide."""
        product = self.evidence.body.value * self.evidence.distances
        return tensor_up(product).clamp_min(1e-30)


def freeze(
    network: nn.Module, head: type, example: str, semantics: Semantics, arithmetic: str
) -> tuple[LipschitzNetwork, str]:
    """Return the materialised network in float64, and the hash of its weights in their own dtype.

    Args:
        network: to be certified.
        head: what its head must be.
        example: where there is one.
        semantics: as for `MarginCertifier`.
        arithmetic: as for `MarginCertifier`.

    Raises:
        UnsoundError: if the network is of another kind, or the semantics does not speak of the arithmetic.
    """
    check_semantics(semantics, arithmetic)
    if not isinstance(network, LipschitzNetwork):
        raise UnsoundError(
            f"the margin certificate needs a LipschitzNetwork, got a {type(network).__name__}; "
            "build it from layers of lipnext.nn"
        )
    if not isinstance(network.head, head):
        raise UnsoundError(
            f"the margin certificate needs a {head.__name__}, got a {type(network.head).__name__}; use {example}"
        )
    frozen = network.materialise()
    if arithmetic not in ARITHMETIC:
        raise UnsoundError(
            f"a program in {arithmetic} cannot be certified; deploy in one of {', '.join(ARITHMETIC)}"
        )
    if arithmetic == "float32" and any(p.dtype != torch.float32 for p in frozen.parameters()):
        raise UnsoundError(
            "a program in float32 needs weights stored in float32, got float64 ones; store net.float() or "
            "deploy in float64"
        )
    sha256 = sha256_tensors(frozen.state_dict())
    return frozen.double(), sha256


def prove(network: LipschitzNetwork) -> Evidence:
    """Prove the constants of a materialised float64 network.

    Raises:
        UnsoundError: as `MarginCertifier`.
    """
    layers = tuple((name, layer.lipschitz_bound()) for name, layer in network.named_layers())
    body = LipschitzBound.compose(*(bound for _, bound in layers))
    distances = head_distances(network.head.weight)
    state, errors = _evaluation_errors(network, distances, longest_image(network), _U)
    return Evidence(
        layers=layers,
        body=body,
        distances=distances,
        margin_error=errors,
        feature_norm=state.norm,
        feature_error=state.error,
    )


def ball_error(network: LipschitzNetwork, distances: Tensor, arithmetic: str) -> Tensor:
    """Bound the error of the executed margins for any input up to twice as long as an image, shape `(k, k)`.

    Args:
        network: materialised, float64.
        distances: `head_distances` of its head.
        arithmetic: a key of `ARITHMETIC`, in which the program runs.

    Raises:
        UnsoundError: if there is no bound.
    """
    longest = 2 * longest_image(network)
    return _evaluation_errors(network, distances, longest, UNIT_ROUNDOFF[ARITHMETIC[arithmetic]])[1]


def _evaluation_errors(
    network: LipschitzNetwork, distances: Tensor, longest: float, unit: float
) -> tuple[RoundingState, Tensor]:
    """Return norm and error of the features, and the error of the margins, for inputs of norm at most `longest`."""
    state = network.rounding(RoundingState(norm=longest, error=0.0, unit=unit))
    return state, margin_errors(network.head.weight, network.head.bias, state, distances)


def longest_image(network: LipschitzNetwork) -> float:
    """Bound the norm of an image: images lie in [0, 1]^n."""
    return sqrt_up(float(math.prod(network.input_shape)))


def longest_deployed_radius(network: LipschitzNetwork) -> float:
    """The largest radius of which a deployed certificate speaks: up to it, no input is longer than two images."""
    return math.sqrt(math.prod(network.input_shape)) * (1 - 2.0**-50)


def head_distances(rows: Tensor) -> Tensor:
    """Return `||w_i - w_j||` of stored rows `(k, c)`, each rounded up, shape `(k, k)`, float64.

    Differences are formed first (`2 - 2 <w_i, w_j>` would cancel). Each difference, square and the sum of `c` of them and
    the root are covered by `gamma_(c + 6)`.
    """
    w = rows.detach().double()
    distance = torch.stack([(w - row).square().sum(-1).sqrt() for row in w])  # row by row: K x C at a time
    factor = add_up(1.0, gamma(w.shape[1] + 6, _U))
    rounded = tensor_up(distance * factor)
    rounded.fill_diagonal_(0.0)
    return rounded


def margin_errors(rows: Tensor, bias: Tensor, state: RoundingState, distances: Tensor) -> Tensor:
    """Bound the error of `f_i - f_j`: the features' error seen by `w_i - w_j`, and the rounding of both logits.

    A logit has `c` products and one addition, and the margin one subtraction, relative to terms of size at most
    `||w_k|| ||g|| + |c_k|`: together below `gamma_(c + 2)`.
    """
    channels = rows.shape[1]
    size = add_up(state.norm, state.error)
    rounding = gamma(channels + 2, state.unit)
    logit = torch.tensor(
        [
            mul_up(rounding, add_up(mul_up(norm_up(row), size), abs(float(constant))))
            for row, constant in zip(rows.detach(), bias.detach(), strict=True)
        ],
        dtype=torch.float64,
    )
    rounded = tensor_up(tensor_up(logit.unsqueeze(1) + logit) + state.underflow)
    table = tensor_up(tensor_up(distances.cpu() * state.error) + rounded)
    if not bool(torch.isfinite(table).all()):
        raise UnsoundError(
            "the head holds NaN, infinity or numbers that overflow; nothing can be proved about it"
        )
    return table


def whole_blocks(images: Tensor) -> Tensor:
    """Fill up to a multiple of `BLOCK`, so that an image alone gets the same last bit as in a large batch."""
    missing = -len(images) % BLOCK
    return images if missing == 0 else torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
