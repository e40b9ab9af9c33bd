"""One loaded model with everything that serves it: the queue, the attacker, counters and facts."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipnext._version import __version__
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.classifier import Classifier
from lipnext.core.eps import eps_label, parse_eps_list
from lipnext.core.errors import ConfigError, UnsoundError
from lipnext.core.seed import generator
from lipnext.deployment.bundle import load_bundle, load_experiment
from lipnext.serving.answers import meaning
from lipnext.serving.attacker import Attacker, Broken
from lipnext.serving.batcher import Batcher
from lipnext.serving.inputs import Given
from lipnext.serving.limits import Limits
from lipnext.serving.metrics import Metrics

BATCH = 32
SELFTEST = 32


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a server offers, decided when it is started.

    Attributes:
        semantics: of the certificates, the experiment's.
        arithmetic: of the deployed program, the experiment's.
        eps: what `certified_at` answers where a request does not ask.
        abstain_below: no label is told unless its radius is above; None tells every label.
    """

    semantics: Semantics
    arithmetic: str
    eps: dict[str, Fraction]
    abstain_below: Fraction | None = None


class Service:
    """Answers for images; `close` ends its threads.

    Args:
        model: the classifier, on the CPU.
        offer: what is told about its images.
        limits: queue lengths and times.

    Raises:
        UnsoundError: where the network or the environment cannot be certified, or only with a confidence.
    """

    def __init__(self, model: Classifier, offer: Offer, limits: Limits) -> None:
        self.model, self.offer, self.limits = model, offer, limits
        self.metrics = Metrics()
        # The bounds are proved here, before anybody waits for them.
        example = self._certify(torch.zeros(1, *model.input_shape, dtype=torch.float64))
        if example.kind != "deterministic":
            raise UnsoundError(
                "serve answers with radii that hold for certain; a smoothed classifier's hold with a confidence, and an image "
                "takes thousands of evaluations: use lipnext certify"
            )
        self.meaning, self._bound = meaning(example), example.lipschitz
        self.bit_equal = self._is_bit_equal()
        self.batcher = Batcher(self._certify_batch, BATCH, capacity=limits.waiting_images)
        self.attacker = Attacker(model.net, limits.attack_seconds, limits.waiting_attacks)
        self.decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")

    def close(self) -> None:
        """Evaluate what waits and end all threads."""
        self.decoders.shutdown()
        self.batcher.close()
        self.attacker.close()

    def facts(self) -> dict[str, Any]:
        """Return what /v1/model tells."""
        below = self.offer.abstain_below
        bound = self._bound
        return {
            **self.meaning,
            "system": self.model.system,
            "classes": list(self.model.classes),
            "input_shape": list(self.model.input_shape),
            "lipschitz": None if bound is None else {"bound": bound.value, "proof": bound.proof},
            "eps": list(self.offer.eps),
            "abstain_below": None if below is None else eps_label(below),
            "bit_equal": self.bit_equal,
            "limits": vars(self.limits),
            "lipnext_version": __version__,
            "torch_version": torch.__version__,
        }

    def asked(self, eps: str | None) -> dict[str, Fraction]:
        """Return the eps that a request asks for, exactly.

        Raises:
            ConfigError: where one is not allowed or there are too many.
        """
        if eps is None:
            return self.offer.eps
        if eps.count(",") >= self.limits.eps:
            raise ConfigError(f"at most {self.limits.eps} eps in a request, got {eps.count(',') + 1}")
        return parse_eps_list(eps)

    async def certify(self, given: Sequence[Given]) -> Certificate:
        """Queue images and return their certificate.

        Raises:
            Shed: where too many wait.
        """
        images = torch.stack([one.pixels for one in given])
        return await asyncio.wrap_future(self.batcher.submit(images))

    async def attack(self, image: Tensor, certificate: Certificate) -> Broken:
        """Attack one image, after those that came before.

        Raises:
            Shed: where too many wait.
        """
        return await asyncio.wrap_future(self.attacker.submit(image, certificate))

    def told(self, documents: Sequence[dict[str, Any]]) -> None:
        """Count what was told."""
        for document in documents:
            self.metrics.radius.observe(document["radius"])
        self.metrics.abstentions.inc(sum(document["abstained"] for document in documents))

    def _certify_batch(self, images: Tensor) -> Certificate:
        self.metrics.batch.observe(len(images))
        return self._certify(images)

    def _certify(self, images: Tensor, batch_size: int = BATCH) -> Certificate:
        return self.model.certify(
            images, batch_size, semantics=self.offer.semantics, arithmetic=self.offer.arithmetic
        )

    def _is_bit_equal(self) -> bool:
        """See whether this machine gives random images the same bits in whichever batch they are evaluated."""
        noise = torch.rand(
            SELFTEST, *self.model.input_shape, generator=generator("serve"), dtype=torch.float64
        )
        whole = self._certify(noise)
        return all(
            torch.equal(getattr(part, name), getattr(whole, name))
            for part in (self._certify(noise, 5), self._certify(noise, 16))
            for name in ("radius", "margin")
        )


def open_service(
    folder: Path, abstain_below: Fraction | None = None, limits: Limits | None = None
) -> Service:
    """Load a bundle and prove its bounds.

    Args:
        folder: with the bundle.
        abstain_below: no label is told unless its radius is above.
        limits: None takes the defaults.

    Raises:
        BundleError: as `deployment.bundle.load_bundle`.
        UnsoundError: where it cannot be certified here.
    """
    model, spec = load_bundle(folder), load_experiment(folder).certify
    offer = Offer(
        semantics=spec.semantics,
        arithmetic=spec.arithmetic,
        eps=parse_eps_list(spec.eps),
        abstain_below=abstain_below,
    )
    return Service(model, offer, limits or Limits())
