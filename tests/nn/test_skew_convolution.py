"""SOC against dense matrix exponentials, and its bound against the truncation that it covers."""

import copy
import math

import pytest
import torch
from helpers import jacobian, spectral_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lipnext.bounds.convolution import convolution_bound
from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.skew_convolution import TERMS, TRAINING_TERMS, SkewConvolution, transposed, unfolded


def layer(channels_in: int = 3, channels_out: int = 3, kernel: int = 3, seed: int = 0) -> SkewConvolution:
    generator = torch.Generator().manual_seed(seed)
    return SkewConvolution(channels_in, channels_out, kernel, (4, 3), generator=generator).double()


def with_norm(norm: float, seed: int = 0) -> SkewConvolution:
    """A materialised layer whose L is scaled to a norm; its kernel stays skew."""
    scaled = layer(seed=seed).eval().materialise()
    with torch.no_grad():
        scaled.weight.mul_(norm / spectral_norm(matrix(scaled.weight)))
    return scaled


def matrix(kernel: Tensor) -> Tensor:
    """The dense matrix of the convolution with a square kernel on 4 x 3 images."""
    c, _, k, _ = kernel.shape
    zero = torch.zeros(1, c, 4, 3, dtype=kernel.dtype)
    return jacobian(lambda x: functional.conv2d(x, kernel.detach(), padding=k // 2), zero)


def series(a: Tensor, terms: int) -> Tensor:
    """`sum of a^i / i! for i < terms`, power by power."""
    power, total = torch.eye(len(a), dtype=a.dtype), torch.zeros_like(a)
    for i in range(terms):
        total = total + power / math.factorial(i)
        power = power @ a
    return total


@settings(max_examples=15)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_it_is_the_series_of_a_skew_matrix_between_padding_and_leaving_out(
    sizes: tuple[int, int], kernel: int, seed: int
) -> None:
    net = layer(*sizes, kernel, seed)
    for mode, terms in ((net.train, 6), (net.eval, 15)):
        mode()
        frozen = copy.deepcopy(net)  # a call in training moves the vectors of the power iteration
        images = torch.randn(2, sizes[0], 4, 3, dtype=torch.float64)
        got, a = net(images), matrix(frozen.kernel())
        assert torch.equal(a, -a.mT)
        c = len(a) // 12
        padded = functional.pad(images, (0, 0, 0, 0, 0, c - sizes[0])).flatten(1)
        wanted = (padded @ series(a, terms).mT).view(2, c, 4, 3)[:, : sizes[1]] + net.bias.view(-1, 1, 1)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    exponential = torch.linalg.matrix_exp(a)
    torch.testing.assert_close(series(a, 15), exponential, rtol=0, atol=spectral_norm(a) ** 15 / 1e12)


def test_two_matrices_say_what_the_four_of_the_paper_say() -> None:
    net = layer(4, 4)
    skew = net.skew().detach()
    wide, square = (spectral_norm(m) for m in unfolded(skew))
    four = [
        skew.permute(0, 2, 1, 3).reshape(12, 12),
        skew.permute(0, 3, 1, 2).reshape(12, 12),
        skew.reshape(4, 36),
        skew.permute(0, 2, 3, 1).reshape(36, 4),
    ]
    norms = [spectral_norm(m) for m in four]
    assert min(wide, square) == pytest.approx(min(norms), rel=1e-12)
    assert sorted([wide, wide, square, square]) == pytest.approx(sorted(norms), rel=1e-12)
    assert spectral_norm(matrix(skew)) <= 3 * min(wide, square)
    assert spectral_norm(matrix(net.eval().kernel())) <= 3 * (1 + 1e-3)  # 50 power iterations at the start


@settings(max_examples=15)
@given(norm=st.floats(0.1, 9.0), seed=st.integers(0, 99))
def test_the_bound_covers_the_truncation(norm: float, seed: int) -> None:
    net = with_norm(norm, seed)
    truth = spectral_norm(jacobian(net, torch.zeros(1, 3, 4, 3, dtype=torch.float64)))
    assert truth <= net.lipschitz_bound().value * (1 + 1e-13)
    assert net.lipschitz_bound().proof == "skew-exponential"


def test_a_bound_without_the_truncation_would_be_wrong() -> None:
    net = with_norm(8.0)
    truth = spectral_norm(jacobian(net, torch.zeros(1, 3, 4, 3, dtype=torch.float64)))
    assert 1.01 < truth <= net.lipschitz_bound().value
    assert with_norm(1.0).lipschitz_bound().value < 1 + 1e-9


def test_a_kernel_that_is_not_skew_is_refused() -> None:
    net = layer().eval().materialise()
    with torch.no_grad():
        net.weight[0, 0, 1, 1] += 1e-9
    with pytest.raises(UnsoundError, match="kernel of a skew convolution is not skew"):
        net.lipschitz_bound()
    with pytest.raises(ValueError, match="must be odd, got 2"):
        layer(kernel=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_materialised_it_is_the_same_function_of_a_stored_skew_kernel(dtype: torch.dtype) -> None:
    net = layer(2, 4).to(dtype).eval()
    images = torch.randn(3, 2, 4, 3, dtype=dtype)
    stored = net.materialise()
    assert torch.equal(stored(images), net(images))
    assert torch.equal(stored.weight, -transposed(stored.weight))
    rounded = stored.float()  # once more, as a bundle does
    assert torch.equal(rounded.weight, -transposed(rounded.weight))
    other = layer(2, 4, seed=1).materialise()
    other.load_state_dict(stored.state_dict())
    assert stored.state_dict().keys() == {"weight", "bias"}


def test_power_iteration_moves_in_training_alone_and_gradients_reach_the_parameters() -> None:
    net = layer()
    images, before = torch.randn(2, 3, 4, 3, dtype=torch.float64), net.wide.clone()
    net.eval()(images)
    assert torch.equal(net.wide, before)
    net.train()(images).square().sum().backward()
    assert not torch.equal(net.wide, before)
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    with torch.no_grad():
        net.weight.zero_()
    assert torch.isfinite(net(images)).all()


@torch.no_grad()
@pytest.mark.parametrize("norm", [0.5, 3.0])
def test_float32_stays_within_the_propagated_error(norm: float) -> None:
    net = with_norm(norm).float()
    images = torch.rand(64, 3, 4, 3, dtype=torch.float32)
    longest = images.double().flatten(1).norm(dim=1).max().item() * (1 + 1e-14)
    state = net.rounding(RoundingState(norm=longest, error=1e-5, unit=UNIT_ROUNDOFF[torch.float32]))
    moved = images + 1e-5 * functional.normalize(torch.randn_like(images).flatten(1)).view_as(images) * 0.9
    truth = copy.deepcopy(net).double()(images.double())
    error = (net(moved).double() - truth).flatten(1).norm(dim=1).max().item()
    assert error <= state.error < 0.1
    assert truth.flatten(1).norm(dim=1).max() <= state.norm


def test_float32_without_onednn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with pytest.raises(UnsoundError, match="Winograd"):
        layer().rounding(RoundingState(norm=1.0, error=0.0, unit=UNIT_ROUNDOFF[torch.float32]))


def test_the_published_numbers_of_terms() -> None:
    """Six terms at a norm of 3 leave up to 1.01, fifteen 1.1e-5 (values of the analysis)."""
    assert 3.0**TRAINING_TERMS / math.factorial(TRAINING_TERMS) == pytest.approx(1.01, abs=5e-3)
    net = with_norm(3.0)
    norm = convolution_bound(net.weight, net.input_size, padding=1).value
    assert norm >= 3.0 * (1 - 1e-12)
    assert 3.0**TERMS / math.factorial(TERMS) == pytest.approx(1.1e-5, rel=0.01)
    assert net.lipschitz_bound().value - 1 == pytest.approx(norm**TERMS / math.factorial(TERMS), rel=1e-9)
