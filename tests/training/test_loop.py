import errno
import inspect
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import experiment, log_lines, network, pictures

from lipnext.core.errors import BundleError, ConfigError, TrainingError
from lipnext.core.experiment import AugmentSpec, Experiment
from lipnext.core.network import LipschitzNetwork
from lipnext.manifold.polar import residual
from lipnext.training import checkpoint, loop
from lipnext.training.loop import Interrupted, Progress, resolve_device, resolve_precision, train
from lipnext.training.progress import Silent

PER_EPOCH, STEPS = 3, 9
PRECISIONS = ("float32", "float64", "bfloat16")
# The command line runs under the default dtype float32, other programs may not.
STATES = [(name, precision, torch.float32) for name in ("muon", "adam") for precision in PRECISIONS]
STATES += [("adam", "float32", torch.float64)]


class SignalAt(Silent):
    """Sends signals to this process after `step` steps, while the loop is between two of them."""

    def __init__(self, step: int, *signals: int) -> None:
        self.left, self.signals = step, signals
        self.lines: list[str] = []

    def advance(self, count: int, note: str = "") -> None:
        self.left -= count
        if self.left == 0:
            for number in self.signals:
                os.kill(os.getpid(), number)

    def line(self, text: str) -> None:
        self.lines.append(text)


def run(folder: Path, what: Experiment, reporter: Silent | None = None) -> tuple[LipschitzNetwork, Progress]:
    folder.mkdir(exist_ok=True)
    return train(network(what), what, pictures(), pictures(12, seed=1), folder, reporter=reporter)


def interrupted(folder: Path, what: Experiment, step: int, *signals: int) -> SignalAt:
    reporter = SignalAt(step, *signals)
    with pytest.raises(Interrupted) as stop:
        run(folder, what, reporter)
    assert stop.value.code == 128 + signals[-1]
    return reporter


def newest(folder: Path, what: Experiment) -> dict[str, Any]:
    return checkpoint.load_checkpoint(checkpoint.list_checkpoints(folder / "checkpoints")[-1], what.digest())


def assert_same(first: Any, second: Any, place: str = "") -> None:
    """Types, dtypes and every bit."""
    assert type(first) is type(second), place
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, place
        assert torch.equal(first, second), place
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_same(first[key], second[key], f"{place}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{place}/{index}")
    else:
        assert first == second, place


def assert_same_run(folder: Path, other: Path, what: Experiment) -> None:
    states = [newest(folder, what), newest(other, what)]
    for state in states:
        del state["progress"]["seconds"]
    assert_same(*states)
    assert log_lines(folder) == log_lines(other)


@pytest.mark.parametrize(("name", "precision", "default"), STATES)
def test_interrupting_at_every_step_changes_no_bit(
    name: str, precision: str, default: torch.dtype, tmp_path: Path
) -> None:
    torch.set_default_dtype(default)
    what = experiment(f"optim.name={name}", f"train.precision={precision}", "optim.clip=1")
    whole, _ = run(tmp_path / "whole", what)
    for step in range(1, STEPS + 1):
        interrupted(tmp_path / "parts", what, 1, signal.SIGTERM)
        assert newest(tmp_path / "parts", what)["progress"]["step"] == step
    parts, progress = run(tmp_path / "parts", what)
    assert progress.step == STEPS
    assert_same(dict(whole.state_dict()), dict(parts.state_dict()))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", what)


@pytest.mark.parametrize("step", [1, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 1, STEPS - 1, STEPS])
def test_a_run_goes_on_where_one_signal_ended_it(step: int, tmp_path: Path) -> None:
    number = signal.SIGTERM if step % 2 else signal.SIGINT
    what = experiment("train.checkpoint_every=2", "train.evaluate_every=2", "optim.retract_every=2")
    whole, _ = run(tmp_path / "whole", what)
    reporter = interrupted(tmp_path / "parts", what, step, number)
    assert reporter.lines[-1] == (f"interrupted; saved at step {step}; run the same command again to go on")
    resumed = SignalAt(-1)
    parts, _ = run(tmp_path / "parts", what, resumed)
    epoch = step // PER_EPOCH + 1
    assert resumed.lines[0] == f"resumed from step-{step:09d}.safetensors, epoch {epoch} of 3"
    assert_same(dict(whole.state_dict()), dict(parts.state_dict()))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", what)


