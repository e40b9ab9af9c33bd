"""AOL's rescaled kernels, against the sums written out and dense Jacobians."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lipnext.core.errors import UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn.aol import AolConvolution, almost_orthogonal
from lipnext.nn.formed import FormedConvolution
from tests.helpers import jacobian, spectral_norm


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rescaled(kernel: Tensor) -> Tensor:
    """The definition, one product at a time."""
    c_out, c_in, k, _ = kernel.shape
    result = kernel.clone()
    for i in range(c_in):
        total = 0.0
        for j in range(c_in):
            for a in range(1 - k, k):
                for b in range(1 - k, k):
                    entry = 0.0
                    for o in range(c_out):
                        for p in range(max(0, -a), min(k, k - a)):
                            for q in range(max(0, -b), min(k, k - b)):
                                entry += float(kernel[o, i, p, q] * kernel[o, j, p + a, q + b])
                    total += abs(entry)
        result[:, i] /= (total + 1e-6) ** 0.5
    return result


@pytest.mark.parametrize("shape", [(2, 2, 3, 3), (2, 3, 2, 2), (4, 4, 1, 1)])
def test_a_kernel_is_rescaled_as_defined(shape: tuple[int, ...]) -> None:
    kernel = random(*shape)
    torch.testing.assert_close(almost_orthogonal(kernel), rescaled(kernel), rtol=0, atol=1e-14)


@settings(max_examples=30)
@given(
    c_in=st.integers(1, 4),
    c_out=st.integers(1, 4),
    kernel=st.sampled_from([1, 3]),
    scale=st.sampled_from([1e-2, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_no_padding_lets_a_rescaled_kernel_exceed_the_norm_1(
    c_in: int, c_out: int, kernel: int, scale: float, seed: int
) -> None:
    weight = almost_orthogonal(scale * random(c_out, c_in, kernel, kernel, seed=seed))

    def convolve(mode: str) -> float:
        def apply(x: Tensor) -> Tensor:
            sides = [kernel // 2] * 4
            padded = functional.pad(x, sides, mode=mode) if kernel > 1 else x
            return functional.conv2d(padded, weight)

        return spectral_norm(jacobian(apply, torch.zeros(1, c_in, 4, 3)))

    assert convolve("circular") <= 1 + 1e-12
    assert convolve("constant") <= 1 + 1e-12


def test_orthogonal_kernels_are_left_alone() -> None:
    layer = AolConvolution(6, 3, (4, 4))
    x = random(2, 6, 4, 4)
    torch.testing.assert_close(layer(x), x, rtol=0, atol=1e-5)
    mixing = AolConvolution(6, 1, (4, 4), generator=torch.Generator().manual_seed(0))
    assert mixing(x).norm().item() == pytest.approx(x.norm().item(), rel=1e-6)


def test_the_certificate_speaks_of_the_stored_kernel() -> None:
    layer = AolConvolution(4, 3, (5, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight.add_(0.3 * random(*layer.weight.shape))
    stored = layer.materialise()
    x = random(3, 4, 5, 4)
    assert torch.equal(stored(x), layer(x))
    assert torch.equal(stored.materialise()(x), layer(x))
    assert stored.weight.shape == (4, 4, 3, 3)
    bound = stored.lipschitz_bound().value
    norm = spectral_norm(jacobian(stored, torch.zeros(1, 4, 5, 4)))
    assert norm <= bound * (1 + 1e-12) <= 1 + 1e-12
    assert layer.lipschitz_bound() == stored.lipschitz_bound()
    # Planted: kernels that were changed after their rescaling. A constant of 1 would not see it, and no stored scale hides it.
    for factor in (1.5, 0.3):
        changed = copy.deepcopy(stored)
        with torch.no_grad():
            changed.weight.mul_(factor)
        for scale in (stored.scale, 1e3 * stored.scale, random(4).abs()):
            changed.scale = scale
            assert changed.lipschitz_bound().value >= factor * norm * (1 - 1e-12)


def test_where_many_directions_are_nearly_steepest_the_theorem_is_the_sharper_proof() -> None:
    """A rotation of 64 channels with one column off: Gram iteration is too large by up to 64^(1/512), 0.8 %."""
    layer = AolConvolution(64, 1, (6, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight[:, :1].add_(0.02 * random(64, 1, 1, 1))
    bound = layer.materialise().float().lipschitz_bound()
    assert bound.proof == "collatz-wielandt"
    assert spectral_norm(layer.kernel().flatten(1)) <= bound.value <= 1 + 1e-6
    assert FormedConvolution.lipschitz_bound(layer).value > 1.001


def test_autocast_does_not_reach_the_rescaling() -> None:
    layer = AolConvolution(4, 3, (4, 4)).float()
    with torch.no_grad():
        layer.weight.add_(random(*layer.weight.shape))
    expected = almost_orthogonal(layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.kernel(), expected)


@torch.no_grad()
def test_float32_stays_within_the_propagated_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = AolConvolution(4, 3, (5, 4))
    layer.weight.add_(random(*layer.weight.shape))
    layer.bias.add_(random(4))
    layer = layer.materialise().float()
    x = torch.rand(64, 4, 5, 4, dtype=torch.float32)
    start = RoundingState(norm=80**0.5, error=0.0, unit=UNIT_ROUNDOFF[torch.float32])
    state = layer.rounding(start)
    computed, exact = layer(x).double(), layer.double()(x.double())
    error = (computed - exact).flatten(1).norm(dim=1).max().item()
    assert 0 < error <= state.error < 1e-4
    assert exact.flatten(1).norm(dim=1).max().item() <= state.norm
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with pytest.raises(UnsoundError, match="without oneDNN"):
        layer.rounding(start)
