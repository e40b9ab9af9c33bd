"""What every layer owes: a bound above any Jacobian, and a rounding bound above what float32 does."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import jacobian, rotations, spectral_norm
from torch import Tensor

from lipnext.core.module import LipschitzModule
from lipnext.core.propagation import after_addition, after_affine, after_product, norm_up
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.activation import BetaAbs
from lipnext.nn.block import ShiftBlock
from lipnext.nn.head import UnitRowHead
from lipnext.nn.mixing import OrthogonalMixing
from lipnext.nn.pool import L2Pool, SpaceToDepth
from lipnext.nn.position import Centre, ChannelBias, PositionalEncoding
from lipnext.nn.shift import CircularShift

U = UNIT_ROUNDOFF[torch.float32]


@dataclass(frozen=True)
class Case:
    """A layer, the shape of one input, and whether its float32 arithmetic is exact."""

    make: Callable[[], LipschitzModule]
    shape: tuple[int, ...]
    exact: bool = False


TOKENS = (3, 4, 8)

CASES = {
    "centre": Case(lambda: Centre((2, 3, 4)), (2, 3, 4)),
    "space-to-depth": Case(lambda: SpaceToDepth(2, 16), (3, 5, 4), exact=True),
    "position": Case(lambda: PositionalEncoding(3, 4, 8), TOKENS),
    "position-each": Case(lambda: PositionalEncoding(3, 4, 8, each=True), TOKENS),
    "bias": Case(lambda: ChannelBias(8, 12), TOKENS),
    "mixing": Case(lambda: OrthogonalMixing(8), TOKENS),
    "shift": Case(lambda: CircularShift(8, 2), TOKENS, exact=True),
    "beta-abs": Case(lambda: BetaAbs(4), TOKENS, exact=True),
    "pool": Case(lambda: L2Pool(12), TOKENS),
    "head": Case(lambda: UnitRowHead(8, 5), (8,)),
    "block": Case(lambda: ShiftBlock(8, (3, 4), group=1, folded=4), TOKENS),
    "block-materialised": Case(lambda: ShiftBlock(8, (3, 4), group=2, folded=8).materialise(), TOKENS),
    "block-each": Case(lambda: ShiftBlock(8, (3, 4), group=1, folded=4, each=True), TOKENS),
    "block-plain": Case(lambda: ShiftBlock(8, (3, 4), group=0, folded=0), TOKENS),
}


def _build(case: Case, seed: int, dtype: torch.dtype = torch.float64) -> LipschitzModule:
    """The layer with every weight away from its start; orthogonal ones a little off the manifold."""
    generator = torch.Generator().manual_seed(seed)
    layer = case.make()
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 2 and parameter.shape[0] == parameter.shape[1]:
                parameter.copy_(rotations(n=len(parameter), seed=seed) + 1e-3 * noise)
            else:
                parameter.copy_(noise)
    return layer.to(dtype)


def _input(case: Case, seed: int, *batch: int) -> Tensor:
    """Numbers in [0, 1]: what images are, and as good as any for tokens."""
    return torch.rand(*batch, *case.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
def test_the_bound_is_above_the_jacobian_everywhere(name):
    case = CASES[name]
    largest = 0.0
    for seed in range(4):
        layer = _build(case, seed)
        x = _input(case, seed, 1) - 0.5 * (name != "centre")
        norm = spectral_norm(jacobian(layer, x))
        bound = layer.lipschitz_bound()
        assert bound.norm == 2.0
        assert norm <= bound.value + 1e-13  # the SVD's own error
        largest = max(largest, norm / bound.value)
    # and the bound is attained to a few per cent, so a wrong factor would show (Gram iteration on 5 rows)
    assert largest > 0.95


@pytest.mark.parametrize("name", CASES)
def test_pairs_never_move_apart_by_more_than_the_bound(name):
    case = CASES[name]
    layer = _build(case, 7)
    x = _input(case, 7, 64)
    for scale in (1e-3, 1.0):
        y = x + scale * torch.randn(x.shape)
        moved = (layer(x) - layer(y)).flatten(1).norm(dim=1)
        assert (moved <= layer.lipschitz_bound().value * (x - y).flatten(1).norm(dim=1) * (1 + 1e-12)).all()


@pytest.mark.parametrize("incoming", [0.0, 1e-5])
@pytest.mark.parametrize("name", CASES)
def test_measured_float32_error_is_below_the_rounding_bound(name, incoming):
    """`layer(x)` in float32 on a perturbed input against float64 on the exact one."""
    case = CASES[name]
    layer = _build(case, 3, torch.float32)
    exact_layer = layer.materialise().double()  # what the certificate speaks of: products formed in float32
    # the network's state bounds every image at once; a bound per sample would not cover the centred ones
    norm = math.sqrt(math.prod(case.shape))
    exact = _input(case, 5, 32)
    direction = torch.randn(exact.shape).flatten(1)
    shift = incoming * (direction / direction.norm(dim=1, keepdim=True)).view(exact.shape)
    computed = (exact + shift).float()
    error = (computed.double() - exact).flatten(1).norm(dim=1).max().item()
    state = layer.rounding(RoundingState(norm=norm, error=error, unit=U))
    with torch.no_grad():
        truth = exact_layer(exact)
        measured = (layer(computed).double() - truth).flatten(1).norm(dim=1).max().item()
    assert measured <= state.error
    assert truth.flatten(1).norm(dim=1).max() <= state.norm
    assert state.unit == U
    assert state.error < 1e-3  # a bound that says nothing would pass the rest
    if case.exact:
        assert state == RoundingState(norm=norm, error=error, unit=U)


@pytest.mark.parametrize("name", ["mixing", "pool", "head", "block", "position", "bias", "centre"])
def test_an_inexact_layer_charges_for_it(name):
    layer = _build(CASES[name], 0)
    state = layer.rounding(RoundingState(norm=1.0, error=0.0, unit=U))
    assert state.error >= U


def test_a_bias_that_enters_the_sum_first_is_rounded_with_every_term():
    """`addmm` may start its sum at the bias. A product and then one addition would not cover that."""
    c = 64
    hadamard = torch.ones(1, 1)
    while len(hadamard) < c:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)], 0)
    w = hadamard / 8  # orthogonal, exact in binary
    x = torch.full((c,), 8 * 1.01 * U)  # each product is a little over half an ulp of 1, and rounds up to one
    b = torch.zeros(c)
    b[0] = 1.0
    total = b.float()
    for j in range(c):
        total = total + (w[:, j] * x[j]).float()
    measured = (total.double() - (w @ x + b)).norm().item()
    absolute = 8.0  # || |W| ||_2 of a matrix of 1/8
    start = RoundingState(norm=norm_up(x), error=0.0, unit=U)
    apart = after_addition(after_product(start, c, 1.0, absolute), norm_up(b))
    together = after_affine(start, c, 1.0, absolute, norm_up(b))
    assert apart.error < measured <= together.error


@pytest.mark.parametrize("name", ["block", "block-materialised", "block-plain"])
def test_the_fused_block_charges_at_least_what_its_layers_would_one_by_one(name):
    """No bound may shrink because operations are fused; measured errors are too small to tell."""
    block = _build(CASES[name], 2)
    start = RoundingState(norm=3.0, error=1e-9, unit=U)
    state = start
    for layer in block.layers():
        state = layer.rounding(state)
    fused = block.rounding(start)
    # terms of order u^2 = 4e-15 are bounded differently
    assert state.error * (1 - 1e-6) <= fused.error <= 2 * state.error
    assert fused.norm == pytest.approx(state.norm, rel=1e-12)


def test_norm_up_is_never_below_the_norm():
    v = torch.randn(1000)
    exact = torch.linalg.vector_norm(v).item()
    assert exact * (1 - 1e-14) <= norm_up(v) <= exact * (1 + 1e-14)
    assert norm_up(v, copies=4) == pytest.approx(2 * exact, rel=1e-14)
    assert norm_up(torch.zeros(3)) < 1e-150
    assert norm_up(torch.tensor([3.0, 4.0], dtype=torch.float32)) >= 5.0


@pytest.mark.parametrize("name", CASES)
def test_asking_for_a_bound_leaves_the_generator_alone(name):
    layer = _build(CASES[name], 0)
    before = torch.get_rng_state()
    layer.lipschitz_bound()
    layer.rounding(RoundingState(norm=1.0, error=0.0, unit=U))
    layer.materialise()
    assert torch.equal(torch.get_rng_state(), before)
