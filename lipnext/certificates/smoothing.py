"""Randomised smoothing behind a left half with a proved bound: SPLITZ, and Cohen's certificate where the left half is empty.

Let f be the left half, in real arithmetic, h the right half as a program that first rounds its input to the grid of spacing
`s = sigma / 1024`, and `g(x) = argmax_c P[h(f(x) + noise) = c]`, noise ~ N(0, sigma^2 I). At a point z of the grid the votes
`h(z + noise)` are drawn without rounding error (`lipnext.certificates.noise`). N0 of them choose a class; N others, of which
n are for it, prove with confidence 1 - alpha that its probability is at least p (Clopper-Pearson), less what the drawn noise
may differ from a normal one. By Cohen et al. (2019), theorem 1, no point within `sigma Phi^-1(p)` of z has another class.
With z the grid point next to what float64 computes for f(x),

    R = max_gamma min((sigma Phi^-1(p) - ||z - f(x)||) / L(gamma), gamma)      (Zhong & Tandon, arXiv 2407.02811, theorem 1)

where `L(gamma)` bounds `||f(x') - f(x)|| / ||x' - x||` for all x' within gamma, and `||z - f(x)||` is at most the distance to
the grid plus the rounding error of f. The constant bound K of the whole left half is the case without a search. The left half
is evaluated once for each image.

The published code leaves the normalisation of images out of the radius, estimates L from below by five power iterations and
takes noise and radius from two settings. Here nothing is normalised, K is proved, and there is one sigma.
"""

import contextlib
import hashlib
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.bounds.binomial import majority_p_value, share_down, wrong_radii_up
from lipnext.bounds.normal import normal_quantile_down
from lipnext.certificates.local import LocalBody
from lipnext.certificates.margin import longest_image, whole_blocks
from lipnext.certificates.noise import LEVELS, TOTAL_VARIATION, rounded_normal
from lipnext.core.bound import LipschitzBound, layer_evidence
from lipnext.core.certificate import ABSTAIN, Certificate, Semantics
from lipnext.core.errors import UnsoundError
from lipnext.core.files import sha256_tensors
from lipnext.core.guard import check_images
from lipnext.core.rounding import (
    UNIT_ROUNDOFF,
    RoundingState,
    add_up,
    down,
    fraction_down,
    fraction_up,
    gamma,
    mul_up,
    tensor_down,
    tensor_up,
)
from lipnext.core.seed import generator
from lipnext.core.smoothed import SmoothedNetwork

_U = UNIT_ROUNDOFF[torch.float64]
NUMBERS = 2**18
"""Of a latent that are drawn and evaluated together; decides the memory. It depends on nothing that a caller chooses."""
BISECTIONS = 30
"""Of gamma: what is found is within 1e-9 of the largest gamma of the best."""


