import json
from typing import Any

import pytest
import torch
from helpers import Call
from torch import Tensor

from lipnext import losses, systems
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import Experiment
from lipnext.optim.groups import split_parameters
from lipnext.planning import DEVICES, Meter, plan
from lipnext.systems.lipnext import build
from lipnext.training.activations import stored_activations
from lipnext.training.loop import make_euclidean_optimizer, make_orthogonal_optimizer

TINY = ["model.width=32", "model.depth=6", "train.batch_size=32", "loss.name=cross-entropy"]


def tiny(*changes: str) -> Experiment:
    return systems.experiment("tiny").override([*TINY, *changes])


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measured(what: Experiment, mode: str) -> dict[str, int]:
    """One real step: the tensors that are there, and those that autograd saved beside the weights."""
    torch.set_default_dtype(torch.float32)
    net = systems.build_network(what, (1, 8, 8), 10).train()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images, labels = torch.rand(what.train.batch_size, 1, 8, 8), torch.arange(what.train.batch_size) % 10
    spec = what.train.model_copy(update={"activations": mode})
    with stored_activations(net, spec):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = losses.cross_entropy(net(images), labels)
        stored = sum(t.untyped_storage().nbytes() for t in saved.values())
        saved.clear()
        loss.backward()
    orthogonal, euclidean = split_parameters(net)
    optimizers: list[Any] = [
        make_orthogonal_optimizer(list(orthogonal.values()), what),
        make_euclidean_optimizer(list(euclidean.values()), what.optim),
    ]
    moments = 0
    for optimizer in optimizers:
        optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        moments += bytes_of([t for t in states if t.dim() > 0])
    parameters = list(net.parameters())
    grads = [p.grad for p in parameters if p.grad is not None]
    return {
        "weights": bytes_of(parameters),
        "gradients": bytes_of(grads),
        "moments": moments,
        "activations": stored,
    }


@pytest.mark.parametrize("mode", ["keep", "checkpoint", "reverse"])
@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_sizes_are_those_of_real_tensors(mode: str, optimizer: str) -> None:
    what = tiny(f"optim.name={optimizer}", f"optim.lookahead={3 if optimizer == 'adam' else 0}")
    document, real = plan(what), measured(what, mode)
    if optimizer == "adam":  # the slow copies of the Euclidean parameters are held by Lookahead
        real["moments"] += bytes_of(
            list(split_parameters(systems.build_network(what, (1, 8, 8), 10))[1].values())
        )
    for name in ("weights", "gradients", "moments"):
        assert document["bytes"][name] == pytest.approx(real[name], rel=0.001), name
    assert document["activations"][mode]["activations"] == pytest.approx(real["activations"], rel=0.1)


@pytest.mark.slow
def test_flops_and_peak_are_those_of_a_real_run() -> None:
    """The same meter over real tensors, and the products of the block by hand."""
    width, depth, tokens, batch = 32, 6, 16, 32
    row = plan(tiny())["activations"]["keep"]
    torch.set_default_dtype(torch.float32)
    net = build(input_shape=(1, 8, 8), classes=10, width=width, depth=depth, patch=2, shift=0.125).train()
    images, labels = torch.rand(batch, 1, 8, 8), torch.arange(batch) % 10
    with Meter() as meter:
        net.estimate_distances()  # what the objective asks for, whatever the loss
        losses.cross_entropy(net(images), labels).backward()
    assert row["flops"] == meter.flops
    by_hand = depth * (6 * 2 * batch * tokens * width**2 + 3 * 2 * width**3)
    assert by_hand < meter.flops < 1.05 * by_hand
    moments = sum(plan(tiny())["bytes"][key] for key in ("weights", "moments", "average"))
    assert row["memory"] - moments == pytest.approx(meter.peak, rel=0.1)


def test_state_is_shared_and_communication_appears() -> None:
    alone, four = plan(tiny()), plan(tiny(), gpus=4)
    assert alone["sent_per_step"] == 0 < four["sent_per_step"] == 2 * alone["bytes"]["weights"]
    assert four["bytes"]["moments"] < 0.3 * alone["bytes"]["moments"]
    assert four["bytes"]["weights"] == alone["bytes"]["weights"]
    assert four["images_per_pass"] == 8


@pytest.mark.slow
def test_sharded_weights_and_gradients_fall_with_the_devices() -> None:
    wide = tiny().override(["model.width=192", "model.depth=8"])
    whole, sharded = plan(wide, gpus=4), plan(wide.override(["train.shard=true"]), gpus=4)
    matrices, layer = 16 * 192**2 * 4, 2 * 192**2 * 4
    small = whole["bytes"]["weights"] - matrices
    # a quarter of all rows, a quarter of the matrices whole, and two layers at work
    assert sharded["bytes"]["weights"] == small + matrices // 2 + 2 * layer
    assert sharded["bytes"]["gradients"] == small + matrices // 2
    assert sharded["sent_per_step"] == 3.5 * (small + matrices)
    assert list(sharded["activations"]) == ["keep", "checkpoint"]
    alone = plan(wide.override(["train.shard=true"]))
    assert alone["bytes"] == plan(wide)["bytes"]


def test_seconds_are_a_roofline() -> None:
    meter, device = Meter(), DEVICES["h100"]
    meter.operations = [(torch.float32, 67 * 10**12, 1), (torch.float32, 0, int(3.35e12))]
    assert meter.seconds(device) == pytest.approx(2 / device.efficiency)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"gpu": "h1000"}, "--gpu: unknown device 'h1000'; did you mean 'h100'"),
        ({"gpus": 0}, "--gpus: a batch of 32 images cannot be cut into 0 x 1 parts"),
        ({"gpus": 33}, "--gpus: a batch of 32 images cannot be cut into 33 x 1 parts"),
    ],
)
def test_what_cannot_be_planned_is_refused(kind: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        plan(tiny(), **kind)
    assert "\n" not in str(error.value)


def test_an_unknown_data_set_is_refused() -> None:
    what = systems.experiment("images")
    with pytest.raises(
        ConfigError, match="the data set of 'images' is not known; name its folder with --data"
    ):
        plan(what)


def test_the_command_prints_a_table_or_json(call: Call) -> None:
    code, out, _ = call("plan", "tiny", "--json")
    assert code == 0
    document = json.loads(out)
    assert set(document["activations"]) == {"keep", "checkpoint", "reverse"}
    code, out, _ = call("plan", "tiny", "--gpus", "2")
    assert code == 0
    assert "Estimates" in out