def test_a_second_control_c_ends_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", experiment(), SignalAt(2, signal.SIGINT, signal.SIGINT))
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints") == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_without_averaging_and_lookahead_resumes_too(tmp_path: Path) -> None:
    what = experiment("train.ema=0", "optim.lookahead=0", "augment.crop=0")
    run(tmp_path / "whole", what)
    interrupted(tmp_path / "parts", what, 5, signal.SIGTERM)
    run(tmp_path / "parts", what)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", what)


@pytest.fixture
def augmented(monkeypatch: pytest.MonkeyPatch) -> list[AugmentSpec]:
    """What every batch was augmented by, in order."""
    seen: list[AugmentSpec] = []

    class Watched(loop.Augment):
        def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            seen.append(self.spec)
            return super().__call__(images, generator)

    monkeypatch.setattr(loop, "Augment", Watched)
    return seen


def test_the_last_epochs_see_images_that_are_only_flipped(
    augmented: list[AugmentSpec], tmp_path: Path
) -> None:
    what = experiment().override(["augment.flip=true", "augment.crop=1", "augment.until=0.5"])
    assert what.train.epochs == 3
    run(tmp_path, what)
    assert all(spec.flip for spec in augmented)
    assert [spec.crop for spec in augmented] == [1] * PER_EPOCH + [1] * PER_EPOCH + [0] * PER_EPOCH


