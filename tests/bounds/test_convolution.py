import math
from dataclasses import replace

import pytest
import torch
from helpers import is_norm_bound, rotations, spectral_norm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lipnext.bounds import convolution as module
from lipnext.bounds import stack
from lipnext.bounds.convolution import (
    absolute_convolution_bound,
    convolution_bound,
    schur_convolution_bound,
)
from lipnext.bounds.spectral import estimate_spectral_norm
from lipnext.core.errors import ConfigError, UnsoundError

# LAPACK's largest singular value may itself be off by a few n u, in either direction; the operators below have n < 600.
SVD_ERROR = 1e-13
# The table of cosines (2^-48 sum |W|) and the rounding of the products.
ROUNDING = 1e-11


def operator(weight: Tensor, size: tuple[int, int], *, padding=0, padding_mode="zeros", **settings) -> Tensor:
    """The matrix of the convolution, column by column: torch's own layer on the unit vectors.

    Each entry is one weight (or a sum of a few, where circular padding meets a pixel twice) among zeros.
    """
    groups = settings.get("groups", 1)
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        padding=padding,
        padding_mode=padding_mode,
        bias=False,
        **settings,
    )
    layer.weight = nn.Parameter(weight.double(), requires_grad=False)
    channels = weight.shape[1] * groups
    units = torch.eye(channels * size[0] * size[1]).view(-1, channels, *size)
    return layer(units).flatten(1).mT


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def layers(draw):
    """A random layer that torch accepts: weight, image size, settings."""
    groups = draw(st.integers(1, 3))
    c_out, c_in = groups * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    mode = draw(st.sampled_from(["zeros", "circular"]))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = draw(
        st.one_of(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.sampled_from(["same", "valid"]))
    )
    if padding == "same":
        stride = (1, 1)
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        assume(mode == "zeros" or all(t - t // 2 <= s for t, s in zip(totals, size, strict=True)))
    else:
        pads = (0, 0) if padding == "valid" else padding
        for s, p, d, k in zip(size, pads, dilation, kernel, strict=True):
            assume(s + 2 * p > d * (k - 1))
            assume(mode == "zeros" or p <= s)
    weight = gaussian(c_out, c_in, *kernel, seed=draw(st.integers(0, 2**20)))
    if draw(st.booleans()):
        weight = weight.abs()
    options = {
        "stride": stride,
        "padding": padding,
        "padding_mode": mode,
        "dilation": dilation,
        "groups": groups,
    }
    return weight, size, options


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(layer=layers())
@settings(max_examples=250, deadline=None)
def test_no_bound_is_below_the_svd_of_the_operator(layer):
    weight, size, options = layer
    matrix = operator(weight, size, **options)
    truth = spectral_norm(matrix) * (1 - SVD_ERROR)
    bound = convolution_bound(weight, size, **options)
    assert bound.value >= truth
    assert schur_convolution_bound(weight, size, **options).value >= bound.value
    assert absolute_convolution_bound(weight, size, **options) >= spectral_norm(matrix.abs()) * (
        1 - SVD_ERROR
    )
    assert convolution_bound(weight, size, **options, squarings=0).value >= truth
    assert bound.norm == 2.0


@given(
    c_out=st.integers(1, 5),
    c_in=st.integers(1, 5),
    groups=st.integers(1, 2),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])),
    squarings=st.integers(2, 9),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=80, deadline=None)
