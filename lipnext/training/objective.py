"""The loss of an experiment at a point of its schedules."""

from dataclasses import dataclass

from torch import Tensor

from lipnext import losses
from lipnext.core.eps import parse_eps
from lipnext.core.experiment import LossSpec
from lipnext.optim.schedule import linear_ramp


@dataclass(frozen=True)
class Objective:
    """Loss of logits as a function of the progress of training."""

    spec: LossSpec

    def radius(self, progress: float) -> float:
        """Training radius at `progress` in [0, 1]."""
        spec = self.spec
        unit = float(parse_eps(spec.radius))
        return unit * linear_ramp(progress, spec.ramp_from, spec.ramp_to, spec.ramp_share)

    def temperature(self, progress: float) -> float:
        """Temperature at `progress`, interpolated geometrically where an end is given."""
        start, end = self.spec.temperature, self.spec.temperature_end
        return start if end is None else start * (end / start) ** progress

    def __call__(self, logits: Tensor, labels: Tensor, distances: Tensor, progress: float) -> Tensor:
        """Return the scalar loss.

        Args:
            logits: `(B, K)`.
            labels: `(B,)`.
            distances: `(K, K)`, head distances times the body's constant.
            progress: share of the training that is over.
        """
        spec = self.spec
        if spec.name == "emma":
            logits = losses.emma(logits, labels, distances, self.radius(progress))
        return losses.cross_entropy(
            logits,
            labels,
            temperature=self.temperature(progress),
            offset=spec.offset,
            annealing=spec.annealing,
            smoothing=spec.smoothing,
        )
