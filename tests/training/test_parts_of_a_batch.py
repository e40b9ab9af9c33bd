"""A batch may be cut into parts, for several processes or passes: every loss is a mean over images, for every system."""

import copy

import pytest
import torch
from torch import Tensor

from lipnext import systems
from lipnext.core.errors import ConfigError
from lipnext.core.network import LipschitzNetwork
from lipnext.nn.implicit import TRAINING_TOLERANCE
from lipnext.training.loop import _autocast
from lipnext.training.objective import LOSSES, Objective

CASES = [("lipnext", loss) for loss in LOSSES] + [
    (name, loss) for name in systems.list_systems() for loss in systems.get(name).losses or ("emma",)
]
# An equation is solved until the distance to its solution is small enough for the whole batch.
ITERATED = {"nemon": TRAINING_TOLERANCE}


def gradients(
    network: LipschitzNetwork, objective: Objective, images: Tensor, labels: Tensor, parts: list[int]
) -> Tensor:
    """Of all parameters, by the weighted losses of the parts, each from the same state of the buffers."""
    total = torch.zeros(sum(p.numel() for p in network.parameters()))
    for x, y in zip(images.split(parts), labels.split(parts), strict=True):
        copied = copy.deepcopy(network)
        loss = objective.of(copied, x, y, 0.4, _autocast("float64", images.device)) * (len(y) / len(labels))
        grads = torch.autograd.grad(
            loss, list(copied.parameters()), allow_unused=True, materialize_grads=True
        )
        total += torch.cat([g.flatten() for g in grads])
    return total


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_the_losses_of_parts_add_up_to_that_of_the_batch(name: str, loss: str) -> None:
    experiment = systems.experiment(f"{name}/tiny")
    network = systems.build_network(experiment, (1, 8, 8), 10).double().train()
    spec = experiment.loss.model_copy(update={"name": loss, "penalty": 0.1})
    objective = Objective(spec, systems.get(name).losses)
    images, labels = torch.rand(7, 1, 8, 8), torch.randint(10, (7,))
    try:
        whole, cut = (gradients(network, objective, images, labels, parts) for parts in ([7], [3, 4]))
    except ConfigError as error:
        pytest.skip(f"the tiny network is not for this loss: {error}")
    difference = (whole - cut).abs().max() / whole.abs().max()
    if any(getattr(layer, "batch_parts", "any") != "any" for layer in network.modules()):
        assert difference > 1e-6  # and the loop does not cut it
    else:
        assert difference < ITERATED.get(name, 1e-12), "a layer must say so in `batch_parts`"