def test_circular_convolutions_are_exact_up_to_gram_iteration(
    c_out, c_in, groups, size, kernel, squarings, seed
):
    pads = tuple(k // 2 for k in kernel)
    assume(all(p <= s for p, s in zip(pads, size, strict=True)))
    weight = gaussian(groups * c_out, c_in, *kernel, seed=seed)
    options = {"padding": pads, "padding_mode": "circular", "groups": groups}
    truth = spectral_norm(operator(weight, size, **options))
    bound = convolution_bound(weight, size, **options, squarings=squarings).value
    excess = min(c_out, c_in) ** (0.5 ** (squarings + 2))
    assert truth * (1 - SVD_ERROR) <= bound <= truth * (excess + ROUNDING)
    absolute = spectral_norm(operator(weight.abs(), size, **options))
    assert absolute_convolution_bound(weight, size, **options, steps=30) == pytest.approx(absolute, rel=1e-6)


@given(
    channels=st.integers(1, 3),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_disjoint_patches_and_circular_strides_are_exact(channels, stride, cells, seed):
    """The stride is not merely ignored, which would be sound as well."""
    size = (stride[0] * cells[0], stride[1] * cells[1])
    patches = gaussian(4, channels, *stride, seed=seed)
    truth = spectral_norm(patches.flatten(1))
    bound = convolution_bound(patches, size, stride=stride, squarings=9).value
    assert truth * (1 - SVD_ERROR) <= bound <= truth * (4 ** (0.5**11) + ROUNDING)
    overlapping = gaussian(4, channels, stride[0] + 2, stride[1], seed=seed)
    options = {"stride": stride, "padding": (1, 0), "padding_mode": "circular"}
    truth = spectral_norm(operator(overlapping, size, **options))
    bound = convolution_bound(overlapping, size, **options, squarings=9).value
    assert truth * (1 - SVD_ERROR) <= bound <= truth * (4 ** (0.5**11) + ROUNDING)


def test_one_output_is_one_matrix():
    weight = gaussian(3, 2, 4, 5)
    bound = convolution_bound(weight, (4, 5), stride=3, squarings=10).value
    assert bound == pytest.approx(spectral_norm(weight.flatten(1)), rel=1e-3)


def test_taps_that_only_meet_zeros_do_not_count():
    weight = gaussian(2, 2, 3, 3)
    for size, dilation in (((1, 1), 1), ((3, 2), 4)):
        bound = convolution_bound(weight, size, padding=dilation, dilation=dilation, squarings=10)
        assert bound.value == pytest.approx(spectral_norm(weight[:, :, 1, 1]), rel=1e-3)


def test_zero_padding_costs_little_on_images_of_some_size():
    """A larger torus only samples the same function of the frequency more finely."""
    weight = gaussian(3, 3, 3, 3)
    truth = spectral_norm(operator(weight, (12, 12), padding=1))
    assert truth <= convolution_bound(weight, (12, 12), padding=1).value <= 1.1 * truth


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_an_orthogonal_kernel_is_proved_through_its_residual(mode):
    """Orthogonal in space: shifted channels between two rotations, stored in float32."""
    n = 8
    shift = torch.zeros(n, n, 3, 3)
    for channel in range(n):
        shift[channel, channel, channel % 3, channel // 3] = 1.0
    weight = torch.einsum("ij,jkab,kl->ilab", rotations(n=n, seed=0), shift, rotations(n=n, seed=1)).float()
    bound = convolution_bound(weight, (6, 6), padding=1, padding_mode=mode)
    assert bound.proof == "transfer-matrix"
    # float32 entries: ||E|| is below the Frobenius norm of the rounding, 2 sqrt(72) 2^-24
    assert 1 - 1e-6 <= bound.value <= 1 + 1e-6
    truth = spectral_norm(operator(weight, (6, 6), padding=1, padding_mode=mode))
    assert truth * (1 - SVD_ERROR) <= bound.value


def test_the_schur_test_is_exact_for_permutations_of_pixels():
    weight = torch.zeros(3, 1, 3, 3)
    weight[:, 0, 1, 2] = 1.0
    bound = convolution_bound(weight, (5, 5), padding=1, groups=3)
    assert bound.proof == "schur"
    assert 1 <= bound.value <= 1 + 1e-14


def test_kernels_of_one_tap_hold_in_exact_arithmetic():
    for seed in range(10):
        weight = gaussian(3, 2, 1, 1, seed=seed)
        for bound in (
            convolution_bound(weight, (4, 4)),
            convolution_bound(weight, (4, 4), stride=2),
            convolution_bound(weight, (3, 5), padding_mode="circular", stride=2),
            schur_convolution_bound(weight, (4, 4)),
        ):
            assert is_norm_bound(weight.flatten(1), bound.value)
        assert is_norm_bound(weight.abs().flatten(1), absolute_convolution_bound(weight, (4, 4)))


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 2),
    stride=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "circular"]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_small_convolutions_hold_in_exact_arithmetic(size, kernel, channels, stride, mode, seed):
    """With one channel and circular padding nothing but rounding terms separates the bound from the norm."""
    assume(
        all(k <= s for k, s in zip(kernel, size, strict=True))
    )  # one weight for each entry of the operator
    weight = gaussian(1, channels, *kernel, seed=seed)
    options = {"padding": tuple(k // 2 for k in kernel), "padding_mode": mode, "stride": stride}
    matrix = operator(weight, size, **options)
    assert is_norm_bound(matrix.mT, convolution_bound(weight, size, **options).value)
    assert is_norm_bound(matrix.mT.abs(), absolute_convolution_bound(weight, size, **options))


def test_repeated_outputs_count():
    """Padding on all sides by the whole circular image: nine copies of one convolution."""
    weight = gaussian(2, 2, 1, 1)
    once = convolution_bound(weight, (3, 3), padding_mode="circular").value
    assert convolution_bound(weight, (3, 3), padding=3, padding_mode="circular").value == pytest.approx(
        3 * once
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_floating_dtype_is_taken_as_exact(dtype):
    weight = gaussian(3, 2, 3, 3).to(dtype)
    bound = convolution_bound(weight, (4, 4), padding=1)
    assert bound == convolution_bound(weight.double(), (4, 4), padding=1)
    assert absolute_convolution_bound(weight, (4, 4)) == absolute_convolution_bound(weight.double(), (4, 4))


@pytest.mark.parametrize("exponent", [-300, -150, 120])
def test_any_scale(exponent):
    weight = gaussian(2, 2, 3, 3)
    scaled = convolution_bound(weight * 10.0**exponent, (4, 4), padding=1).value
    if exponent > -200:
        assert scaled == pytest.approx(
            convolution_bound(weight, (4, 4), padding=1).value * 10.0**exponent, rel=1e-9
        )
    assert scaled >= spectral_norm(operator(weight, (4, 4), padding=1)) * 10.0**exponent * (1 - SVD_ERROR)


def test_chunks_of_frequencies_give_the_same_bound(monkeypatch):
    weight = gaussian(4, 3, 3, 3)
    whole = convolution_bound(weight, (6, 5), padding=1).value
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    assert convolution_bound(weight, (6, 5), padding=1).value == pytest.approx(whole, rel=1e-9)


def test_zero_weights():
    assert convolution_bound(torch.zeros(2, 2, 3, 3), (4, 4)).value == 0.0
    assert 0 <= absolute_convolution_bound(torch.zeros(2, 2, 3, 3), (4, 4)) < 1e-100


# Planted bugs: each of these claims must be caught by the comparison with the operator.


def _falls_below(weight: Tensor, size: tuple[int, int], **options) -> bool:
    truth = spectral_norm(operator(weight, size, **options))
    return convolution_bound(weight, size, **options, squarings=10).value < truth * (1 - SVD_ERROR)


def test_planted_zero_padding_on_a_torus_that_is_too_small(monkeypatch):
    """A difference of neighbours vanishes on a torus of two pixels, and not with zeros around them."""
    weight = torch.tensor([1.0, 0.0, -1.0]).view(1, 1, 1, 3)
    case = {"weight": weight, "size": (1, 2), "padding": (0, 1)}
    assert not _falls_below(**case)
    axis = module._axis
    monkeypatch.setattr(module, "_axis", lambda *a: replace(axis(*a), cells=a[0]))
    assert _falls_below(**case)


def test_planted_rounding_terms_dropped(monkeypatch):
    """Without them some bound of a one-channel convolution falls below its norm, by an ulp or so."""
    options = {"padding": 1, "padding_mode": "circular"}
    weights = [gaussian(1, 1, 3, 3, seed=seed) for seed in range(20)]
    matrices = [operator(weight, (3, 3), **options).mT for weight in weights]

    def all_hold() -> bool:
        bounds = [convolution_bound(weight, (3, 3), **options).value for weight in weights]
        return all(is_norm_bound(matrix, value) for matrix, value in zip(matrices, bounds, strict=True))

    assert all_hold()
    monkeypatch.setattr(module, "_formation_error", lambda *_: 0.0)
    monkeypatch.setattr(stack, "_gram_rounding", lambda *_: 0.0)
    monkeypatch.setattr(stack, "_frobenius_up", lambda s: torch.linalg.vector_norm(s.flatten(1), dim=1))
    assert not all_hold()


def test_planted_repeats_forgotten(monkeypatch):
    case = {"weight": gaussian(2, 2, 1, 1), "size": (3, 3), "padding": 1, "padding_mode": "circular"}
    assert not _falls_below(**case)
    axis = module._axis
    monkeypatch.setattr(module, "_axis", lambda *a: replace(axis(*a), repeats=1))
    assert _falls_below(**case)


def test_planted_phases_of_the_stride_mixed_up(monkeypatch):
    """All taps in one phase: what the other pixels of a cell add to the norm is lost."""
    weight = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)
    case = {"weight": weight, "size": (1, 4), "stride": (1, 2)}
    assert not _falls_below(**case)
    axis = module._axis

    def mixed(*args):
        found = axis(*args)
        return replace(found, phases=[[tap for phase in found.phases for tap in phase]])

    monkeypatch.setattr(module, "_axis", mixed)
    assert _falls_below(**case)


def test_planted_dilation_ignored(monkeypatch):
    """At stride 2 and dilation 2 both taps read even pixels, and their phases add up."""
    case = {"weight": torch.ones(1, 1, 1, 2), "size": (1, 8), "stride": (1, 2), "dilation": (1, 2)}
    assert not _falls_below(**case)
    axis = module._axis
    monkeypatch.setattr(module, "_axis", lambda *a: axis(*a[:4], 1, a[5]))
    assert _falls_below(**case)


def test_planted_smallest_group(monkeypatch):
    weight = torch.cat([torch.ones(1, 1, 1, 1), 3 * torch.ones(1, 1, 1, 1)])
    case = {"weight": weight, "size": (2, 2), "groups": 2}
    assert not _falls_below(**case)
    fold = module._fold

    def first_group(*args):
        kernel = fold(*args)
        return replace(kernel, phases=[(w[:1], shifts) for w, shifts in kernel.phases])

    monkeypatch.setattr(module, "_fold", first_group)
    assert _falls_below(**case)


def test_planted_half_of_the_frequencies_too_few(monkeypatch):
    weight = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)  # largest at the highest frequency
    case = {"weight": weight, "size": (1, 8), "padding": (0, 1), "padding_mode": "circular"}
    assert not _falls_below(**case)
    matrices = module._transfer_matrices
    monkeypatch.setattr(module, "_transfer_matrices", lambda k, f, t: matrices(k, f[: len(f) // 2], t))
    monkeypatch.setattr(module, "_schur_up", lambda k: 10.0)  # the Schur test is exact here
    assert _falls_below(**case)


def test_planted_power_iteration(monkeypatch):
    weight = rotations(n=6, seed=0).view(6, 6, 1, 1) + 0.01 * gaussian(6, 6, 1, 1)
    case = {"weight": weight, "size": (2, 2)}
    assert not _falls_below(**case)

    def from_below(stack, *_, **__):
        n = stack.shape[1] // 2
        return max(estimate_spectral_norm(m[:n], steps=50).value for m in stack)

    monkeypatch.setattr(module, "largest_norm_up", from_below)
    assert _falls_below(**case)


# Refusals.


@pytest.mark.parametrize("bound", [convolution_bound, schur_convolution_bound, absolute_convolution_bound])
def test_bad_weights_are_refused(bound):
    good = torch.ones(2, 2, 3, 3)
    for bad in (math.nan, -math.inf):
        weight = good.clone()
        weight[0, 0, 0, 0] = bad
        with pytest.raises(UnsoundError, match="holds NaN or infinity"):
            bound(weight, (4, 4))
    with pytest.raises(UnsoundError, match=r"floating-point tensor, got torch\.int64"):
        bound(good.long(), (4, 4))
    with pytest.raises(UnsoundError, match=r"got torch\.complex64"):
        bound(good.to(torch.complex64), (4, 4))
    with pytest.raises(ConfigError, match=r"must have the shape .* got \(2, 2, 3\)"):
        bound(good[..., 0], (4, 4))
    with pytest.raises(UnsoundError, match="overflow"):
        bound(good * 1e308, (4, 4))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"padding_mode": "reflect"}, "must be 'zeros' or 'circular', got 'reflect'"),
        ({"padding": "sane"}, "'same' or 'valid', got 'sane'"),
        ({"padding": "same", "stride": 2}, "'same' needs stride 1"),
        ({"padding": -1}, "padding must be an integer of at least 0"),
        ({"padding": (1, 1, 1)}, "or a pair of them"),
        ({"stride": 0}, "stride must be an integer of at least 1"),
        ({"stride": True}, "stride must be an integer of at least 1"),
        ({"dilation": 1.5}, "dilation must be an integer"),
        ({"dilation": 2}, "does not fit into 4 padded pixels"),
        ({"groups": 3}, "groups must divide the 2 output channels, got 3"),
        ({"padding_mode": "circular", "padding": 5}, "must not exceed the image, got 5 for 4 pixels"),
    ],
)
def test_bad_settings_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        convolution_bound(torch.ones(2, 2, 3, 3), (4, 4), **options)


def test_functional_convolution_is_the_same_map():
    """The operator of these tests uses the layer; the function gives the same."""
    weight, x = gaussian(2, 2, 3, 3), gaussian(1, 2, 4, 4, seed=1)
    padded = functional.pad(x, (1, 1, 1, 1), mode="circular")
    expected = functional.conv2d(padded, weight, stride=2).flatten()
    found = operator(weight, (4, 4), padding=1, padding_mode="circular", stride=2) @ x.flatten()
    assert torch.allclose(found, expected)
