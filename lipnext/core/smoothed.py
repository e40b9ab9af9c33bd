"""A network in two halves with noise between them: what a smoothed classifier is made of."""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lipnext.core.errors import ConfigError
from lipnext.core.module import LipschitzModule
from lipnext.core.network import Head, LipschitzNetwork
from lipnext.core.seed import generator


class SmoothedNetwork(LipschitzNetwork):
    """The base classifier of `g(x) = argmax_c P[head(body(x) + noise) = c]`, noise ~ N(0, sigma^2 I).

    `body` is the left half, with a proved Lipschitz bound; `head`, the right half, needs none. The same `sigma` decides noise
    and radius, here as everywhere. With a body that keeps distances this is randomised smoothing of the image (Cohen et al.
    2019).

    Args:
        body: layers from the images to the latent.
        head: from the latent to logits.
        input_shape: `(c, H, W)`.
        sigma: standard deviation of the noise, above 0.
        samples: N, votes that a radius is derived from.
        selection: N0, other votes, which choose the class.
        alpha: probability with which one image's radius may be wrong.
        seed: of all noise.

    Raises:
        ConfigError: if a number is out of range, or so few votes and so small an alpha that every image would be abstained on.
    """

    # parts of a batch would all draw the noise of its first images
    batch_parts: ClassVar[Literal["any", "processes", "none"]] = "none"
    validation_votes: ClassVar[int] = 8

    def __init__(
        self,
        body: Sequence[LipschitzModule],
        head: Head,
        input_shape: tuple[int, int, int],
        *,
        sigma: float,
        samples: int,
        selection: int,
        alpha: float,
        seed: int,
    ) -> None:
        check_votes(sigma, samples, selection, alpha)
        super().__init__(body, head, input_shape)
        self.sigma, self.samples, self.selection = float(sigma), samples, selection
        self.alpha, self.seed = float(alpha), seed

    def noisy(self, latent: Tensor, source: torch.Generator) -> Tensor:
        """Return the latent with noise, for training and estimates; a certificate draws its noise exactly."""
        noise = torch.randn(latent.shape, generator=source, dtype=torch.float32)
        return latent + self.sigma * noise.to(latent)

    def radius_estimator(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that estimates signed radii from the mean probability under a few draws of noise."""
        frozen, constant = self.materialise(), float(torch.as_tensor(self.estimate_lipschitz()).detach())
        source = generator(self.seed, "validation")

        @torch.no_grad()
        def estimate(images: Tensor, labels: Tensor) -> Tensor:
            latent = frozen.features(images)
            votes = [frozen.head(self.noisy(latent, source)).softmax(1) for _ in range(self.validation_votes)]
            share = torch.stack(votes).mean(0).gather(1, labels[:, None]).squeeze(1).double()
            # No more than all of N votes could prove.
            share = share.clamp(1e-9, self.alpha ** (1 / self.samples))
            return self.sigma * torch.special.ndtri(share) / max(constant, 1e-12)

        return estimate


def check_votes(sigma: float, samples: int, selection: int, alpha: float) -> None:
    """Refuse numbers with which nothing could ever be certified.

    Raises:
        ConfigError: one line.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ConfigError(f"model.sigma: must be above 0, got {sigma}")
    if not 0 < alpha < 1:
        raise ConfigError(f"model.alpha: must lie between 0 and 1, got {alpha}")
    if selection < 1 or samples < 1:
        raise ConfigError(f"model: samples and selection must be at least 1, got {samples} and {selection}")
    if 2.0 ** (1 - samples) > alpha:
        least = math.ceil(1 - math.log2(alpha))
        raise ConfigError(
            f"model.samples: {samples} votes decide nothing with alpha {alpha:g}: even if all agree, the p-value is "
            f"{2.0 ** (1 - samples):.3g} and every image is abstained on; take at least {least} samples or a larger alpha"
        )