def test_a_network_is_finalised_on_images_as_the_last_epoch_saw_them(
    augmented: list[AugmentSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(LipschitzNetwork, "finalise", lambda network, images: list(images))
    run(tmp_path, experiment("augment.until=0.5", "train.evaluate_every=3"))
    assert [spec.crop for spec in augmented] == [1] * 2 * PER_EPOCH + [0] * PER_EPOCH + [0] * PER_EPOCH


def test_events_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    what = experiment()
    run(tmp_path / "whole", what)
    interrupted(tmp_path / "parts", what, 5, signal.SIGTERM)
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "event": "epoch", "epoch": 2, "seconds": 1}\n{"step": 3, "event": "ep')
    run(tmp_path / "parts", what)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", what)


def test_training_learns_keeps_the_matrices_orthogonal_and_logs_it(tmp_path: Path) -> None:
    plain = ["augment.crop=0", "optim.lookahead=0", "optim.euclidean_lr=0.02", "loss.temperature=0.1"]
    what = experiment("train.epochs=12", "optim.lr=0.05", "train.ema=0", "loss.name=cross-entropy", *plain)
    net, progress = run(tmp_path / "run", what)
    lines = log_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [PER_EPOCH * k for k in range(1, 13)]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["validation_estimate"]["clean"] > 0.9
    assert lines[-1]["validation_estimate"]["cra"].keys() == set(what.certify.eps)
    assert not net.training
    assert progress.step == 12 * PER_EPOCH
    for block in net.body:
        for name in set(block.orthogonal) & dict(block.named_parameters()).keys():
            assert residual(getattr(block, name)).max() < 1e-5


def test_the_average_is_what_is_returned(tmp_path: Path) -> None:
    what = experiment()
    net, _ = run(tmp_path / "run", what)
    assert_same(newest(tmp_path / "run", what)["average"]["average"]["head.weight"], net.head.weight.detach())
    assert not torch.equal(newest(tmp_path / "run", what)["network"]["held"]["head.weight"], net.head.weight)


def test_no_more_than_the_wanted_checkpoints_stay(tmp_path: Path) -> None:
    run(tmp_path / "run", experiment("train.keep=1", "train.epochs=4"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "step-000000012.safetensors"
    ]


# ---- what goes wrong


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoiled(loop.Objective):
        def __call__(self, *args: Any) -> torch.Tensor:
            loss = super().__call__(*args)
            return loss * bad if args[-1] > 0.5 else loss  # in the middle of the second epoch

    monkeypatch.setattr(loop, "Objective", Spoiled)
    what = experiment()
    with pytest.raises(TrainingError) as error:
        run(tmp_path / "run", what)
    kept = tmp_path / "run" / "checkpoints" / "step-000000003.safetensors"
    assert str(error.value) == (
        f"the loss became {bad} at step 5 (epoch 2); the last good checkpoint is {kept}; lower optim.lr or "
        "optim.euclidean_lr, or set optim.clip, and train into a new --out"
    )
    assert checkpoint.list_checkpoints(kept.parent) == [kept]
    state = newest(tmp_path / "run", what)
    assert all(bool(t.isfinite().all()) for t in state["network"]["held"].values())


def test_a_learning_rate_that_is_too_large_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d+ \(epoch \d\); .*; lower optim.lr or optim.eucl"):
        run(tmp_path / "run", experiment("optim.euclidean_lr=1e38", "optim.warmup=0"))


@pytest.mark.parametrize("step", [3, PER_EPOCH, STEPS])
def test_weights_that_are_not_finite_are_never_saved(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the last step of an epoch is finite, its update is not."""

    class Spoiled(torch.optim.NAdam):
        count = 0

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            Spoiled.count += 1
            if Spoiled.count == step:
                self.param_groups[0]["params"][-1].data.fill_(torch.inf)

    monkeypatch.setattr(torch.optim, "NAdam", Spoiled)
    with pytest.raises(TrainingError, match=f"a weight is no longer finite at step {step} "):
        run(tmp_path / "run", experiment("train.epochs=3"), SignalAt(step, signal.SIGTERM))
    kept = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [int(path.stem[5:]) for path in kept] == [PER_EPOCH, 2 * PER_EPOCH][: (step - 1) // PER_EPOCH]


def test_a_full_disk_ends_the_run_and_the_old_checkpoint_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = experiment()
    whole, _ = run(tmp_path / "whole", what)
    interrupted(tmp_path / "run", what, 5, signal.SIGTERM)
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if str(target).endswith(".safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(TrainingError, match=r"cannot write checkpoint .*No space left on device; free"):
            run(tmp_path / "run", what)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000000003.safetensors", "step-000000005.safetensors"][-len(names) :]
    assert names
    parts, _ = run(tmp_path / "run", what)
    assert_same(dict(whole.state_dict()), dict(parts.state_dict()))


def test_a_damaged_newest_checkpoint_can_be_deleted_to_go_on_from_an_older_one(tmp_path: Path) -> None:
    what = experiment()
    run(tmp_path / "whole", what)
    interrupted(tmp_path / "run", what, 5, signal.SIGTERM)
    path = tmp_path / "run" / "checkpoints" / "step-000000005.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BundleError, match=r"step-000000005.safetensors is damaged .*delete it to resume"):
        run(tmp_path / "run", what)
    path.unlink()
    run(tmp_path / "run", what)
    assert_same_run(tmp_path / "whole", tmp_path / "run", what)


def test_a_checkpoint_of_another_experiment_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", experiment(), 2, signal.SIGTERM)
    with pytest.raises(BundleError, match=r"belongs to another experiment \(digest .*choose another --out"):
        run(tmp_path / "run", experiment("seed=1"))


@pytest.mark.parametrize("rule", ["nadam", "adam", "sgd"])
def test_the_euclidean_optimiser_is_the_one_named_and_may_have_nothing_to_do(rule: str) -> None:
    spec = experiment(f"optim.euclidean={rule}", "optim.euclidean_lr=0.5", "optim.weight_decay=0.1").optim
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = loop.make_euclidean_optimizer([parameter], spec)
    assert type(optimizer).__name__.lower() == {"adam": "adamw"}.get(rule, rule)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    # Without a gradient only the decay acts: 1 - lr decay, and Nesterov momentum 0.95 adds to it for sgd.
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.95 if rule != "sgd" else 0.9025))
    loop.make_euclidean_optimizer([], spec).step()
    loop.make_orthogonal_optimizer([], experiment()).retract()


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cuda", "cpu:x", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("here it is")
    with pytest.raises(ConfigError, match=f"train.device: '{name}' cannot be used here .*; cpu always can"):
        resolve_device(name)
    with pytest.raises(ConfigError, match="train"):
        resolve_precision(experiment(f"train.device={name}"))


def test_automatic_precision_is_resolved_once_and_for_all() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    resolved = resolve_precision(experiment("train.precision=auto"))
    assert resolved.train.precision in ("bfloat16", "float32")
    assert resolve_precision(resolved) is resolved


# ---- nothing is tuned on the test part


def test_the_loop_has_no_parameter_for_a_test_part() -> None:
    assert list(inspect.signature(train).parameters) == [
        "network", "experiment", "training", "validation", "folder", "losses", "reporter", "tensorboard",
        "world",
    ]  # fmt: skip
    assert "test" not in {name for name in vars(loop) if not name.startswith("__")}


def test_the_validation_part_does_not_change_the_weights_either(tmp_path: Path) -> None:
    what = experiment()
    nets = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        nets.append(train(network(what), what, pictures(), pictures(12, seed=seed), folder)[0])
    assert_same(dict(nets[0].state_dict()), dict(nets[1].state_dict()))
    first, second = (json.dumps(log_lines(tmp_path / seed)) for seed in "12")
    assert first != second
