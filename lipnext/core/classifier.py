"""A network together with the one that certifies it."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.errors import ConfigError
from lipnext.core.files import sha256_tensors
from lipnext.core.guard import check_certifiable, check_images
from lipnext.core.system import Certifier, MakeCertifier


@final
class Classifier(nn.Module):
    """Labels with proved radii: the network gives the logits, its certifier the radii.

    Behaviour is changed by passing another network or certifier, not by subclassing.

    Args:
        net: maps images (n, C, H, W) to logits (n, K).
        make_certifier: proves the bounds of `net` and returns its certifier, such as `System.certify`.
        input_shape: (C, H, W).
        classes: names of the K >= 2 classes, or their number.
        system: name of the system, such as "lipnext".

    Raises:
        ConfigError: where the shape or the classes are not usable.
    """

    def __init__(
        self,
        net: nn.Module,
        make_certifier: MakeCertifier,
        input_shape: tuple[int, int, int],
        classes: tuple[str, ...] | int,
        system: str,
    ) -> None:
        super().__init__()
        names = tuple(str(k) for k in range(classes)) if isinstance(classes, int) else tuple(classes)
        if len(names) < 2 or len(set(names)) != len(names):
            raise ConfigError(f"a classifier needs at least 2 classes with different names, got {classes!r}")
        if len(input_shape) != 3 or min(input_shape) < 1:
            raise ConfigError(f"input_shape must be (C, H, W) with positive sizes, got {input_shape!r}")
        self.net = net
        self.make_certifier = make_certifier
        channels, height, width = input_shape
        self.input_shape = (channels, height, width)
        self.classes = names
        self.system = system
        self._proved: tuple[str, Certifier] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, K) of images (n, C, H, W), in the network's own precision."""
        logits: Tensor = self.net(images)
        return logits

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Return labels int64 (n,) without a guarantee, fast; `certify` gives the labels that are proved.

        Args:
            images: float32 or float64 (n, C, H, W) in [0, 1].

        Raises:
            DataError: where the images are not of that form.
        """
        check_images(images, self.input_shape)
        like = next(self.net.parameters(), images)
        return self.forward(images.to(like.device, like.dtype)).argmax(dim=1)

    @torch.no_grad()
    def certify(
        self,
        images: Tensor,
        batch_size: int = 512,
        progress: Callable[[int], None] | None = None,
        *,
        semantics: Semantics = "real",
        arithmetic: str = "float64",
    ) -> Certificate:
        """Return proved radii; the bounds are proved on the first call and whenever the weights changed.

        Args:
            images: float32 or float64 (n, C, H, W) in [0, 1], n >= 0.
            batch_size: images that are evaluated together; decides the memory, never the proof.
            progress: called after each batch with the number of images in it.
            semantics: "real" for the real-arithmetic network with the stored weights, "deployed" for the program that
                evaluates them.
            arithmetic: in which that program runs; the labels of a float64 one are those returned here.

        Returns:
            The certificate of the n samples, in order.

        Raises:
            DataError: where the images are not of that form.
            UnsoundError: where the network or the environment cannot be certified.
            ConfigError: where the batch size is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        check_images(images, self.input_shape)
        check_certifiable(self.net)
        certifier = self._certifier(semantics, arithmetic)
        device = next(self.net.parameters(), images).device
        parts = []
        # An empty batch goes through the certifier too: the empty certificate needs its norm and bound.
        for start in range(0, max(len(images), 1), batch_size):
            batch = images[start : start + batch_size].to(device)
            parts.append(certifier(batch))
            if progress is not None:
                progress(len(batch))
        return Certificate.cat(parts)

    def _certifier(self, semantics: Semantics, arithmetic: str) -> Certifier:
        """Return the certifier of the present weights, proving again where anything changed.

        The weights are hashed each time. Version counters would be cheaper, but a write through `.data` or a
        NumPy view does not move them, and a stale bound is an unsound one.
        """
        tensors = dict(self.net.named_parameters()) | dict(self.net.named_buffers())
        state = sha256_tensors(tensors) + repr(self.net) + _settings(self.net) + semantics + arithmetic
        if self._proved is None or self._proved[0] != state:
            self._proved = None  # The old certifier's float64 weights are freed before new ones are made.
            self._proved = (state, self.make_certifier(self.net, semantics, arithmetic))
        return self._proved[1]


def _settings(net: nn.Module) -> str:
    """The plain attributes of all modules: a number may decide what a layer computes and need not show in its repr."""
    plain, internal = (bool, int, float, str, tuple, list, type(None)), vars(nn.Module()).keys()
    return repr(
        [
            (
                name,
                sorted(
                    (k, repr(v)) for k, v in vars(part).items() if k not in internal and isinstance(v, plain)
                ),
            )
            for name, part in net.named_modules()
        ]
    )
