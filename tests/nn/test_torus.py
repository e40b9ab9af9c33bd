"""Convolutions by frequency (torus, block reflector, Cayley) against torch's FFT, dense Jacobians and written-out formulas."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.block_reflector import BlockReflectorConvolution, BlockReflectorMixing, block_reflector
from lipnext.nn.cayley import CayleyConvolution, cayley
from lipnext.nn.torus import TorusConvolution, fourier_basis, half_spectrum
from tests.helpers import jacobian, spectral_norm

SINGLE = UNIT_ROUNDOFF[torch.float32]
sizes = st.tuples(st.integers(1, 6), st.integers(1, 6))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


class Plain(TorusConvolution):
    """The transfer matrices of the kernel as they are: an ordinary convolution."""

    def form(self, spectrum: Tensor) -> Tensor:
        return spectrum


# ---- the torus ---------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(size=sizes, margin=st.integers(0, 2))
def test_the_basis_is_orthonormal_and_holds_every_frequency_once(size: tuple[int, int], margin: int) -> None:
    torus = (size[0] + 2 * margin, size[1] + 2 * margin)
    basis = fourier_basis(size, torus)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(size[0] * size[1]), rtol=0, atol=1e-13)
    pairs = {frozenset([(j, k), (-j % torus[0], -k % torus[1])]) for j, k in half_spectrum(torus)}
    assert len(pairs) == len(half_spectrum(torus))
    assert set().union(*pairs) == {(j, k) for j in range(torus[0]) for k in range(torus[1])}


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(3, 6), st.integers(3, 6)),
    kernel=st.sampled_from([1, 2, 3]),
    margin=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_an_ordinary_kernel_gives_the_ordinary_convolution(
    size: tuple[int, int], kernel: int, margin: int, seed: int
) -> None:
    """Circular without a margin; with one as wide as the kernel reaches, zero-padded: nothing wraps around."""
    layer = Plain(random(3, 2, kernel, kernel, seed=seed), 3, size, margin=margin)
    assert layer.weight is not None
    x = random(2, 2, *size, seed=seed)
    before, after = (kernel - 1) // 2, kernel // 2
    mode = "constant" if margin else "circular"
    padded = functional.pad(x, (before, after, before, after), mode=mode) if kernel > 1 else x
    torch.testing.assert_close(layer(x), functional.conv2d(padded, layer.weight), rtol=0, atol=1e-12)


# ---- block reflectors --------------------------------------------------------------------------------------


def published_reflector(kernel: Tensor, x: Tensor) -> Tensor:
    """BRONet, section 4.2, in torch's FFT: pad, reflect each frequency, crop. The kernel is flipped for a convolution."""
    k, (height, width) = kernel.shape[-1], x.shape[2:]
    p = k // 2
    padded = functional.pad(x, (p, p, p, p))
    shape = padded.shape[2:]
    v = torch.fft.rfft2(kernel.flip(2, 3), shape, norm="ortho")
    spectrum = torch.fft.rfft2(padded, shape, norm="ortho")
    result = torch.empty_like(spectrum)
    for i in range(spectrum.shape[2]):
        for j in range(spectrum.shape[3]):
            at = v[:, :, i, j]
            gram = at.mH @ at
            e = 1e-5 * gram.diagonal().real.mean()
            w = torch.eye(len(at)) - 2 * at @ torch.linalg.inv(gram + e * torch.eye(len(gram))) @ at.mH
            result[:, :, i, j] = spectrum[:, :, i, j] @ w.mT
    return torch.fft.irfft2(result, shape, norm="ortho")[:, :, p : p + height, p : p + width]


@pytest.mark.parametrize("size", [(4, 4), (5, 4), (3, 6)])
def test_the_reflector_is_the_published_one(size: tuple[int, int]) -> None:
    layer = BlockReflectorConvolution(5, 2, 3, size, generator=generator())
    x = random(2, 5, *size)
    torch.testing.assert_close(layer(x), published_reflector(layer.weight, x), rtol=0, atol=1e-11)


