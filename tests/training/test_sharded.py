"""Sharded matrices (FSDP2) change where numbers lie, and no number: against one process that has everything."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import together, values
from test_distributed import DOUBLE, STEPS, At, assert_same_as_one, new, run
from tiny_runs import SAME, SHAPE, difference, experiment, network, pictures
from torch import Tensor

from lipnext.core.errors import ConfigError, TrainingError
from lipnext.core.experiment import Experiment
from lipnext.core.network import LipschitzNetwork
from lipnext.core.world import World
from lipnext.optim import owner, sharding
from lipnext.optim.owner import Owners
from lipnext.systems import build_network
from lipnext.training import loop
from lipnext.training.checkpoint import list_checkpoints
from lipnext.training.loop import Interrupted, train

SHARDED = ("train.shard=true", "model.depth=3", DOUBLE)


@pytest.fixture(autouse=True)
def own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run in this process sets is taken back."""
    monkeypatch.setattr(owner, "SMALL", owner.SMALL)


def run_sharded(world: World, folder: Path, what: Experiment) -> dict[str, Any]:
    owner.SMALL = 64  # matrices are 8 x 8 here
    return run(world, folder, what)


def run_interrupted(world: World, folder: Path, what: Experiment) -> bool:
    owner.SMALL = 64
    try:
        run(world, folder, what, At(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    except Interrupted:
        return True
    return False


@pytest.mark.dist
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, ["optim.clip=0.5", "train.accumulate=2", "optim.euclidean=sgd"]),
        pytest.param(3, ["train.activations=checkpoint"], marks=pytest.mark.slow),
        pytest.param(2, ["optim.name=adam", "train.ema=0", "optim.lookahead=0"], marks=pytest.mark.slow),
    ],
)
def test_sharded_processes_train_the_network_of_one(size: int, changes: list[str], tmp_path: Path) -> None:
    """8 rows over 3 processes are 3, 3 and 2: padded while they travel."""
    assert_same_as_one(size, run_sharded, experiment(*SHARDED, *changes), tmp_path)


@pytest.mark.dist
@pytest.mark.slow
def test_an_interrupted_sharded_run_goes_on_alone_and_the_other_way_round(tmp_path: Path) -> None:
    what = experiment(*SHARDED)
    (whole,) = values(together(1, run, new(tmp_path / "whole"), what))
    for name, first, then in (("two", 2, 1), ("one", 1, 2)):
        folder = new(tmp_path / name)
        assert all(values(together(first, run_interrupted, folder, what)))
        assert list_checkpoints(folder / "checkpoints")[-1].stem == "step-000000005"
        for end in values(together(then, run_sharded, folder, what)):
            assert end["step"] == STEPS
            assert difference(whole, end) < SAME


def bytes_of_rows(world: World, what: Experiment) -> tuple[int, int, int]:
    """Bytes of what lies on this process: the network's parameters and gradients after a pass, and what it owns."""
    owner.SMALL = 64
    net = network(what)
    with Owners(net, world, shard=True) as owners:
        owners.expect()
        net(pictures().float_images()[world.share(24)]).sum().backward()
        inside = [p.to_local() if hasattr(p, "to_local") else p for p in net.parameters()]
        grads = [
            p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
            for p in net.parameters()
            if p.grad is not None
        ]
        sizes = sum(t.nbytes for t in inside), sum(t.nbytes for t in grads)
        owners.reduce()
    return (*sizes, sum(p.nbytes for p in owners.held.values()))


