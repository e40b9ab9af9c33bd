"""Mean shift: of the batch in training, with its gradient and for some features alone; of the average after."""

import math

import pytest
import torch

from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.mean_shift import MeanShift


def test_training_subtracts_the_mean_of_the_batch_and_its_gradient() -> None:
    shift = MeanShift(4).double().train()
    x = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    y = shift(x)
    torch.testing.assert_close(y, x - x.mean(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(shift.mean, 0.1 * x.mean(0).detach(), rtol=0, atol=1e-14)
    y[0].sum().backward()
    expected = torch.full((6, 4), -1 / 6, dtype=torch.float64)
    expected[0] += 1
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-14)


def test_each_feature_is_shifted_by_the_groups_that_have_it() -> None:
    shift = MeanShift(4).double().train()
    shift.mean.fill_(7.0)
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    columns = torch.tensor([[0, 2], [2, 3]])
    y = shift.shift(x, columns)
    means = [
        x[0, :, 0].mean(),
        torch.tensor(0.0),
        torch.cat([x[0, :, 1], x[1, :, 0]]).mean(),
        x[1, :, 1].mean(),
    ]
    for g in range(2):
        for k in range(2):
            torch.testing.assert_close(y[g, :, k], x[g, :, k] - means[columns[g, k]], rtol=0, atol=1e-14)
    expected = [6.3 + 0.1 * m.item() for m in means]
    expected[1] = 7.0  # no group has it
    assert shift.mean.tolist() == pytest.approx(expected, abs=1e-12)


def test_estimating_again_gives_the_average_of_equal_batches_whatever_was_there() -> None:
    shift = MeanShift(3).double()
    shift.mean.fill_(100.0)
    batches = torch.randn(5, 8, 3, dtype=torch.float64)
    for before, batch in enumerate(batches):
        found = shift.estimate_again(batch, before)
        torch.testing.assert_close(found, batch - batch.mean(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(shift.mean, batches.flatten(0, 1).mean(0), rtol=0, atol=1e-13)
    shift.eval()
    torch.testing.assert_close(shift(batches[0]), batches[0] - shift.mean, rtol=0, atol=0)


def test_the_box_is_that_of_a_translation_and_of_the_program() -> None:
    shift = MeanShift(50).eval()
    shift.mean.copy_(torch.randn(50))
    shift = shift.float()
    x = torch.randn(20, 50).float()
    executed = shift(x).double()
    shift = shift.double()
    assert shift.lipschitz_bound().value == 1.0
    assert shift.lipschitz_bound().norm == math.inf
    low, high = shift.box(x.double(), x.double(), UNIT_ROUNDOFF[torch.float32])
    assert ((low <= executed) & (executed <= high)).all()
    assert (high - low).max() < 1e-5
    low, high = shift.box(x.double() - 0.5, x.double() + 0.5, None)
    # Differences of float32 numbers of like size are exact in float64.
    assert ((low < x.double() - 0.5 - shift.mean) & (x.double() + 0.5 - shift.mean < high)).all()
    assert (high - low).max() < 1 + 1e-12


def test_there_is_no_bound_in_l2() -> None:
    with pytest.raises(UnsoundError, match="no rounding bound in l2"):
        MeanShift(2).rounding(RoundingState(norm=1.0, error=0.0, unit=2.0**-53))
