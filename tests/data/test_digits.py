import numpy as np
import torch
from sklearn.datasets import load_digits

from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import load


def test_all_digits_appear_once_in_one_part() -> None:
    splits = load(DataSpec())
    parts = (splits.train, splits.validation, splits.test)
    stored = load_digits()
    expected = np.array([[round(value * 255 / 16) for value in image.flatten()] for image in stored.images])
    pairs = [
        (image.tobytes(), label)
        for image, label in zip(expected.astype(np.uint8), stored.target, strict=True)
    ]
    found = [
        (image.numpy().tobytes(), int(label))
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    assert sorted(found) == sorted(pairs)
    assert splits.train.shape == (1, 8, 8)
    assert splits.train.classes == tuple("0123456789")
    assert int(splits.train.images.max()) == 255


def test_shares_hold_in_each_class() -> None:
    splits = load(DataSpec(test=0.25, validation=0.2))
    counts = torch.from_numpy(load_digits().target).bincount()
    test, validation = splits.test.labels.bincount(), splits.validation.labels.bincount()
    assert ((test - 0.25 * counts).abs() <= 0.5).all()
    assert ((validation - 0.2 * (counts - test)).abs() <= 0.5).all()


def test_the_seed_decides_the_split() -> None:
    first, again, other = (load(DataSpec(seed=seed)) for seed in (0, 0, 1))
    assert first.test.sha256() == again.test.sha256() != other.test.sha256()
    assert first.train.sha256() == again.train.sha256() != other.train.sha256()


def test_the_validation_share_does_not_move_the_test_part() -> None:
    assert load(DataSpec(validation=0.1)).test.sha256() == load(DataSpec(validation=0.3)).test.sha256()
