import pytest
import torch

from lipnext.core.errors import ConfigError
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import load


def test_the_moons_are_images_of_two_numbers() -> None:
    splits = load(DataSpec(name="two-moons"))
    assert splits.train.shape == (1, 1, 2)
    assert splits.train.classes == ("upper", "lower")
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 4000
    assert splits.test.labels.bincount().tolist() == [400, 400]
    # No straight line separates them, but the mean of the upper one lies above that of the lower one.
    points = splits.train.float_images().flatten(1)
    means = [points[splits.train.labels == k].mean(0) for k in (0, 1)]
    assert means[0][1] > means[1][1] + 0.1
    assert torch.stack(means).mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_seed_decides_and_a_path_is_refused() -> None:
    one, other = (load(DataSpec(name="two-moons", seed=seed)).test.sha256() for seed in (0, 1))
    assert one != other
    assert load(DataSpec(name="two-moons")).test.sha256() == one
    with pytest.raises(ConfigError, match="the two-moons are built in, got 'x'"):
        load(DataSpec(name="two-moons", path="x"))