@settings(max_examples=40)
@given(m=st.integers(2, 7), data=st.data(), seed=st.integers(0, 99), is_complex=st.booleans())
def test_a_block_reflector_is_a_hermitian_involution(
    m: int, data: st.DataObject, seed: int, is_complex: bool
) -> None:
    n = data.draw(st.integers(1, m - 1))
    v = random(m, n, seed=seed, dtype=torch.complex128 if is_complex else torch.float64)
    w = block_reflector(v, m)
    torch.testing.assert_close(w, w.mH, rtol=0, atol=1e-9)
    values = torch.linalg.eigvalsh((w + w.mH) / 2)
    # 1 - 2 s^2 / (s^2 + e) with e = 1e-5 times the mean of s^2: a small s falls short of -1, none exceeds it
    s2 = torch.linalg.svdvals(v) ** 2
    wanted = torch.cat([torch.ones(m - n), 1 - 2 * s2 / (s2 + 1e-5 * s2.mean())]).sort().values
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-8)
    torch.testing.assert_close(block_reflector(v, n), w[:n], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("given_", "wanted"), [(6, 6), (8, 4), (4, 8)])
def test_a_reflector_that_mixes_channels_keeps_distances_up_to_what_is_cut(given_: int, wanted: int) -> None:
    layer = BlockReflectorMixing(given_, wanted, 2, (2, 3), generator=generator())
    x = random(3, given_, 2, 3)
    whole = block_reflector(layer.weight, max(given_, wanted))
    expected = torch.einsum("oi,bihw->bohw", whole[:wanted, :given_], x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)
    bound = layer.lipschitz_bound().value
    assert spectral_norm(layer.kernel().flatten(1)) <= bound * (1 + 1e-12) <= 1 + 1e-3
    if wanted >= given_:
        assert layer(x).norm().item() == pytest.approx(x.norm().item(), rel=1e-3)


# ---- Cayley ------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(m=st.integers(1, 6), n=st.integers(1, 6), seed=st.integers(0, 99), scale=st.floats(0.01, 20))
def test_the_cayley_map_is_orthonormal_and_as_written(m: int, n: int, seed: int, scale: float) -> None:
    matrix = scale * random(m, n, seed=seed, dtype=torch.complex128)
    w = cayley(matrix)
    tall = w if m >= n else w.mH
    torch.testing.assert_close(
        tall.mH @ tall, torch.eye(min(m, n), dtype=torch.complex128), rtol=0, atol=1e-10
    )
    tall_matrix = matrix if m >= n else matrix.mH
    u, v = tall_matrix[: min(m, n)], tall_matrix[min(m, n) :]
    a = u - u.mH + v.mH @ v
    eye = torch.eye(len(a))
    inverse = torch.linalg.inv(eye + a)
    torch.testing.assert_close(tall, torch.cat([inverse @ (eye - a), -2 * v @ inverse]), rtol=0, atol=1e-9)


