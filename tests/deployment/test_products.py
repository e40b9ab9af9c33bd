import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lipnext.deployment.products import average_pooling, convolution, transposed_convolution


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
    has_bias=st.booleans(),
)
def test_a_convolution_is_the_same_as_products(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    has_bias: bool,
) -> None:
    images, weight = torch.randn(3, 4, 9, 8), torch.randn(6, 4 // groups, *kernel)
    bias = torch.randn(6) if has_bias else None
    got = convolution(images, weight, bias, stride, padding, dilation, groups)
    expected = functional.conv2d(images, weight, bias, stride, padding, dilation, groups)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    if groups == 1:
        weight = torch.randn(4, 6, *kernel)
        padding = (
            min(padding[0], dilation[0] * (kernel[0] - 1)),
            min(padding[1], dilation[1] * (kernel[1] - 1)),
        )
        got = transposed_convolution(images, weight, bias, (1, 1), padding, (0, 0), 1, dilation)
        expected = functional.conv_transpose2d(images, weight, bias, 1, padding, 0, 1, dilation)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@given(kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), stride=st.sampled_from([(), (1, 1), (2, 3)]))
def test_averages_are_the_same_as_sums(kernel: tuple[int, int], stride: tuple[int, ...]) -> None:
    images = torch.randn(3, 4, 9, 8)
    expected = functional.avg_pool2d(images, kernel, stride or None)
    torch.testing.assert_close(average_pooling(images, kernel, stride), expected, rtol=0, atol=1e-13)


def test_what_is_not_spelled_out_is_left_alone() -> None:
    images, weight = torch.randn(1, 4, 9, 8), torch.randn(4, 6, 3, 3)
    assert transposed_convolution(images, weight, None, (1, 2)) is NotImplemented
    assert transposed_convolution(images, weight, None, (1, 1), (0, 0), (0, 1)) is NotImplemented
    assert transposed_convolution(images, weight, None, groups=2) is NotImplemented
    assert average_pooling(images, (2, 2), padding=(1, 1)) is NotImplemented
    assert average_pooling(images, (2, 2), ceil_mode=True) is NotImplemented
    assert average_pooling(images, (2, 2), divisor_override=1) is NotImplemented
