import math

import pytest
import torch
from helpers import spectral_norm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lipnext.bounds import pooling as module
from lipnext.bounds.pooling import (
    adaptive_average_pooling_bound,
    average_pooling_bound,
    l2_pooling_bound,
    max_pooling_bound,
)
from lipnext.core.errors import ConfigError

# LAPACK's largest singular value may itself be off by a few n u, in either direction.
SVD_ERROR = 1e-13

sizes = st.tuples(st.integers(1, 8), st.integers(1, 8))
kernels = st.tuples(st.integers(1, 4), st.integers(1, 4))


def operator(layer: nn.Module, size: tuple[int, int]):
    units = torch.eye(size[0] * size[1]).view(-1, 1, *size)
    return layer(units).flatten(1).mT


def _fits(size, kernel, padding, dilation=(1, 1)) -> bool:
    return all(
        s + 2 * p >= d * (k - 1) + 1 for s, k, p, d in zip(size, kernel, padding, dilation, strict=True)
    )


@given(
    size=sizes,
    kernel=kernels,
    stride=st.one_of(st.none(), kernels),
    data=st.data(),
    ceil_mode=st.booleans(),
    count_include_pad=st.booleans(),
    divisor=st.sampled_from([None, None, 1, 3, -2]),
)
@settings(max_examples=250, deadline=None)
def test_average_pooling_is_never_below_the_svd(
    size, kernel, stride, data, ceil_mode, count_include_pad, divisor
):
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    assume(_fits(size, kernel, padding))
    options = {
        "stride": stride,
        "padding": padding,
        "ceil_mode": ceil_mode,
        "count_include_pad": count_include_pad,
        "divisor_override": divisor,
    }
    truth = spectral_norm(operator(nn.AvgPool2d(kernel, **options), size))
    bound = average_pooling_bound(size, kernel, **options)
    assert bound.value >= truth * (1 - SVD_ERROR)
    assert bound.value <= truth * 1.05
    if stride is None and padding == (0, 0) and not ceil_mode:  # disjoint, complete windows: the norm itself
        assert bound.value <= truth * (1 + SVD_ERROR)
        assert bound.proof == "schur"
    elif divisor is None and padding == (0, 0) and not ceil_mode:
        overlaps = [
            min(-(-k // s), (n - k) // s + 1) for n, k, s in zip(size, kernel, stride or kernel, strict=True)
        ]
        assert bound.value <= math.sqrt(math.prod(overlaps) / math.prod(kernel)) * (1 + 1e-15)


@given(size=sizes, outputs=sizes)
@settings(max_examples=80, deadline=None)
def test_adaptive_average_pooling_is_never_below_the_svd(size, outputs):
    truth = spectral_norm(operator(nn.AdaptiveAvgPool2d(outputs), size))
    bound = adaptive_average_pooling_bound(size, outputs).value
    assert bound >= truth * (1 - SVD_ERROR)
    if all(s % o == 0 for s, o in zip(size, outputs, strict=True)):
        assert bound <= truth * (1 + SVD_ERROR)


def test_global_average_pooling_is_one_over_the_root_of_the_pixels():
    assert adaptive_average_pooling_bound((4, 16), 1).value == 1 / 8


def _slow_overlap(layer: nn.MaxPool2d, size: tuple[int, int]) -> int:
    """How many windows contain a pixel, at most: a single bright pixel wins in all of them."""
    bright = torch.eye(size[0] * size[1]).view(-1, 1, *size)
    return int((layer(bright) == 1).flatten(1).sum(1).max())


@given(
    size=sizes,
    kernel=kernels,
    stride=st.one_of(st.none(), kernels),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    data=st.data(),
    ceil_mode=st.booleans(),
)
@settings(max_examples=250, deadline=None)
def test_max_pooling_counts_the_windows_of_a_pixel(size, kernel, stride, dilation, data, ceil_mode):
    """A bright pixel moves all its windows at once: the bound is attained."""
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    assume(_fits(size, kernel, padding, dilation))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    bound = max_pooling_bound(size, kernel, **options)
    attained = math.sqrt(_slow_overlap(nn.MaxPool2d(kernel, **options), size))
    assert attained <= bound.value <= math.nextafter(attained, math.inf)
    assert bound.proof == "window-overlap"


@given(size=sizes, kernel=kernels, stride=st.one_of(st.none(), kernels), seed=st.integers(0, 2**20))
@settings(max_examples=100, deadline=None)
def test_l2_and_max_pooling_obey_their_bounds_between_points(size, kernel, stride, seed):
    assume(_fits(size, kernel, (0, 0)))
    x, y = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    for layer, bound in (
        (nn.LPPool2d(2, kernel, stride), l2_pooling_bound(size, kernel, stride=stride)),
        (nn.MaxPool2d(kernel, stride), max_pooling_bound(size, kernel, stride=stride)),
    ):
        # 1e-12: the pooling itself rounds
        assert (layer(x) - layer(y)).norm() <= bound.value * (x - y).norm() * (1 + 1e-12)


def test_l2_pooling_attains_its_bound():
    """One pixel for the overlap; disjoint windows keep norms."""
    assert l2_pooling_bound((6, 6), 2).value == 1.0
    assert l2_pooling_bound((3, 3), 2, stride=1).value == 2.0
    pixel = torch.zeros(1, 1, 3, 3)
    pixel[0, 0, 1, 1] = 1.0
    assert nn.LPPool2d(2, 2, stride=1)(pixel).norm() == pytest.approx(2.0)


def test_planted_windows_thought_disjoint(monkeypatch):
    """The comparisons above notice a stride taken for the kernel size."""
    axes = module._axes
    monkeypatch.setattr(module, "_axes", lambda size, k, stride, *rest: axes(size, k, k, *rest))
    truth = spectral_norm(operator(nn.AvgPool2d(3, stride=1), (6, 6)))
    assert average_pooling_bound((6, 6), 3, stride=1).value < truth * 0.9
    assert max_pooling_bound((6, 6), 3, stride=1).value < math.sqrt(
        _slow_overlap(nn.MaxPool2d(3, stride=1), (6, 6))
    )


def test_planted_padding_counted_in_the_divisor():
    """With count_include_pad=False a corner's window weighs more; the other setting's bound would be too small."""
    layer = nn.AvgPool2d(2, stride=2, padding=1, count_include_pad=False)
    truth = spectral_norm(operator(layer, (4, 4)))
    assert truth == pytest.approx(1.0)
    assert average_pooling_bound((4, 4), 2, padding=1, count_include_pad=False).value >= truth * (
        1 - SVD_ERROR
    )
    assert average_pooling_bound((4, 4), 2, padding=1).value < truth * 0.9


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: max_pooling_bound((4, 4), 0), "kernel_size must be an integer of at least 1"),
        (
            lambda: max_pooling_bound((4, 4), 5),
            "a pooling window of 5 pixels does not fit into 4 padded ones",
        ),
        (
            lambda: average_pooling_bound((4, 4), 3, padding=2),
            "padding must be at most half the window, got 2",
        ),
        (lambda: average_pooling_bound((4, 4), 2, divisor_override=0), "divisor_override must be an integer"),
        (lambda: average_pooling_bound((4, 4), 2, stride=(1, 0)), "stride must be an integer of at least 1"),
        (lambda: adaptive_average_pooling_bound((4, 0), 1), "input_size must be an integer of at least 1"),
        (lambda: adaptive_average_pooling_bound((4, 4), (1, 0)), "output_size must be an integer"),
        (lambda: l2_pooling_bound((4, 4), 2.0), "kernel_size must be an integer"),
    ],
)
def test_bad_settings_are_refused(call, sentence):
    with pytest.raises(ConfigError, match=sentence):
        call()
