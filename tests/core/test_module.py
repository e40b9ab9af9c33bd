"""The base class of layers is abstract, and what it declares survives a copy."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lipnext.core.bound import LipschitzBound
from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import RoundingState


class Rotation(LipschitzModule):
    orthogonal = ("weight",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def lipschitz_bound(self) -> LipschitzBound:
        return LipschitzBound(value=1.0, norm=2.0, proof="isometry")

    def rounding(self, state: RoundingState) -> RoundingState:
        return state


def test_a_layer_must_answer_for_its_bound_and_rounding() -> None:
    with pytest.raises(TypeError, match="abstract"):
        LipschitzModule()  # type: ignore[abstract]


def test_the_declaration_survives_deepcopy_and_materialise() -> None:
    layer = Rotation()
    for twin in (copy.deepcopy(layer), layer.materialise()):
        assert twin is not layer
        assert twin.weight is not layer.weight
        assert twin.orthogonal == ("weight",)
        assert torch.equal(twin(torch.ones(1, 2)), layer(torch.ones(1, 2)))
