from pathlib import Path

import pytest
import torch
from tiny_runs import experiment, network, pictures

from lipnext import losses, systems
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import TrainSpec
from lipnext.core.network import LipschitzNetwork, in_turn
from lipnext.systems.lipnext import build
from lipnext.training.activations import stored_activations
from lipnext.training.loop import train

MODES = [("checkpoint", None), ("checkpoint", 3), ("reverse", None), ("reverse", 2)]


def deep(depth: int) -> LipschitzNetwork:
    return build(input_shape=(1, 8, 8), classes=3, width=16, depth=depth, patch=2, shift=0.125).double()


def step(net: LipschitzNetwork, spec: TrainSpec) -> tuple[list[torch.Tensor], int]:
    """Gradients, and the bytes that autograd stored beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    stored: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # kept alive, so that no address comes twice
        return tensor

    rng = torch.Generator().manual_seed(0)
    images = torch.rand(32, 1, 8, 8, generator=rng, dtype=torch.float64)
    net.zero_grad()
    with stored_activations(net, spec):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = losses.cross_entropy(net(images), torch.arange(32) % 3)
        size = sum(size for size, _ in stored.values())
        stored.clear()
        loss.backward()
    return [p.grad for p in net.parameters() if p.grad is not None], size


@pytest.mark.parametrize(("mode", "every"), MODES)
def test_gradients_do_not_depend_on_what_is_stored(mode, every) -> None:
    net = deep(7)
    usual, _ = step(net, TrainSpec())
    found, _ = step(net, TrainSpec(activations=mode, activations_every=every))
    for a, b in zip(found, usual, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12 * b.abs().max().item())
    assert net.walk is in_turn


def test_what_is_stored_grows_by_bits_alone() -> None:
    """A block adds half a bit for each of its 64-bit activations: 1/128 of one stored activation."""
    sizes = {depth: step(deep(depth), TrainSpec(activations="reverse"))[1] for depth in (8, 32)}
    tokens = 32 * 16 * 16
    assert sizes[32] - sizes[8] == 24 * tokens // 16
    assert sizes[32] < 1.2 * sizes[8]
    # Planted: the usual path, which stores two activations and a sign of half of one for each block, and more.
    kept = {depth: step(deep(depth), TrainSpec())[1] for depth in (8, 32)}
    assert kept[32] - kept[8] > 24 * 2.5 * 8 * tokens
    assert sizes[32] < kept[32] / 40
    checkpointed = step(deep(32), TrainSpec(activations="checkpoint"))[1]
    assert sizes[32] < checkpointed < kept[32]


@pytest.mark.parametrize("mode", ["checkpoint", "reverse"])
def test_a_training_learns_the_same_and_ends_as_a_plain_network(mode, tmp_path: Path) -> None:
    nets = []
    for name in ("keep", mode):
        what = experiment("train.precision=float64", f"train.activations={name}", "train.epochs=2")
        (tmp_path / name).mkdir()
        net, _ = train(network(what), what, pictures(), pictures(12, seed=1), tmp_path / name)
        assert net.walk is in_turn
        nets.append(net.state_dict())
    for key, value in nets[0].items():
        assert torch.allclose(value, nets[1][key], rtol=0, atol=1e-9), key


def test_what_is_certified_walks_plainly() -> None:
    net = deep(2)
    with stored_activations(net, TrainSpec(activations="reverse")):
        assert net.walk is not in_turn
        assert net.materialise().walk is in_turn


def test_no_gradient_nothing_stored() -> None:
    net, images = deep(2), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad(), stored_activations(net, TrainSpec(activations="reverse")):
        assert torch.equal(net(images), in_turn([*net.body, net.head], images))


def test_networks_that_cannot_do_it_are_refused_in_one_line() -> None:
    shape = (3, 8, 8)
    cayley = systems.get("cayley")
    net = cayley.build(input_shape=shape, classes=3, **cayley.presets["tiny"])
    message = r"train.activations: none of the layers can run backwards \(.*\); take keep or checkpoint"
    with pytest.raises(ConfigError, match=message), stored_activations(net, TrainSpec(activations="reverse")):
        pass
    residual = systems.get("liresnet")
    net = residual.build(input_shape=shape, classes=3, **residual.presets["tiny"]).train()
    with (
        pytest.raises(ConfigError, match="a LinearResidual follows its batches while training"),
        stored_activations(net, TrainSpec(activations="checkpoint")),
    ):
        net(torch.rand(2, *shape))
