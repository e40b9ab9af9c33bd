"""The linear residual block against sums over channels and batches, and against its dense Jacobian."""

import math

import pytest
import torch
from helpers import jacobian, spectral_norm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.linear_residual import LinearResidual


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block(channels: int = 3, size: tuple[int, int] = (4, 5), depth: int = 4, seed: int = 0) -> LinearResidual:
    """A block in float64 that is far from its start: large weights, its own gamma, bias and running mean."""
    made = LinearResidual(channels, size, depth, generator=rng(seed)).double()
    assert made.theta is not None
    assert made.gamma is not None
    assert made.mean is not None
    for tensor, size_of in ((made.theta, 0.3), (made.gamma, 1.0), (made.bias, 0.5), (made.mean, 0.5)):
        nn.init.normal_(tensor, std=size_of, generator=rng(seed + 1))
    return made


def slow_kernel(made: LinearResidual) -> Tensor:
    assert made.theta is not None
    assert made.gamma is not None
    kernel = torch.zeros_like(made.theta)
    for o in range(made.channels):
        for i in range(made.channels):
            kernel[o, i] = made.gamma[o, 0, 0, 0] * made.theta[o, i] / math.sqrt(made.depth)
            kernel[o, i, 1, 1] += o == i
    return kernel


def test_the_kernel_is_near_the_identity_and_scaled_by_row() -> None:
    made = block()
    torch.testing.assert_close(made.kernel(), slow_kernel(made), rtol=0, atol=1e-15)
    fresh = LinearResidual(64, (2, 2), 9, generator=rng())
    assert fresh.theta is not None
    assert fresh.theta.std().item() == pytest.approx(1 / (9 * 64), rel=0.02)
    assert fresh.gamma is not None
    assert bool((fresh.gamma == 1).all())
    assert fresh.bias.abs().max() == 0


@torch.no_grad()
def test_training_takes_the_residual_s_mean_away_and_remembers_it() -> None:
    made = block()
    assert made.mean is not None
    before = made.mean.clone()
    images = torch.randn(6, 3, 4, 5, generator=rng(3))
    moved = functional.conv2d(images, slow_kernel(made), padding=1) - images
    mean = torch.stack([moved[:, c].sum() / (6 * 4 * 5) for c in range(3)])
    wanted = images + moved + (made.bias - mean)[:, None, None]
    torch.testing.assert_close(made(images), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(made.mean, before + 0.1 * (mean - before), rtol=0, atol=1e-14)
    followed = made.mean.clone()
    made.eval()
    shift = (made.bias - followed)[:, None, None]
    torch.testing.assert_close(made(images), images + moved + shift, rtol=0, atol=1e-12)
    assert torch.equal(made.mean, followed)


def test_gradients_flow_through_the_mean() -> None:
    made = block()
    images = torch.randn(2, 3, 4, 5, generator=rng(3))
    made(images).sum().backward()
    # the sum over all positions of what is centred does not depend on the weights
    assert made.theta is not None
    assert made.theta.grad is not None
    assert made.theta.grad.abs().max() < 1e-12
    assert made.bias.grad is not None
    torch.testing.assert_close(made.bias.grad, torch.full((3,), 40.0))


def test_half_precision_keeps_the_stream_and_the_mean() -> None:
    made = LinearResidual(4, (4, 4), 2, generator=rng()).float()
    images = torch.rand(8, 4, 4, 4, generator=rng(1), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(images)
    assert out.dtype == torch.float32
    assert made.mean is not None
    assert made.mean.dtype == torch.float32
    assert made.bias.dtype == torch.float32


@given(
    channels=st.integers(1, 3),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    depth=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_the_constant_is_proved_from_above_and_estimated_from_below(
    channels: int, size: tuple[int, int], depth: int, seed: int
) -> None:
    made = block(channels, size, depth, seed).eval()
    truth = spectral_norm(jacobian(made, torch.zeros(1, channels, *size)))
    assert truth <= made.lipschitz_bound().value * (1 + 1e-12)
    # 100 iterations on at most 75 pixels
    estimate = [made.estimate_lipschitz().item() for _ in range(10)][-1]
    assert 0.95 * truth < estimate <= truth * (1 + 1e-12)


def test_the_estimates_of_a_row_of_blocks_are_those_of_one_grouped_convolution() -> None:
    """Ten steps from the same start, all blocks side by side as groups, as published; then one gradient."""
    depth, channels, size = 3, 4, (5, 5)
    blocks = [block(channels, size, depth, seed) for seed in range(depth)]
    kernels = torch.cat([made.kernel() for made in blocks])
    x = torch.cat([made.image for made in blocks], dim=1)
    with torch.no_grad():
        for _ in range(10):
            x = functional.conv2d(x, kernels, padding=1, groups=depth)
            x = functional.conv_transpose2d(x, kernels, padding=1, groups=depth)
            x = functional.normalize(x.reshape(depth, -1), dim=1).reshape(1, -1, *size)
    norms = functional.conv2d(x, kernels, padding=1, groups=depth).reshape(depth, -1).norm(dim=1)
    product = torch.stack([made.estimate_lipschitz() for made in blocks]).prod()
    torch.testing.assert_close(product, norms.prod(), rtol=1e-12, atol=0)
    assert blocks[0].theta is not None
    ours = torch.autograd.grad(product, blocks[0].theta)[0]
    theirs = torch.autograd.grad(norms.prod(), blocks[0].theta)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([made.image for made in blocks], dim=1), x, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_materialised_block_is_the_same_function_of_one_stored_kernel() -> None:
    made = block().eval()
    stored = made.materialise()
    images = torch.randn(3, 3, 4, 5, generator=rng(2))
    assert torch.equal(stored(images), made(images))
    assert set(stored.state_dict()) == {"weight", "bias"} == set(stored.materialise().state_dict())
    assert torch.equal(stored.train()(images), made(images))  # nothing is left to follow a batch
    assert stored.lipschitz_bound() == made.lipschitz_bound()
    assert stored.weight is not None
    stored.weight.mul_(2.0)
    assert stored.lipschitz_bound().value == pytest.approx(2 * made.lipschitz_bound().value)


@torch.no_grad()
def test_float32_stays_within_the_propagated_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = block().eval().materialise().float()
    x = torch.rand(64, 3, 4, 5, generator=rng(2), dtype=torch.float32)
    longest = x.double().flatten(1).norm(dim=1).max().item() * (1 + 1e-14)
    start = RoundingState(norm=longest, error=0.0, unit=UNIT_ROUNDOFF[torch.float32])
    state = stored.rounding(start)
    exact = functional.conv2d(x.double(), stored.kernel().double(), stored.bias.double(), padding=1)
    error = (stored(x).double() - exact).flatten(1).norm(dim=1).max().item()
    assert 0 < error <= state.error
    assert exact.flatten(1).norm(dim=1).max().item() <= state.norm * (1 + 1e-12)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with pytest.raises(UnsoundError, match="without oneDNN"):
        stored.rounding(start)
