"""What the forward pass stores for the gradient: everything, every k-th activation, or the last one of an invertible chain."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipnext.core.errors import ConfigError
from lipnext.core.experiment import TrainSpec
from lipnext.core.network import LipschitzNetwork, in_turn
from lipnext.nn.reversible import Reversible, run_reversibly


@contextmanager
def stored_activations(network: LipschitzNetwork, spec: TrainSpec) -> Iterator[None]:
    """Apply the body of a network as `train.activations` says, wherever gradients are recorded.

    Raises:
        ConfigError: if it is to run backwards and no layer can.
    """
    if spec.activations == "reverse" and not any(isinstance(layer, Reversible) for layer in network.body):
        kinds = sorted({type(layer).__name__ for layer in network.body})
        raise ConfigError(
            f"train.activations: none of the layers can run backwards ({', '.join(kinds)}); take keep or checkpoint"
        )

    def walk(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return in_turn(layers, x)
        if spec.activations == "checkpoint":
            return _checkpointed(list(layers), x, spec.activations_every or 1)
        return _reversed(layers, x, spec.activations_every)

    if spec.activations != "keep":
        network.walk = walk
    try:
        yield
    finally:
        network.walk = in_turn


def _checkpointed(layers: list[nn.Module], x: Tensor, every: int) -> Tensor:
    """Store the input of every k-th layer; what lies between is computed again in the backward pass."""
    for start in range(0, len(layers), every):
        piece = layers[start : start + every]
        before = [_versions(layer) for layer in piece]
        x = checkpoint(in_turn, piece, x, use_reentrant=False)
        for layer, versions in zip(piece, before, strict=True):
            if _versions(layer) != versions:
                raise ConfigError(
                    f"train.activations: a {type(layer).__name__} follows its batches while training, so it cannot be "
                    "computed twice; take keep"
                )
    return x


def _versions(layer: nn.Module) -> list[tuple[int, int]]:
    return [(id(buffer), buffer._version) for buffer in layer.buffers()]


def _reversed(layers: Iterable[nn.Module], x: Tensor, every: int | None) -> Tensor:
    """Run chains of invertible layers, of `every` at most, backwards; the others keep their activations."""
    for invertible, group in groupby(layers, lambda layer: isinstance(layer, Reversible)):
        run = list(group)
        if not invertible:
            x = in_turn(run, x)
            continue
        chain = cast(list[Reversible], run)
        for start in range(0, len(chain), every or len(chain)):
            x = run_reversibly(chain[start : start + (every or len(chain))], x)
    return x
