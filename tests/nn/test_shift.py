"""The shift, and the theorem behind it: what other circular depthwise convolutions preserve norms?

A circular convolution with kernel K is diagonal in the Fourier basis with the entries of K's transform, so
it preserves norms if and only if `|K^(f)| = 1` at every frequency, that is if and only if the circular
autocorrelation of K is a delta.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.nn.shift import CircularShift, shift_


def _tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _slow(tokens: Tensor, k: int) -> Tensor:
    result = tokens.clone()
    _, h, w, _ = tokens.shape
    for y in range(h):
        for x in range(w):
            result[:, y, x, :k] = tokens[:, (y - 1) % h, x, :k]  # down
            result[:, y, x, k : 2 * k] = tokens[:, (y + 1) % h, x, k : 2 * k]  # up
            result[:, y, x, 2 * k : 3 * k] = tokens[:, y, (x - 1) % w, 2 * k : 3 * k]  # right
            result[:, y, x, 3 * k : 4 * k] = tokens[:, y, (x + 1) % w, 3 * k : 4 * k]  # left
    return result


shapes = st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))


@given(shapes, st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_shift_inverse_and_adjoint(shape, group):
    group = min(group, shape[-1] // 4)
    x, y = _tokens(*shape), _tokens(*shape, seed=1)
    layer = CircularShift(shape[-1], group)
    assert torch.equal(layer(x), _slow(x, group))
    forward, back = x.clone(), y.clone()
    shift_(forward, group)
    shift_(back, group, -1)
    assert torch.equal(forward, layer(x))
    # the adjoint is the inverse: <S x, y> = <x, S^-1 y>
    assert (forward * y).sum().item() == pytest.approx((x * back).sum().item(), abs=1e-12)
    shift_(forward, group, -1)
    assert torch.equal(forward, x)


def test_all_the_rest_stays_in_place():
    x = _tokens(2, 3, 4, 10)
    moved = x.clone()
    shift_(moved, 2)
    assert torch.equal(moved[..., 8:], x[..., 8:])
    assert not torch.equal(moved[..., :8], x[..., :8])
    unmoved = x.clone()
    shift_(unmoved, 0)
    assert torch.equal(unmoved, x)


def test_a_group_too_large_is_refused():
    with pytest.raises(
        ValueError, match=r"`group` must be between 0 and a quarter of the 10 channels, got 3\."
    ):
        CircularShift(10, 3)


# The theorem.


def _spectrum(kernel: Tensor, grid: tuple[int, int]) -> Tensor:
    """`|K^|^2` on the grid."""
    return torch.fft.fft2(_embedded(kernel, grid)).abs().square()


def _embedded(kernel: Tensor, grid: tuple[int, int]) -> Tensor:
    whole = torch.zeros(grid)
    whole[: kernel.shape[0], : kernel.shape[1]] = kernel
    return whole


def _convolution_matrix(kernel: Tensor, grid: tuple[int, int]) -> Tensor:
    """Column by column, by rolling."""
    whole = _embedded(kernel, grid)
    columns = [torch.roll(whole, (y, x), (0, 1)).flatten() for y in range(grid[0]) for x in range(grid[1])]
    return torch.stack(columns, dim=1)


def _defect(kernel: Tensor, grid: tuple[int, int]) -> float:
    """How far the convolution is from preserving norms: `||C^T C - I||_2`."""
    return (_spectrum(kernel, grid) - 1).abs().max().item()


def _autocorrelation(kernel: Tensor, grid: tuple[int, int]) -> Tensor:
    """`sum_p K_p K_(p+lag)` on the ring, lag by lag."""
    whole = _embedded(kernel, grid)
    lags = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    return torch.stack([(whole * torch.roll(whole, (-y, -x), (0, 1))).sum() for y, x in lags]).view(grid)


kernels = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**20))


@given(kernels)
@settings(max_examples=25, deadline=None)
def test_the_spectrum_decides_whether_norms_are_preserved(drawn):
    k, extra, _, seed = drawn
    kernel, grid = _tokens(k, k, seed=seed), (k + extra, k)
    c = _convolution_matrix(kernel, grid)
    defect = torch.linalg.matrix_norm(c.mT @ c - torch.eye(len(c.mT)), 2).item()
    assert defect == pytest.approx(_defect(kernel, grid), rel=1e-10, abs=1e-12)
    # and |K^|^2 is the transform of the autocorrelation
    transform = torch.fft.fft2(_autocorrelation(kernel, grid)).real
    assert torch.allclose(transform, _spectrum(kernel, grid), rtol=0, atol=1e-11)


@given(kernels, st.sampled_from([1.0, -1.0]))
@settings(max_examples=25, deadline=None)
def test_a_signed_unit_preserves_norms_on_any_grid(drawn, sign):
    k, i, j, _ = drawn
    kernel = torch.zeros(k, k)
    kernel[i % k, j % k] = sign
    for extra in (0, 1, k):
        grid = (k + extra, k + 2 * extra)
        assert _defect(kernel, grid) < 1e-14
        c = _convolution_matrix(kernel, grid)
        assert torch.equal(c.abs().sum(0), torch.ones(len(c)))  # a signed permutation


@given(
    st.integers(2, 4),
    st.integers(0, 2**20),
    st.integers(0, 3),
    st.sampled_from([0.15, 0.4, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_unit_energy_with_two_entries_fails_on_a_grid_of_2k_minus_1(k, seed, extra, share):
    """With a first entry a and a last entry b in reading order, the autocorrelation at b - a is `K_a K_b`.

    No other pair of entries is that far apart, and no lag wraps round onto it where the grid has `2k - 1`
    pixels a side. The autocorrelation is a mean of `|K^|^2 - 1` with phases, so the defect is at least
    `|K_a K_b|`.
    """
    g = torch.Generator().manual_seed(seed)
    kernel = torch.randn(k, k, generator=g) * (torch.rand(k, k, generator=g) < share)
    support = kernel.nonzero().tolist()
    assume(len(support) >= 2)
    kernel = kernel / kernel.norm()
    grid = (2 * k - 1 + extra, 2 * k - 1)
    a, b = support[0], support[-1]
    product = (kernel[a[0], a[1]] * kernel[b[0], b[1]]).item()
    lag = ((b[0] - a[0]) % grid[0], (b[1] - a[1]) % grid[1])
    r = _autocorrelation(kernel, grid)
    assert r[0, 0].item() == pytest.approx(1.0)
    assert r[lag].item() == pytest.approx(product, abs=1e-14)
    assert _defect(kernel, grid) >= abs(product) - 1e-12


def _all_pass(n: int, seed: int) -> Tensor:
    """A real kernel of unit spectrum on an n x n ring: random phases with the symmetry of a real signal."""
    transform = torch.fft.fft2(_tokens(n, n, seed=seed))
    return torch.fft.ifft2(transform / transform.abs()).real


@given(st.integers(1, 5), st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_norms_are_preserved_if_and_only_if_the_autocorrelation_is_a_delta(n, seed):
    delta = torch.zeros(n, n)
    delta[0, 0] = 1.0
    kernel = _all_pass(n, seed)
    assert _defect(kernel, (n, n)) < 1e-12
    assert torch.allclose(_autocorrelation(kernel, (n, n)), delta, rtol=0, atol=1e-13)
    other = _tokens(n, n, seed=seed)
    other = other / other.norm()
    off_delta = (_autocorrelation(other, (n, n)) - delta).abs().max().item()
    # max <= the sum over lags, and >= the largest lag
    assert off_delta - 1e-12 <= _defect(other, (n, n)) <= n * n * off_delta + 1e-12


def test_on_three_pixels_there_is_another_one():
    kernel = torch.tensor([[2 / 3, 2 / 3, -1 / 3]])
    assert _defect(kernel, (1, 3)) < 1e-15
    c = _convolution_matrix(kernel, (1, 3))
    assert torch.allclose(c.mT @ c, torch.eye(3), rtol=0, atol=1e-15)
    for ring in (4, 5, 6, 9):  # 5 = 2k - 1 and beyond, and 4 as it happens
        assert _defect(kernel, (1, ring)) > 2 / 9 - 1e-12


@pytest.mark.parametrize("group", [1, 2])
def test_the_layer_is_such_a_convolution_with_one_entry_per_channel(group):
    channels, grid = 9, (5, 5)
    impulse = torch.zeros(1, *grid, channels)
    impulse[0, 2, 2] = 1.0
    response = CircularShift(channels, group)(impulse)[0]
    for c in range(channels):
        kernel = response[1:4, 1:4, c]
        assert sorted(kernel.flatten().tolist()) == [0.0] * 8 + [1.0]
        assert _defect(kernel, grid) < 1e-14
    assert math.isclose(response.norm().item(), math.sqrt(channels), rel_tol=1e-15)