def published_cayley(layer: CayleyConvolution, x: Tensor) -> Tensor:
    """Trockman & Kolter's layer in torch's FFT: conjugate spectrum, shifted to the centre, mapped, inverse FFT."""
    kernel = layer.weight
    assert kernel is not None
    assert layer.scale is not None
    shape, k = x.shape[2:], kernel.shape[-1]
    rows = torch.arange(shape[0])[:, None] / shape[0]
    columns = torch.arange(shape[1] // 2 + 1)[None, :] / shape[1]
    shift = torch.exp(-2j * torch.pi * ((k - 1) // 2) * (rows + columns))
    w = shift * torch.fft.rfft2(kernel, shape).conj() * (layer.scale / kernel.norm())
    spectrum = torch.fft.rfft2(x)
    c_out = kernel.shape[0]
    result = spectrum.new_empty(len(x), c_out, *spectrum.shape[2:])
    for i in range(spectrum.shape[2]):
        for j in range(spectrum.shape[3]):
            result[:, :, i, j] = spectrum[:, :, i, j] @ cayley(w[:, :, i, j]).mT
    return torch.fft.irfft2(result, shape)


@pytest.mark.parametrize(("c_in", "c_out"), [(3, 3), (2, 4), (4, 2)])
@pytest.mark.parametrize(("size", "kernel"), [((4, 4), 3), ((5, 6), 3), ((3, 4), 2), ((4, 3), 1)])
def test_the_cayley_layer_is_the_published_one(
    c_in: int, c_out: int, size: tuple[int, int], kernel: int
) -> None:
    layer = CayleyConvolution(c_in, c_out, kernel, size, generator=generator())
    x = random(2, c_in, *size)
    torch.testing.assert_close(layer(x), published_cayley(layer, x), rtol=0, atol=1e-12)
    if c_out >= c_in:
        assert layer(x).norm().item() == pytest.approx(x.norm().item(), rel=1e-12)


# ---- what is certified -------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], TorusConvolution]] = {
    "plain": lambda: Plain(random(3, 4, 3, 3), 3, (4, 3), margin=1),
    "reflector": lambda: BlockReflectorConvolution(4, 2, 3, (4, 3), generator=generator()),
    "cayley": lambda: CayleyConvolution(4, 3, 3, (4, 3), generator=generator()),
    "cayley of one pixel": lambda: CayleyConvolution(4, 4, 1, (4, 3), generator=generator()),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_is_that_of_all_stored_numbers(name: str, dtype: torch.dtype) -> None:
    stored = LAYERS[name]().to(dtype).materialise().double()
    norm = spectral_norm(jacobian(stored, torch.zeros(1, 4, 4, 3)))
    bound = stored.lipschitz_bound().value
    assert norm <= bound * (1 + 1e-12)
    # The last is an isometry but for rounding; the shift of a reflector's Gram matrix spreads its singular values; and
    # the frequencies of a padded torus add to the norm of any other kernel.
    excess = {"plain": 0.5 * norm, "reflector": 1e-3}.get(name, 1e-5 if dtype == torch.float32 else 1e-9)
    assert bound <= norm + excess
    # Planted: changes after the matrices were formed. A constant of 1 would see neither.
    with torch.no_grad():
        stored.basis.mul_(1.01)
    assert stored.lipschitz_bound().value >= 1.01**2 * norm * (1 - 1e-12)
    with torch.no_grad():
        stored.transfer.mul_(1.5)
    assert stored.lipschitz_bound().value >= 1.5 * 1.01**2 * norm * (1 - 1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_stored_is_what_was_formed(name: str) -> None:
    layer = LAYERS[name]()
    stored = layer.materialise()
    x = random(3, 4, 4, 3)
    assert torch.equal(stored(x), layer(x))
    assert torch.equal(stored.materialise()(x), layer(x))
    assert set(stored.state_dict()) == {"basis", "transfer", "bias"}
    assert layer.lipschitz_bound() == stored.lipschitz_bound()
    assert layer(x[:0]).shape == (0, len(layer.bias), 4, 3)


@torch.no_grad()
@pytest.mark.parametrize("incoming", [0.0, 1e-4])
@pytest.mark.parametrize("name", LAYERS)
def test_float32_stays_within_the_propagated_error(name: str, incoming: float) -> None:
    layer = LAYERS[name]().float().materialise()
    layer.bias.add_(random(len(layer.bias)))
    exact = torch.rand(64, 4, 4, 3)
    direction = random(*exact.shape).flatten(1)
    shift = (incoming * direction / direction.norm(dim=1, keepdim=True)).view(exact.shape)
    given_ = (exact + shift).float()
    error = (given_.double() - exact).flatten(1).norm(dim=1).max().item()
    state = layer.rounding(RoundingState(norm=48**0.5, error=error, unit=SINGLE))
    computed = layer(given_).double()
    truth = layer.double()(exact)
    measured = (computed - truth).flatten(1).norm(dim=1).max().item()
    assert 0 < measured <= state.error < 1e-2
    assert truth.flatten(1).norm(dim=1).max().item() <= state.norm


@pytest.mark.parametrize("name", LAYERS)
def test_the_products_alone_run_in_the_autocast_dtype(name: str) -> None:
    layer = LAYERS[name]().float()
    x = torch.rand(2, 4, 4, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.matrices().dtype == torch.float32
        assert torch.equal(layer.matrices(), LAYERS[name]().float().matrices())
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=0.2)