class SmoothingCertifier:
    """Certifies images by votes of a `SmoothedNetwork` frozen at construction; holds with confidence 1 - alpha for each image.

    The noise for an image follows from the network's seed and the image: it does not depend on the batch.

    Args:
        network: it is copied and may change afterwards.
        semantics: "real"; a deployed program would have to draw real noise.
        arithmetic: "float64", of the left half; the right half runs in the type of its weights.

    Raises:
        UnsoundError: for another network or semantics, or if a bound of the left half cannot be proved.
    """

    def __init__(
        self, network: nn.Module, semantics: Semantics = "real", arithmetic: str = "float64"
    ) -> None:
        if not isinstance(network, SmoothedNetwork):
            raise UnsoundError(
                f"smoothing needs a SmoothedNetwork, got a {type(network).__name__}; use the system's own certificate"
            )
        if semantics != "real" or arithmetic != "float64":
            raise UnsoundError(
                "a smoothed classifier is defined by real noise, and cannot be certified as a deployed program; use "
                "semantics real"
            )
        frozen = network.materialise()
        self.model_sha256 = sha256_tensors(frozen.state_dict())
        self.right = frozen.head
        self.network = network.materialise().double()
        self.layers = [(name, layer.lipschitz_bound()) for name, layer in self.network.named_layers()]
        self.body = LipschitzBound.compose(*(bound for _, bound in self.layers))
        self.local: LocalBody | None = None
        with contextlib.suppress(UnsoundError):  # a body of other layers has the constant bound alone
            self.local = LocalBody(self.network, dict(self.layers))
        image = RoundingState(norm=longest_image(self.network), error=0.0, unit=_U)
        self.latent_error = self.network.rounding(image).error
        like = next(self.network.parameters())
        blank = torch.zeros(1, *self.network.input_shape, dtype=torch.float64, device=like.device)
        self.latent_shape = self._latents(blank).shape[1:]
        # Of the probability of any event: what the noise that is drawn may differ by from the noise that is meant.
        self.variation = mul_up(TOTAL_VARIATION, float(self.latent_shape.numel()))
        self.confidence = fraction_down(1 - Fraction(self.network.alpha))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Certificate:
        """Certify images `(n, c, h, w)` in [0, 1], float32 or float64: labels or `ABSTAIN`, and radii rounded down.

        Raises:
            DataError: if the images are not of that form.
        """
        check_images(images, self.network.input_shape)
        columns: dict[str, list[Any]] = {"label": [], "rival": [], "latent": [], "slack": []}
        with torch.autocast(images.device.type, enabled=False):
            for image, latent in zip(images.double(), self._latents(images), strict=True):
                point, distance = self.grid_point(latent)
                label, rival, share = self._decide(image, point)
                columns["label"].append(label)
                columns["rival"].append(rival)
                columns["latent"].append(self.sigma_radius(share) if label != ABSTAIN else 0.0)
                columns["slack"].append(distance)
        device = images.device
        latent_radius, slack = (
            torch.tensor(columns[name], dtype=torch.float64, device=device) for name in ("latent", "slack")
        )
        room = tensor_down(latent_radius - slack).clamp_min(0.0)
        radius = combine(room, self.bound(images.double()), longest_image(self.network))
        return Certificate(
            label=torch.tensor(columns["label"], dtype=torch.int64, device=device),
            radius=radius,
            per_image=self.local is not None,
            margin=latent_radius,
            slack=slack,
            norm=2.0,
            kind="probabilistic",
            confidence=self.confidence,
            semantics="real",
            lipschitz=self.body,
            rival=torch.tensor(columns["rival"], dtype=torch.int64, device=device),
            model_sha256=self.model_sha256,
        )

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Return what g says, wrong with probability alpha at most for each image, int64 (n,), or `ABSTAIN` (Cohen's PREDICT).

        Raises:
            DataError: as `__call__`.
        """
        check_images(images, self.network.input_shape)
        labels = []
        for image, latent in zip(images.double(), self._latents(images), strict=True):
            votes = self.votes(
                self.grid_point(latent)[0], self._source(image, "predict"), self.network.samples
            )
            first, second = votes.topk(2).values.tolist()
            decided = majority_p_value(first, second) <= Decimal(self.network.alpha)
            labels.append(int(votes.argmax()) if decided else ABSTAIN)
        return torch.tensor(labels, dtype=torch.int64, device=images.device)

    def describe(self) -> dict[str, Any]:
        """Return the evidence for `certificate.json`, and what a reader has to assume."""
        net = self.network
        return {
            "kind": "probabilistic",
            "semantics": ["real"],
            "certificate": "r = max_gamma min((sigma Phi^-1(p) - slack) / L(gamma), gamma), L the bound of the left half "
            "within gamma of the image, at most lipschitz.bound; p the Clopper-Pearson bound at alpha of the share of "
            "samples votes for the class that selection other votes chose, less total_variation; p <= 1/2: abstained, "
            "radius 0; slack at most latent_error + grid / 2 * sqrt(numbers in the latent)",
            "local": self.local is not None,
            "confidence": self.confidence,
            "smoothing": {
                "sigma": net.sigma,
                "samples": net.samples,
                "selection": net.selection,
                "alpha": net.alpha,
                "seed": net.seed,
                "noise_at": "the latent, behind the layers below",
                "grid": self.spacing,
                "total_variation": self.variation,
                "latent": list(self.latent_shape),
            },
            "assumed": [
                "alpha is for each image; of n independent images about alpha n radii may be wrong",
                "the smoothed classifier is certified: the class that most of infinitely many noisy evaluations give",
                "the right half, in its own type, is a function of its input; it may round as it likes",
                "the bits of torch's Mersenne Twister, seeded by SHA-256 of seed and image, are independent and fair; who "
                "knows the seed can search for images on which the votes mislead, so draw a new one where that matters",
            ],
            "lipschitz": {"bound": self.body.value, "proof": self.body.proof},
            "layers": layer_evidence(self.layers),
            "latent_error": self.latent_error,
            "arithmetic": "float64",
        }

    @property
    def spacing(self) -> float:
        """Of the grid; exact, a power of two below sigma."""
        return self.network.sigma / LEVELS

    def bound(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """Return `gamma -> L(gamma)`, float64 (n,) to (n,): the constant, or less where units near an image cannot vary."""
        constant, local = self.body.value, self.local
        if local is None:
            return lambda gamma: torch.full_like(gamma, constant)
        hidden = local.hidden(images)
        return lambda gamma: tensor_up(local.reach(images, hidden, gamma) / gamma).clamp_max(constant)

    def grid_point(self, latent: Tensor) -> tuple[Tensor, float]:
        """Return the nearest point of the grid, in steps of it (int64), and a bound on its distance from the exact latent."""
        steps = (latent / self.spacing).round()
        if not bool((steps.abs() < 2**31).all()):
            raise UnsoundError("the latent is not finite or too large for its grid; check the weights")
        point = steps * self.spacing
        apart = point - latent
        # `point` and `apart` are rounded once in each component, the norm below gamma_(n + 4).
        rounding = mul_up(2 * _U, add_up(float(point.norm()), float(apart.norm())))
        norm = mul_up(float(apart.norm()), add_up(1.0, gamma(latent.numel() + 4, _U)))
        distance = add_up(add_up(norm, mul_up(2.0, rounding)), self.latent_error)
        return steps.long(), distance

    def votes(self, point: Tensor, source: torch.Generator, count: int) -> Tensor:
        """Evaluate the right half at a grid point with noise; return how often each class had the largest logit, int64 (K,).

        An evaluation that is not finite is a vote for no class.
        """
        like = next(self.right.parameters())
        largest = max(1, NUMBERS // point.numel())
        found = torch.zeros(len(self.right.bias) + 1, dtype=torch.int64)
        for start in range(0, count, largest):
            size = min(largest, count - start)
            noise = rounded_normal((size, *point.shape), source)
            steps = point.to(torch.int32) + noise.to(point.device, torch.int32)
            logits = self.right(steps.to(like.device, like.dtype) * self.spacing)
            classes = torch.where(logits.isfinite().all(1), logits.argmax(1), logits.shape[1])
            found += classes.bincount(minlength=len(found)).cpu()
        return found[:-1]

    def sigma_radius(self, share: float) -> float:
        """Return `sigma Phi^-1(share)` rounded down, the radius at the place of the noise."""
        return down(self.network.sigma * normal_quantile_down(share))

    def _decide(self, image: Tensor, point: Tensor) -> tuple[int, int, float]:
        """Return the class (or ABSTAIN), its strongest rival, and a lower bound on its probability."""
        net = self.network
        chosen = int(self.votes(point, self._source(image, "select"), net.selection).argmax())
        votes = self.votes(point, self._source(image, "estimate"), net.samples)
        count, others = int(votes[chosen]), votes.clone()
        others[chosen] = -1
        rival = int(others.argmax())
        if 2 * count <= net.samples:
            return ABSTAIN, rival, 0.0
        share = -add_up(-share_down(count, net.samples, net.alpha), self.variation)
        return (chosen if share > 0.5 else ABSTAIN), rival, share

    def _latents(self, images: Tensor) -> Tensor:
        """The left half in float64."""
        return self.network.features(whole_blocks(images.double()))[: len(images)]

    def _source(self, image: Tensor, purpose: str) -> torch.Generator:
        digest = hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest()
        return generator(self.network.seed, "smoothing", purpose, digest)


def combine(right: Tensor, bound: Callable[[Tensor], Tensor], largest: float) -> Tensor:
    """Return `max_gamma min(right / L(gamma), gamma)` by bisection, rounded down, float64 (n,).

    Whatever gamma is tried, the smaller of the two is a radius; where L does not fall with gamma, the best lies where both
    meet.

    Args:
        right: radii in the latent, float64 (n,), at least 0.
        bound: L, from gamma (n,), proved upper bounds of the left half within gamma of each image.
        largest: gamma that is tried first, and the largest radius.
    """
    best, low = torch.zeros_like(right), torch.zeros_like(right)
    high = torch.full_like(right, largest)
    gamma = high
    for _ in range(BISECTIONS):
        reach = torch.where(right > 0, tensor_down(right / bound(gamma)), 0.0).clamp_min(0.0)
        best = torch.maximum(best, torch.minimum(reach, gamma))
        low, high = torch.where(reach >= gamma, gamma, low), torch.where(reach >= gamma, high, gamma)
        gamma = (low + high) / 2
    return best


def accuracy_down(certificate: Certificate, eps: str | Fraction, labels: Tensor, rho: float) -> float:
    """Bound, with confidence 1 - rho, the share of these samples that are right on the whole ball of eps.

    `Certificate.accuracy_at` counts radii that are each wrong with probability alpha at most. Here as many of the n radii as
    may be wrong, but for a probability of rho, are taken off.

    Args:
        certificate: probabilistic, of n samples with independent noise.
        eps: pixel units of images in [0, 1].
        labels: int64 (n,), the true classes.
        rho: in (0, 1).

    Raises:
        DataError: as `Certificate.accuracy_at`.
    """
    n = len(certificate)
    counted = round(certificate.accuracy_at(eps, labels) * n)
    wrong = wrong_radii_up(n, fraction_up(1 - Fraction(certificate.confidence)), rho)
    return fraction_down(Fraction(max(counted - wrong, 0), n))
