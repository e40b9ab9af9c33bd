"""Everything that could put unproved digits into a certificate is refused, one mutation at a time."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lipnext.core import guard
from lipnext.core.errors import DataError, UnsoundError
from lipnext.core.guard import check_certifiable, check_images, selftest_matmul


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 4, dtype=torch.float32), nn.ReLU(), nn.Linear(4, 2, dtype=torch.float64)
    ).eval()


def test_a_plain_network_passes() -> None:
    assert check_certifiable(net()) is None  # type: ignore[func-returns-value]


def test_train_mode_of_any_part_is_refused() -> None:
    module = net()
    module[1].train()  # type: ignore[index, operator]
    with pytest.raises(UnsoundError, match=r"cannot certify in train mode \(1 is\); call \.eval\(\) first"):
        check_certifiable(module)
    with pytest.raises(UnsoundError, match=r"train mode \(Linear is\)"):
        check_certifiable(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_other_weight_types_are_refused(dtype: torch.dtype) -> None:
    module = net()
    module.register_buffer("table", torch.zeros(2, dtype=dtype), persistent=False)
    with pytest.raises(
        UnsoundError, match=f"cannot certify table in {dtype}; store the weights in float32 or float64"
    ):
        check_certifiable(module)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    module = net()
    with torch.no_grad():
        module[0].bias[1] = bad  # type: ignore[index, operator]
    with pytest.raises(UnsoundError, match=r"0\.bias holds NaN or infinity; load a good checkpoint"):
        check_certifiable(module)


def test_autocast_is_refused() -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(UnsoundError, match=r"cannot certify under autocast \(cpu\); leave"),
    ):
        check_certifiable(net())
    check_certifiable(net())


@pytest.fixture
def precision() -> Iterator[None]:
    """Put every precision setting back."""
    yield
    for place in (torch.backends.mkldnn, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv):
        if hasattr(place, "fp32_precision"):
            place.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("level", ["high", "medium"])
def test_reduced_float32_products_are_refused(level: str) -> None:
    torch.set_float32_matmul_precision(level)
    with pytest.raises(UnsoundError, match=r"call torch\.set_float32_matmul_precision\('highest'\)"):
        check_certifiable(net())


@pytest.mark.usefixtures("precision")
def test_tf32_is_refused() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    with pytest.raises(UnsoundError, match="cannot certify with"):
        check_certifiable(net())


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("place", ["matmul", "conv"])
def test_reduced_onednn_precision_is_refused_until_the_advice_is_followed(place: str) -> None:
    backend = getattr(torch.backends.mkldnn, place, None)
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this version of torch has no such setting")
    backend.fp32_precision = "bf16"
    for _ in range(3):
        try:
            check_certifiable(net())
            break
        except UnsoundError as error:
            advice = re.search(r"torch\.(?:set_float32\S+|backends\S+ = \S+)", str(error))
            assert advice is not None
            exec(advice[0], {"torch": torch})
    check_certifiable(net())
    assert backend.fp32_precision in ("none", "ieee")


def test_flushed_subnormal_numbers_are_refused() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        with pytest.raises(UnsoundError, match=r"call torch\.set_flush_denormal\(False\)"):
            check_certifiable(net())
    finally:
        torch.set_flush_denormal(False)
    check_certifiable(net())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selftest_passes_and_its_data_is_exact(dtype: torch.dtype) -> None:
    selftest_matmul(dtype)
    bits = guard.PRECISION[dtype]
    for left in (1, (bits - 5) // 2, bits - 6):
        a = guard._odd_integers((64, 32), left, torch.Generator().manual_seed(0)).abs()
        b = guard._odd_integers((32, 64), bits - 5 - left, torch.Generator().manual_seed(1)).abs()
        assert int((a @ b).max()) < 2**bits


def truncated(bits: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a product whose factors keep so many bits only, as TF32 (11) and bfloat16 (8) do."""

    def keep(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp(torch.round(mantissa * 2**bits) / 2**bits, exponent).to(x.dtype)

    product = Tensor.matmul
    return lambda a, b: product(keep(a), keep(b)) if a.is_floating_point() else product(a, b)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.float32, 8), (torch.float32, 11), (torch.float32, 16), (torch.float64, 24), (torch.float64, 40)],
)
def test_selftest_catches_reduced_factors(
    dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "__matmul__", truncated(bits))
    with pytest.raises(UnsoundError, match=f"a {dtype} matrix product on cpu is not exact where it must be"):
        selftest_matmul(dtype)


def test_selftest_catches_float32_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Tensor.matmul
    monkeypatch.setattr(
        Tensor,
        "__matmul__",
        lambda a, b: product(a.float(), b.float()).to(a.dtype) if a.is_floating_point() else product(a, b),
    )
    with pytest.raises(UnsoundError, match="not exact"):
        selftest_matmul(torch.float64)


SHAPE = (1, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_good_images_pass(dtype: torch.dtype, n: int) -> None:
    images = torch.rand(n, *SHAPE, dtype=dtype)
    images.view(-1)[:2] = torch.tensor([0.0, 1.0])[: images.numel()]
    assert check_images(images, SHAPE) is None  # type: ignore[func-returns-value]


def with_value(value: float) -> Tensor:
    images = torch.full((2, *SHAPE), 0.5, dtype=torch.float64)
    images[1, 0, 3, 3] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([[0.5]], r"images must be a tensor of shape \(n, 1, 4, 4\), got list"),
        (torch.zeros(2, *SHAPE, dtype=torch.uint8), "got uint8; divide by 255"),
        (torch.zeros(2, *SHAPE, dtype=torch.int64), r"must be float32 or float64, got torch\.int64"),
        (torch.zeros(2, *SHAPE, dtype=torch.float16), r"must be float32 or float64, got torch\.float16"),
        (torch.zeros(SHAPE), r"got one image; use images\[None\]"),
        (torch.zeros(2, 4, 4, 1), r"must have the shape \(n, 1, 4, 4\), got \(2, 4, 4, 1\)"),
        (torch.zeros(0, 3, 4, 4), r"must have the shape \(n, 1, 4, 4\), got \(0, 3, 4, 4\)"),
        (torch.zeros(2, 16), r"got \(2, 16\)"),
        (with_value(float("nan")), "must be finite, got NaN or infinity"),
        (with_value(float("inf")), "must be finite, got NaN or infinity"),
        (with_value(-1e-9), r"must lie in \[0, 1\], got values from -1e-09 to 0\.5"),
        (with_value(255.0), r"must lie in \[0, 1\], got values from 0\.5 to 255; divide 8-bit values by 255"),
        (with_value(1.0 + 2.0**-52), r"must lie in \[0, 1\]"),
    ],
)
def test_bad_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_images(images, SHAPE)
