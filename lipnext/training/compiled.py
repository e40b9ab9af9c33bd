"""Layers compiled by torch.compile while they are trained; what is evaluated, kept and certified is never compiled."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lipnext.core.errors import ConfigError
from lipnext.core.experiment import TrainSpec
from lipnext.core.network import LipschitzNetwork, in_turn


def check_compile(spec: TrainSpec, device: torch.device) -> None:
    """Refuse `train.compile` where it cannot work, before anything is trained.

    Raises:
        ConfigError: if activations are not simply kept, or torch.compile fails here on a function of one line.
    """
    if not spec.compile:
        return
    if spec.activations != "keep":
        raise ConfigError(
            f"train.compile: compiled layers keep their activations, got train.activations={spec.activations}; "
            "set one of the two back"
        )
    try:
        torch.compile(_twice)(torch.ones(2, device=device))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"train.compile: torch.compile does not work here ({reason}); it needs a C++ compiler, and Triton on a "
            "GPU; set train.compile=false"
        ) from None


@contextmanager
def compiled_layers(network: LipschitzNetwork, spec: TrainSpec) -> Iterator[None]:
    """Apply the body of a network layer by layer, each compiled, wherever gradients are recorded.

    Layers that only differ in their weights share one compiled function, so the time to compile does not grow with the depth.
    """
    if not spec.compile:
        yield
        return
    apply: Callable[[nn.Module, Tensor], Tensor] = torch.compile(_apply)

    def walk(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return in_turn(layers, x)
        for layer in layers:
            x = apply(layer, x)
        return x

    network.walk = walk
    try:
        yield
    finally:
        network.walk = in_turn


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out


def _twice(x: Tensor) -> Tensor:
    return 2 * x