@pytest.mark.dist
def test_weights_and_gradients_fall_with_the_number_of_processes(tmp_path: Path) -> None:
    what = experiment("model.depth=8", "model.width=16")
    whole = sum(p.nbytes for p in network(what).parameters())
    for sizes in values(together(2, bytes_of_rows, what)):
        assert all(size < 0.55 * whole for size in sizes)  # what is small is everywhere


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_rows_travel_and_come_back(shapes: list[tuple[int, int]], size: int) -> None:
    whole = [torch.randn(shape) for shape in shapes]
    forms = [tensor.shape for tensor in whole]
    # what torch gives each process; one that gets nothing has no rows
    rows = [
        [(tensor.chunk(size)[rank : rank + 1] or (tensor[:0],))[0] for tensor in whole]
        for rank in range(size)
    ]
    packed = [sharding.pack_rows(own, forms, size) for own in rows]
    assert len({len(part) for part in packed}) == 1
    assert all(torch.equal(*pair) for pair in zip(packed, sharding.cut(whole, size), strict=True))
    assert all(torch.equal(*pair) for pair in zip(whole, sharding.put_together(packed, forms), strict=True))
    for own, part in zip(rows, packed, strict=True):
        into = [torch.full_like(tensor, torch.nan) for tensor in own]
        sharding.unpack_rows(part, into, forms, size)
        assert all(torch.equal(*pair) for pair in zip(own, into, strict=True))


def spoiled(world: World, folder: Path, what: Experiment) -> Any:
    """Let a weight that the second process owns become NaN in the third step."""
    spread, calls = Owners.spread, []

    def spoil(self: Owners, net: LipschitzNetwork) -> None:
        calls.append(net)
        if len(calls) == 4 and world.rank == 1:
            next(iter(self.held.values())).data.fill_(torch.nan)
        spread(self, net)

    Owners.spread = spoil  # type: ignore[method-assign]
    return run_sharded(world, folder, what)


@pytest.mark.dist
def test_a_weight_that_is_not_finite_ends_all(tmp_path: Path) -> None:
    outcomes = together(2, spoiled, new(tmp_path / "run"), experiment(*SHARDED))
    assert all(isinstance(outcome, TrainingError) for outcome in outcomes)
    assert all("is no longer finite" in str(o) or "the loss became nan" in str(o) for o in outcomes)


def test_one_process_shards_nothing() -> None:
    net = network(experiment("model.depth=2"))
    owners = Owners(net, World(), shard=True)
    assert owners.whole_network() is net
    assert list(owners.held.values()) == list(net.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.activations=reverse"], "does not go with train.activations=reverse"),
        (["train.compile=true"], "does not go with train.compile"),
    ],
)
def test_what_reads_whole_matrices_is_refused(changes: list[str], message: str, tmp_path: Path) -> None:
    what = experiment("train.shard=true", *changes)
    with pytest.raises(ConfigError, match=message):
        train(network(what), what, pictures(), pictures(7), tmp_path)


def sharded_owners(world: World, system: str, model: dict[str, Any]) -> str:
    what = experiment().model_copy(update={"system": system, "model": model})
    try:
        Owners(build_network(what, SHAPE, 3), world, shard=True)
    except ConfigError as error:
        return str(error)
    return "nothing refused"


@pytest.mark.parametrize(
    ("system", "model", "message"),
    [
        (
            "lipnext",
            {"width": 8, "depth": 1, "patch": 1},
            "no matrix of this network's body could be sharded",
        ),
        ("sortnet", {}, "changes with the progress of the training"),
        ("liresnet", {"width": 8, "depth": 1, "features": 8, "dense": 1}, "no matrix of this network's body"),
    ],
)
def test_networks_without_a_matrix_to_shard_are_refused(
    system: str, model: dict[str, Any], message: str
) -> None:
    assert message in sharded_owners(World(0, 2), system, model)


def _no_shards(*args: Any, **kwargs: Any) -> Tensor:
    raise AttributeError("no such method")


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "init_device_mesh", _no_shards)
    monkeypatch.setattr(owner, "SMALL", 64)
    with pytest.raises(ConfigError, match=r"install torch 2\.8 or newer"):
        Owners(network(experiment()), World(0, 2), shard=True)


def test_the_loop_asks_before_it_trains() -> None:
    loop.check_shard(experiment("train.shard=true", "train.activations=checkpoint").train)
