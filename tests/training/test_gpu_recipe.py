"""The recipe for one GPU, on whatever device is at hand, and what it needs: images on the device, checkpoints in parts."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import SignalAt, assert_same
from tiny_runs import SHAPE, experiment, network, pictures

from lipnext import planning, runs, systems
from lipnext.core.errors import BundleError, ConfigError
from lipnext.core.experiment import AugmentSpec, Experiment
from lipnext.core.seed import generator
from lipnext.data.augment import Augment
from lipnext.data.batches import batches
from lipnext.data.dataset import Dataset
from lipnext.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from lipnext.training.loop import Interrupted, check_device, train

META = torch.device("meta")
"""A device of shapes without content: reading a value back raises, and so does mixing it with the CPU."""
DIGEST = "d" * 64
EVERYTHING = AugmentSpec(flip=True, crop=2, randaugment=0.7, cutout=3)


def coloured(count: int = 40) -> Dataset:
    rng = torch.Generator().manual_seed(3)
    images = torch.randint(256, (count, 3, 12, 12), generator=rng, dtype=torch.uint8)
    return Dataset(images=images, labels=torch.arange(count) % 2, classes=("a", "b"))


def dry(*changes: str) -> Experiment:
    """The recipe as docs/scale.md tries it out, smaller still and on pictures of 4 x 4."""
    small = ["train.device=cpu", "model.width=8", "model.depth=2", "model.patch=1", "model.shift=0.125"]
    return systems.experiment("lipnext/cifar10-gpu").override(
        [*small, "train.epochs=3", "train.batch_size=8", "augment.crop=1", *changes]
    )


def run(folder: Path, what: Experiment, reporter: SignalAt | None = None) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    net, _ = train(network(what), what, pictures(), pictures(12, seed=1), folder, reporter=reporter)
    return dict(net.state_dict())


# ---- the recipe


@pytest.mark.slow
def test_the_recipe_fits_a_run_of_25_minutes_by_its_plan() -> None:
    what = systems.experiment("lipnext/cifar10-gpu")
    rows = planning.plan(what, gpu="h200")["activations"]["keep"]
    assert rows["fits"]
    assert 60 * what.train.epochs * rows["epoch_hours"] < 25
    assert what.train.precision == "bfloat16"


@pytest.mark.parametrize("step", [1, 4, 6])
def test_an_interrupted_dry_run_ends_with_the_same_weights(step: int, tmp_path: Path) -> None:
    what = dry("train.checkpoint_part=1")
    whole = run(tmp_path / "whole", what)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", what, SignalAt(step, signal.SIGTERM))
    again = SignalAt(-1)
    assert_same(whole, run(tmp_path / "parts", what, again))
    assert again.lines[0].startswith(f"resumed from step-{step:09d}.parts.json")
    assert list_checkpoints(tmp_path / "parts" / "checkpoints")[-1].name == "step-000000009.parts.json"


def test_the_dry_run_is_one_command_and_says_how_fast_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    small = ["model.width=16", "model.depth=1", "train.device=cpu", "train.epochs=1", "train.batch_size=512"]
    digits = ["data.name=digits", "augment.crop=1", "data.validation=0.1"]
    result = runs.train("lipnext/cifar10-gpu", tmp_path / "run", overrides=[*small, *digits])
    (epoch,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    # the log rounds to a thousandth of a second
    assert 1024 / result["images_per_second"] == pytest.approx(epoch["seconds"], abs=1e-3)
    assert {path.suffix for path in (tmp_path / "run" / "checkpoints").iterdir()} == {
        ".json",
        ".part-0000",
    }


# ---- images on the device


def test_images_on_the_device_give_the_same_batches() -> None:
    settings: dict[str, Any] = {"seed": 1, "epoch": 2, "augment": Augment(EVERYTHING)}
    plain = list(batches(coloured(), 16, **settings))
    device = torch.device("cpu")
    there = list(batches(coloured().to(device), 16, device=device, **settings))
    assert_same(plain, there)


def test_augmentation_reads_nothing_back_and_stays_on_the_device() -> None:
    images = torch.empty(16, 3, 12, 12, device=META)
    for seed in range(8):
        changed = Augment(EVERYTHING)(images, generator("meta", seed))
        assert (changed.device, changed.shape) == (images.device, images.shape)


def test_random_numbers_do_not_depend_on_the_device() -> None:
    """The generator ends in the same state, so all draws were the same in number and kind."""
    here, there = generator("draws"), generator("draws")
    Augment(EVERYTHING)(coloured(16).float_images(), here)
    Augment(EVERYTHING)(torch.empty(16, 3, 12, 12, device=META), there)
    assert torch.equal(here.get_state(), there.get_state())


def test_images_that_stay_on_the_disk_cannot_be_on_the_device() -> None:
    class OnDisk:
        shape, classes = SHAPE, ("a", "b", "c")

        def __len__(self) -> int:
            return 24

    what = experiment("train.data_on_device=true", "data.name=shards")
    with pytest.raises(ConfigError, match=r"the images of 'shards' stay on the disk; set it to false, or"):
        check_device(what, OnDisk())  # type: ignore[arg-type]
    check_device(what, pictures())


# ---- checkpoints in parts


def state(size: int = 600_000) -> dict[str, Any]:
    return {"x": torch.arange(float(size), dtype=torch.float32), "n": 1}  # 2.4 MB


def test_a_checkpoint_in_parts_reads_back_exactly_and_no_file_is_larger_than_asked_for(
    tmp_path: Path,
) -> None:
    path = save_checkpoint(tmp_path, 7, state(), DIGEST, 1, part=1)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sorted(sizes) == [*(f"step-000000007.part-{k:04d}" for k in range(3)), "step-000000007.parts.json"]
    assert max(sizes.values()) == 10**6
    assert list_checkpoints(tmp_path) == [path]
    assert_same(load_checkpoint(path, DIGEST), state())
    whole = save_checkpoint(tmp_path, 8, state(), DIGEST, 1)
    assert [file.name for file in tmp_path.iterdir()] == [whole.name]


def test_parts_without_a_list_are_no_checkpoint_and_go_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_checkpoint(tmp_path, 1, state(), DIGEST, 2, part=1)
    replace = os.replace

    def power_cut(source: Any, target: Any) -> None:
        if "step-000000002.part-0002" in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", power_cut)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, state(), DIGEST, 2, part=1)
    assert (tmp_path / "step-000000002.part-0001").is_file()
    assert list_checkpoints(tmp_path) == [first]
    third = save_checkpoint(tmp_path, 3, state(), DIGEST, 2, part=1)
    assert not list(tmp_path.glob("step-000000002*"))
    assert list_checkpoints(tmp_path) == [first, third]
    assert_same(load_checkpoint(first, DIGEST), state())


def test_a_part_that_is_missing_damaged_or_of_another_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, state(), DIGEST, 1, part=1)
    parts = sorted(tmp_path.glob("*.part-*"))
    contents = [part.read_bytes() for part in parts]
    parts[1].write_bytes(contents[1][:500] + bytes([contents[1][500] ^ 1]) + contents[1][501:])
    with pytest.raises(BundleError, match=r"parts.json is damaged or no checkpoint \(its sha256 differs\)"):
        load_checkpoint(path, DIGEST)
    parts[1].unlink()
    with pytest.raises(BundleError, match=r"No such file .*; delete it to resume from an older one"):
        load_checkpoint(path, DIGEST)
    parts[1].write_bytes(contents[1])
    for text in ("{}", "[]", '{"parts": [1]}', "parts", '{"parts": []}'):
        path.write_text(text)
        with pytest.raises(BundleError, match="is damaged or no checkpoint"):
            load_checkpoint(path, DIGEST)
