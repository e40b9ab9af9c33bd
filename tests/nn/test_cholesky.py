"""Cholesky-orthogonal layers against substitution row by row, autograd, dense Jacobians and singular values."""

import copy
import math

import pytest
import torch
from helpers import jacobian, spectral_norm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lipnext.core.module import LipschitzModule
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.cholesky import OrthogonalDense, OrthogonalPatches, OrthogonalTrunk, orthogonalise

SINGLE = UNIT_ROUNDOFF[torch.float32]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow(x: Tensor) -> Tensor:
    """One matrix: `L L^T = X X^T + e I` entry by entry, then `L W = X` row by row."""
    rows = x.tolist()
    n, m = len(rows), len(rows[0])
    gram = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    ridge = 1e-3 * sum(gram[i][i] for i in range(n)) / n
    factor = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            rest = gram[i][j] + (ridge if i == j else 0.0)
            rest -= sum(factor[i][k] * factor[j][k] for k in range(j))
            factor[i][j] = math.sqrt(rest) if i == j else rest / factor[j][j]
    w = [[0.0] * m for _ in range(n)]
    for i in range(n):
        for c in range(m):
            done = sum(factor[i][k] * w[k][c] for k in range(i))
            w[i][c] = (rows[i][c] - done) / factor[i][i]
    return torch.tensor(w)


def by_autograd(x: Tensor) -> Tensor:
    """The same with torch's own derivatives, the ridge held constant."""
    gram = x @ x.mT
    ridge = 1e-3 * torch.diagonal(gram, dim1=-2, dim2=-1).mean(-1)[..., None, None].detach()
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(x.shape[-2]))
    return torch.linalg.inv(factor) @ x


SHAPES = [(1, 1), (3, 3), (3, 7), (2, 4, 4), (2, 3, 2, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrix_is_that_of_the_slow_reference(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=rng())
    w = orthogonalise(x)
    for fast, one in zip(w.reshape(-1, *shape[-2:]), x.reshape(-1, *shape[-2:]), strict=True):
        torch.testing.assert_close(fast, slow(one), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_backward_pass_is_that_of_autograd(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=rng())
    seen = torch.randn(shape, generator=rng(1))
    grads = []
    for function in (orthogonalise, by_autograd):
        leaf = x.clone().requires_grad_()
        (function(leaf) * seen).sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    # condition numbers of some hundred: float64 keeps more than ten digits
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
    assert grads[0].abs().max() > 1e-4


def test_the_backward_pass_is_a_difference_quotient() -> None:
    """Along directions that keep the trace of X X^T, in which the ridge does not move."""
    x, seen, direction = torch.randn(3, 3, 5, generator=rng())
    direction = direction - (direction * x).sum() / (x * x).sum() * x
    leaf = x.clone().requires_grad_()
    (orthogonalise(leaf) * seen).sum().backward()
    step = 1e-5
    ahead, behind = (((slow(x + s * direction)) * seen).sum() for s in (step, -step))
    # the second difference is of order step^2
    assert leaf.grad is not None
    assert (leaf.grad * direction).sum().item() == pytest.approx(
        ((ahead - behind) / (2 * step)).item(), abs=1e-7
    )


@given(n=st.integers(1, 6), extra=st.integers(0, 4), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 999))
def test_every_singular_value_is_drawn_up_to_one(n: int, extra: int, scale: float, seed: int) -> None:
    x = scale * torch.randn(n, n + extra, generator=rng(seed))
    s = torch.linalg.svdvals(x)
    ridge = 1e-3 * (s**2).sum() / n
    wanted = s / (s**2 + ridge).sqrt()
    torch.testing.assert_close(torch.linalg.svdvals(orthogonalise(x)), wanted, rtol=0, atol=1e-8)


def test_it_keeps_its_precision_under_autocast_and_its_calm_without_a_factor() -> None:
    x = torch.randn(4, 6, generator=rng(), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonalise(x), orthogonalise(x))
        assert orthogonalise(x).dtype == torch.float32
    torch.testing.assert_close(orthogonalise(x).double(), slow(x.double()), rtol=0, atol=1e-5)
    assert orthogonalise(torch.zeros(2, 3)).isnan().all()
    spoiled = torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)])
    assert orthogonalise(spoiled)[0].isfinite().all()
    assert orthogonalise(spoiled)[1].isnan().all()


# ---- layers

LAYERS: dict[str, tuple[LipschitzModule, tuple[int, ...]]] = {
    "dense": (OrthogonalDense(9, 6, generator=rng()), (9,)),
    "patches": (OrthogonalPatches(3, 2, generator=rng()), (3, 4, 6)),
    "padded patches": (OrthogonalPatches(2, 4, generator=rng()), (2, 7, 5)),
    "trunk": (OrthogonalTrunk(6, 3, generator=rng()), (6,)),
}


