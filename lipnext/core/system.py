"""The record that a system exports: everything the rest of the package knows about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from lipnext.core.bound import Estimate, norm_label
from lipnext.core.certificate import Certificate, Semantics
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import Experiment, LossSpec


class Certifier(Protocol):
    """Certifies images for one network with fixed weights, whose bounds it has proved."""

    def __call__(self, images: Tensor) -> Certificate:
        """Certify images (n, C, H, W) in [0, 1]."""

    def describe(self) -> dict[str, Any]:
        """Return what was proved, for `certificate.json`: plain numbers, text, lists and dictionaries."""


class MakeCertifier(Protocol):
    """Proves the bounds of a network once and returns its certifier."""

    def __call__(
        self, net: nn.Module, /, semantics: Semantics = "real", arithmetic: str = "float64"
    ) -> Certifier:
        """Prove for what the certificate shall speak of; refuse what this kind of certificate cannot prove."""


class NetworkLoss(Protocol):
    """A loss that needs more of a network than its logits."""

    def __call__(
        self,
        network: Any,
        images: Tensor,
        labels: Tensor,
        *,
        spec: LossSpec,
        radius: float,
        progress: float,
    ) -> Tensor:
        """Return the scalar loss.

        Args:
            network: built by the same system.
            images: `(B, c, H, W)` in [0, 1].
            labels: `(B,)`.
            spec: the numbers of the experiment's loss section.
            radius: l2 training radius at this point of the ramp.
            progress: share of the training that is over, in [0, 1].
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One certified classifier family. A new system is one file with one such record.

    Attributes:
        summary: one line for `lipnext systems`.
        reference: where it was published.
        norm: 2.0 or inf, the norm that the certificate speaks of.
        build: the network from keyword hyperparameters.
        published: the constant of the body as the system's own code would state it, if that is an estimate.
        certify: called once for a network: proves its bounds and returns its certifier.
        losses: losses of its own by name, beside those that an experiment can choose for every system.
        presets: keyword arguments of `build` by name; "tiny" builds on a CPU in under a second.
        experiments: functions that return an experiment, by name.

    Raises:
        ConfigError: where the summary is not one line or the preset "tiny" is missing.
        UnsoundError: where the norm is neither 2.0 nor inf.
    """

    summary: str
    reference: str
    norm: float
    build: Callable[..., nn.Module]
    certify: MakeCertifier
    published: Callable[[Any], Estimate] | None = None
    losses: Mapping[str, NetworkLoss] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, bool | int | float | str]]
    experiments: Mapping[str, Callable[[], Experiment]]

    def __post_init__(self) -> None:
        norm_label(self.norm)
        if not self.summary or "\n" in self.summary:
            raise ConfigError(f"a system's summary must be one line, got {self.summary!r}")
        if "tiny" not in self.presets:
            raise ConfigError(
                f"a system needs a preset 'tiny' for the tests, got: {', '.join(self.presets) or 'none'}"
            )
