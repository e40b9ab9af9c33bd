"""The loss of an experiment at a point of its schedules."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.nn import functional

from lipnext import losses
from lipnext.core.eps import parse_eps
from lipnext.core.errors import ConfigError, nearest
from lipnext.core.experiment import LossSpec
from lipnext.core.network import LipschitzNetwork
from lipnext.core.system import NetworkLoss
from lipnext.optim.schedule import linear_ramp, share_of

LOSSES = ("emma", "cross-entropy", "cll", "hinge")
"""Losses of logits, which every system can be trained by."""


class Objective:
    """The loss as a function of the progress of training.

    Args:
        spec: of the experiment.
        own: losses of the system's own, by name.

    Raises:
        ConfigError: if there is no loss of that name.
    """

    def __init__(self, spec: LossSpec, own: Mapping[str, NetworkLoss] | None = None) -> None:
        own = own or {}
        if spec.name not in LOSSES and spec.name not in own:
            raise ConfigError(
                f"loss.name: there is no loss '{spec.name}'; {nearest(spec.name, [*LOSSES, *own])}"
            )
        self.spec = spec
        self.own = own.get(spec.name)

    def radius(self, progress: float) -> float:
        """Training radius at `progress` in [0, 1]."""
        spec = self.spec
        unit = float(parse_eps(spec.radius))
        return unit * linear_ramp(progress, spec.ramp_from, spec.ramp_to, spec.ramp_share)

    def temperature(self, progress: float) -> float:
        """Temperature at `progress`, interpolated geometrically where an end is given."""
        start, end = self.spec.temperature, self.spec.temperature_end
        return start if end is None else start * (end / start) ** progress

    def power_share(self, progress: float) -> float:
        """How far `power` has taken over at `progress`, in [0, 1]."""
        after = self.spec.power_after
        return share_of(progress, after, (1 + after) / 2) if after < 1 else 0.0

    def of(
        self,
        network: LipschitzNetwork,
        images: Tensor,
        labels: Tensor,
        progress: float,
        autocast: AbstractContextManager[Any],
    ) -> Tensor:
        """Return the scalar loss of a network on a batch.

        Args:
            network: in training mode.
            images: `(B, c, H, W)` in [0, 1].
            labels: `(B,)`.
            progress: share of the training that is over.
            autocast: in which the forward pass runs; the loss does not.
        """
        network.set_progress(progress)
        if self.own is not None:
            return self.own(
                network, images, labels, spec=self.spec, radius=self.radius(progress), progress=progress
            )
        with autocast:
            logits = network(images)
        return self(logits, labels, network.estimate_distances(), progress)

    def __call__(self, logits: Tensor, labels: Tensor, distances: Tensor, progress: float) -> Tensor:
        """Return the scalar loss of logits.

        Args:
            logits: `(B, K)`.
            labels: `(B,)`.
            distances: `(K, K)`, head distances times the body's constant.
            progress: share of the training that is over.
        """
        spec = self.spec
        if spec.name == "cll":
            return losses.cll(
                logits, labels, distances, self.radius(progress), slack=spec.slack, penalty=spec.penalty
            )
        if spec.name == "hinge":  # CPL's loss: the mean over the classes of max(0, offset - z_y + z_j)
            return functional.multi_margin_loss(logits, labels, margin=spec.offset)
        if spec.name == "emma":
            logits = losses.emma(logits, labels, distances, self.radius(progress))
        return losses.cross_entropy(
            logits,
            labels,
            temperature=self.temperature(progress),
            offset=spec.offset,
            annealing=spec.annealing,
            smoothing=spec.smoothing,
            power=spec.power,
            share=self.power_share(progress),
        )