def layer(name: str) -> tuple[LipschitzModule, tuple[int, ...]]:
    """A copy in float64 whose biases are not zero."""
    original, shape = LAYERS[name]
    made = copy.deepcopy(original).double()
    for path, parameter in made.named_parameters():
        if path == "bias":
            nn.init.normal_(parameter, std=0.3, generator=rng(5))
    return made, shape


def test_dense_and_patches_apply_their_matrix() -> None:
    dense, _ = layer("dense")
    x = torch.randn(5, 9, generator=rng(1))
    assert isinstance(dense, OrthogonalDense)
    assert dense.parameter is not None
    torch.testing.assert_close(dense(x), x @ slow(dense.parameter).mT + dense.bias, rtol=0, atol=1e-12)
    patches, shape = layer("patches")
    assert isinstance(patches, OrthogonalPatches)
    assert patches.parameter is not None
    w, images = slow(patches.parameter), torch.randn(2, *shape, generator=rng(2))
    out = patches(images)
    assert out.shape == (2, 3, 2, 3)
    for i in range(2):
        for j in range(3):
            patch = images[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
            torch.testing.assert_close(out[:, :, i, j], patch @ w.mT, rtol=0, atol=1e-12)


def test_the_trunk_is_the_chain_of_its_layers() -> None:
    trunk, _ = layer("trunk")
    assert isinstance(trunk, OrthogonalTrunk)
    assert trunk.theta is not None
    assert trunk.gamma is not None
    nn.init.normal_(trunk.gamma, generator=rng(3))
    start = x = torch.randn(4, 6, generator=rng(1))
    for index in range(3):
        near_identity = torch.eye(6)
        for row in range(6):
            near_identity[row] += trunk.gamma[index, row, 0] * trunk.theta[index, row] / 3**0.5
        y = x @ slow(near_identity).mT + trunk.bias[index]
        x = torch.cat([torch.maximum(y[:, :3], y[:, 3:]), torch.minimum(y[:, :3], y[:, 3:])], dim=1)
    torch.testing.assert_close(trunk(start), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_a_bound_is_proved_for_the_stored_matrix_and_close_to_its_norm(name: str) -> None:
    made, shape = layer(name)
    for candidate in (made, made.materialise()):
        bound = candidate.lipschitz_bound().value
        assert 0.99 < bound < 1.0 + 1e-9  # all of X's singular values are far above the ridge's root
        if not isinstance(made, OrthogonalTrunk):
            truth = spectral_norm(jacobian(candidate, torch.zeros(1, *shape)))
            assert truth * (1 - 1e-12) <= bound <= truth * (1 + 1e-9)
    stored = made.materialise()
    with torch.no_grad():
        stored.weight.mul_(1.5)  # type: ignore[operator]
    power = stored.weight.shape[0] if isinstance(made, OrthogonalTrunk) else 1  # type: ignore[union-attr, index]
    assert stored.lipschitz_bound().value == pytest.approx(
        made.lipschitz_bound().value * 1.5**power, rel=1e-9
    )


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_two_points_are_never_driven_apart_by_more_than_the_bound(name: str) -> None:
    made, shape = layer(name)
    x, y = torch.randn(2, 64, *shape, generator=rng(1))
    ratio = (made(x) - made(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert ratio.max().item() <= made.lipschitz_bound().value * (1 + 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_a_materialised_copy_is_the_same_function_of_stored_matrices(name: str) -> None:
    made, shape = layer(name)
    stored = made.materialise()
    x = torch.randn(3, *shape, generator=rng(1))
    torch.testing.assert_close(
        stored(x), made(x), rtol=0, atol=1e-13
    )  # the layout of a matrix may change sums
    keys = {"weight"} if "patches" in name else {"weight", "bias"}
    assert set(stored.state_dict()) == keys == set(stored.materialise().state_dict())
    assert set(dict(made.named_parameters())) - keys <= {"parameter", "theta", "gamma"}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_float32_stays_within_the_propagated_error(name: str) -> None:
    made, shape = layer(name)
    stored = made.materialise().float()
    x = torch.rand(64, *shape, generator=rng(2), dtype=torch.float32)
    longest = x.double().flatten(1).norm(dim=1).max().item() * (1 + 1e-14)
    state = stored.rounding(RoundingState(norm=longest, error=0.0, unit=SINGLE))
    computed = stored(x).double()
    exact = stored.double()(x.double())
    error = (computed - exact).flatten(1).norm(dim=1).max().item()
    assert 0 < error <= state.error
    assert exact.flatten(1).norm(dim=1).max().item() <= state.norm * (1 + 1e-12)
