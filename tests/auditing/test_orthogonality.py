from typing import ClassVar

import pytest
import torch
from torch import nn

from lipnext.auditing.orthogonality import gram_residual, residuals, singular_values
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import DataError
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState


def with_singular_values(values: list[float]) -> torch.Tensor:
    n = len(values)
    left, right = torch.linalg.qr(torch.randn(2, n, n)).Q
    return left @ torch.diag(torch.tensor(values)) @ right.mT


def test_the_residual_is_the_largest_departure_of_a_squared_singular_value_from_one() -> None:
    assert gram_residual(with_singular_values([1.0, 1.1, 0.8])).item() == pytest.approx(0.36, abs=1e-12)
    assert gram_residual(with_singular_values([1.0, 1.2, 0.9])).item() == pytest.approx(0.44, abs=1e-12)


def test_orthogonal_matrices_have_none_and_every_matrix_of_a_stack_is_measured() -> None:
    stack = torch.linalg.qr(torch.randn(3, 20, 20)).Q
    stack[1] *= 1 + 1e-6
    measured = gram_residual(stack)
    assert measured.dtype == torch.float64
    assert measured[[0, 2]].max() < 1e-13
    assert measured[1].item() == pytest.approx(2e-6, rel=1e-5)


def test_float32_matrices_are_measured_in_float64() -> None:
    weight = torch.eye(4, dtype=torch.float32) * (1 + 2**-20)
    assert gram_residual(weight).item() == pytest.approx(2**-19 + 2**-40, rel=1e-9)


def test_singular_values_come_back_in_order() -> None:
    values = singular_values(with_singular_values([0.5, 2.0, 1.0]).float())
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx([2.0, 1.0, 0.5], rel=1e-6)


class Rotation(LipschitzModule):
    orthogonal: ClassVar[tuple[str, ...]] = ("weight", "dropped")

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.dropped: nn.Parameter | None = None
        self.bias = nn.Parameter(torch.zeros(3, 3))

    def lipschitz_bound(self) -> LipschitzBound:
        return LipschitzBound(value=1.0, norm=2.0, proof="isometry")

    def rounding(self, state: RoundingState) -> RoundingState:
        return state


def test_the_declared_parameters_of_a_network_are_measured_by_name() -> None:
    stack = torch.stack([torch.eye(3), 1.5 * torch.eye(3)])
    net = nn.Sequential(Rotation(torch.eye(3)), nn.Linear(3, 3), Rotation(stack))
    assert residuals(net) == pytest.approx({"0.weight": 0.0, "2.weight": 1.25})
    assert residuals(net[0]) == {"weight": 0.0}


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), r"needs matrices \(\.\.\., m, n\), got shape \(3,\)"),
        (torch.zeros(0, 3, 3), r"needs matrices \(\.\.\., m, n\), got shape \(0, 3, 3\)"),
        (torch.full((2, 2), float("nan")), "holds NaN or infinity"),
    ],
)
def test_bad_matrices_are_refused(weight: torch.Tensor, message: str) -> None:
    for measure in (gram_residual, singular_values):
        with pytest.raises(DataError, match=message):
            measure(weight)
