"""Two processes are one: the same batches, the same network, the same files, whoever started and whoever goes on."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together, values
from tiny_runs import SAME, SHAPE, assert_same_run, difference, experiment, newest_state, pictures

from lipnext.core.errors import ConfigError, TrainingError
from lipnext.core.experiment import Experiment
from lipnext.core.world import World
from lipnext.nn.linear_residual import LinearResidual
from lipnext.systems import build_network
from lipnext.training import loop, saving
from lipnext.training.checkpoint import list_checkpoints
from lipnext.training.loop import Interrupted, train
from lipnext.training.progress import Silent
from lipnext.training.validation import estimate_validation

DOUBLE = "train.precision=float64"
PER_EPOCH, STEPS = 3, 9


class At(Silent):
    """Does something to this process after `step` steps."""

    def __init__(self, step: int, act: Any) -> None:
        self.left, self.act = step, act

    def advance(self, count: int, note: str = "") -> None:
        self.left -= count
        if self.left == 0:
            self.act()


def run(world: World, folder: Path, what: Experiment, reporter: Silent | None = None) -> dict[str, Any]:
    network = build_network(what, SHAPE, 3)
    net, progress = train(
        network, what, pictures(), pictures(7, seed=1), folder, reporter=reporter, world=world
    )
    return {"step": progress.step, **{name: tensor.clone() for name, tensor in net.state_dict().items()}}


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def assert_same_as_one(size: int, work: Any, what: Experiment, folder: Path) -> None:
    """`work` in several processes gives the weights, the checkpoint and the log of `run` in one."""
    (one,) = values(together(1, run, new(folder / "one"), what))
    several = values(together(size, work, new(folder / "several"), what))
    for other in several:
        assert difference(one, other) < SAME
        assert difference(several[0], other) == 0
    assert_same_run(folder / "one", folder / "several", what)


EVERYTHING = ["optim.clip=0.5", "train.accumulate=2", DOUBLE]
CASES = {
    "muon": experiment(*EVERYTHING),
    "adam": experiment("optim.name=adam", "optim.euclidean=adam", DOUBLE),
    "plain": experiment("train.ema=0", "optim.lookahead=0", "optim.euclidean=sgd", "loss.name=hinge", DOUBLE),
}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("size", "name"),
    [
        *((2, "muon"), (3, "adam"), (2, "plain")),
        *(pytest.param(3, name, marks=pytest.mark.slow) for name in ("muon", "plain")),
    ],
)
def test_several_processes_train_the_network_of_one(size: int, name: str, tmp_path: Path) -> None:
    assert_same_as_one(size, run, CASES[name], tmp_path)


@pytest.mark.dist
def test_a_layer_that_takes_the_mean_of_the_batch_takes_that_of_all_processes(tmp_path: Path) -> None:
    what = experiment(DOUBLE).model_copy(
        update={"system": "liresnet", "model": {"width": 8, "depth": 2, "features": 8, "dense": 1}}
    )
    (one,) = values(together(1, run, new(tmp_path / "one"), what))
    for other in values(together(2, run, new(tmp_path / "two"), what)):
        assert difference(one, other) < SAME


def state_bytes(world: World, folder: Path) -> tuple[int, int]:
    """Train two steps; return the bytes of all state that this process keeps beside the weights, and of the weights."""
    parts: list[Any] = []
    gather = saving.gather_state

    def spy(given: Any, owners: Any) -> Any:
        parts.append({name: part for name, (part, _) in given.items() if part is not None})
        return gather(given, owners)

    saving.gather_state = spy
    what = experiment("model.width=64", "model.depth=4", "train.epochs=1", "optim.lookahead=2")
    run(world, folder, what)
    kept = parts[0]
    weights = sum(p.nbytes for p in kept["network"].parameters.values())
    tensors = [
        *(t for name in ("manifold", "rest") for s in kept[name].state.values() for t in s.values()),
        *kept["lookahead"].slow,
        *kept["average"].average.values(),
    ]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)), weights


@pytest.mark.dist
def test_state_lives_once_in_all_processes_together(tmp_path: Path) -> None:
    found = {}
    for size in (1, 2, 4):
        outcomes = values(together(size, state_bytes, new(tmp_path / str(size))))
        found[size] = [held for held, _ in outcomes]
    whole, weights = found[1][0], outcomes[0][1]
    assert whole > 4 * 0.9 * weights  # momentum, Lookahead's slow copy and travel, and the average
    for size, share in ((2, 0.51), (4, 0.26)):
        assert max(found[size]) <= share * whole
        assert abs(sum(found[size]) - whole) <= 64 * size  # counters of one number


def stop(world: World, folder: Path, what: Experiment, step: int, number: int) -> int:
    """One process gets a signal after `step` steps; return the exit code."""
    reporter = At(step, lambda: os.kill(os.getpid(), number)) if world.rank == world.size - 1 else None
    with pytest.raises(Interrupted) as error:
        run(world, folder, what, reporter)
    return int(str(error.value.code))


@pytest.mark.dist
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_as_if_nothing_had_happened(
    before: int, after: int, tmp_path: Path
) -> None:
    what = experiment("optim.clip=0.5", DOUBLE)
    values(together(1, run, new(tmp_path / "whole"), what))
    folder = new(tmp_path / "parts")
    for step, size, number in ((2, before, signal.SIGTERM), (2, after, signal.SIGINT)):
        codes = values(together(size, stop, folder, what, step, number))
        assert codes == [128 + number] * size
    assert newest_state(folder, what)["progress"]["step"] == 4
    values(together(before, run, folder, what))
    assert_same_run(tmp_path / "whole", folder, what)


@pytest.mark.dist
@pytest.mark.parametrize("step", [PER_EPOCH, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_a_signal_at_the_end_of_an_epoch_stops_all_too(step: int, tmp_path: Path) -> None:
    what = experiment("train.checkpoint_every=2", DOUBLE)
    assert values(together(2, stop, new(tmp_path / "run"), what, step, signal.SIGTERM)) == [143, 143]
    assert newest_state(tmp_path / "run", what)["progress"]["step"] == step


class Spoiled(loop.Objective):
    """A loss that is not finite on the last process in the second epoch."""

    rank = 0

    def of(self, *args: Any) -> torch.Tensor:
        loss = super().of(*args)
        return loss * torch.nan if Spoiled.rank == 1 and args[3] > 0.4 else loss


def spoil(world: World, folder: Path, what: Experiment) -> None:
    loop.Objective, Spoiled.rank = Spoiled, world.rank
    run(world, folder, what)


@pytest.mark.dist
def test_a_loss_that_is_not_finite_on_one_process_stops_all(tmp_path: Path) -> None:
    what = experiment(DOUBLE)
    first, second = together(2, spoil, new(tmp_path / "run"), what)
    kept = tmp_path / "run" / "checkpoints" / "step-000000003.safetensors"
    assert isinstance(first, TrainingError)
    assert isinstance(second, TrainingError)
    assert str(first) == str(second)
    assert str(first).startswith(
        f"the loss became nan at step 4 (epoch 2); the last good checkpoint is {kept};"
    )
    assert list_checkpoints(kept.parent) == [kept]
    assert all(
        bool(t.isfinite().all()) for t in newest_state(tmp_path / "run", what)["network"]["held"].values()
    )


def die(world: World, folder: Path, what: Experiment, victim: int) -> float:
    """The victim is killed in the second epoch; return how long it took the other to notice."""
    died = [0.0]

    def act() -> None:
        died[0] = time.monotonic()
        if world.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(
        TrainingError, match=r"another process of this job has ended .*the last checkpoint is int"
    ):
        run(world, folder, what, At(4, act))
    return time.monotonic() - died[0]


@pytest.mark.dist
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others_and_the_checkpoint_is_intact(victim: int, tmp_path: Path) -> None:
    what = experiment(DOUBLE)
    outcomes = together(2, die, new(tmp_path / "run"), what, victim)
    assert outcomes.pop(victim) == -signal.SIGKILL
    assert values(outcomes)[0] < 10
    assert newest_state(tmp_path / "run", what)["progress"]["step"] == PER_EPOCH


def fill_the_disk(world: World, folder: Path, what: Experiment) -> None:
    (folder / "checkpoints").write_text("a file where the folder should be")
    run(world, folder, what)


@pytest.mark.dist
def test_a_checkpoint_that_cannot_be_written_ends_all_with_the_reason(tmp_path: Path) -> None:
    outcomes = together(2, fill_the_disk, new(tmp_path / "run"), experiment(DOUBLE))
    for outcome in outcomes:
        assert isinstance(outcome, TrainingError)
        assert "cannot write checkpoint" in str(outcome)


def estimates(world: World) -> list[dict[str, object]]:
    network = build_network(experiment(), SHAPE, 3).double().eval()
    return [
        estimate_validation(network, pictures(n, seed=2), ("1/255", "36/255"), 2, world) for n in (1, 7, 12)
    ]


@pytest.mark.dist
def test_every_image_of_the_validation_part_is_looked_at_once(tmp_path: Path) -> None:
    (one,) = values(together(1, estimates))
    for several in values(together(3, estimates)):
        assert difference(one, several) < SAME


@pytest.mark.parametrize("spec", ["train.accumulate=9", "train.batch_size=2"])
def test_a_batch_that_is_too_small_is_refused(spec: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size: \d images cannot be cut into . x . parts"):
        run(World(0, 3) if "batch" in spec else World(), tmp_path, experiment(spec))
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_takes_the_mean_of_the_batch_refuses_parts_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"width": 8, "depth": 1, "features": 8, "dense": 1}
    what = experiment().model_copy(update={"system": "liresnet", "model": model})
    refused = "in a LinearResidual an image depends on the others of its batch, .* set train.accumulate to 1"
    with pytest.raises(ConfigError, match=f"{refused}$"):
        run(World(), tmp_path, what.override(["train.accumulate=2"]))
    monkeypatch.setattr(LinearResidual, "batch_parts", "none")
    with pytest.raises(ConfigError, match=f"{refused}, and start one process"):
        run(World(0, 2), tmp_path, what)
    run(World(), tmp_path, what)
