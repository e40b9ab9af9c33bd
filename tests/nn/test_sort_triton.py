"""SortNet's Triton kernels, in Triton's interpreter on the CPU, against the definitions written out pair by pair."""

import math
import os

import pytest
import torch
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, which nothing does before the tests run
pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from lipnext.nn import sort_kernel, sort_triton

ROUNDING = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slow_distances(low: Tensor, high: Tensor, weight: Tensor, nearest: bool) -> Tensor:
    """From the nearest point of an interval, or the farthest, in the dtype of the kernels."""
    below, above = weight[:, None] - low[:, :, None], high[:, :, None] - weight[:, None]
    if nearest:
        return torch.maximum(-torch.minimum(below, above), torch.zeros_like(below))
    return torch.maximum(below, above)


# More rows, columns and numbers than one tile, and fewer.
@pytest.mark.parametrize(
    ("shape", "terms"), [((2, 3, 4, 5), 5), ((1, 17, 18, 33), 3), ((1, 1, 1, 1), 1), ((1, 2, 3, 40), 17)]
)
@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_distances_are_taken(
    shape: tuple[int, int, int, int], terms: int, nearest: bool, dtype: torch.dtype
) -> None:
    g, b, m, n = shape
    low, weight = random(g, b, n, seed=1, dtype=dtype), random(g, m, n, seed=2, dtype=dtype)
    high = low + random(g, b, n, seed=3, dtype=dtype).abs()
    c = torch.linspace(1, 0.1, terms, dtype=dtype)
    sums, places = sort_triton.top(low, high, weight, c, nearest=nearest)
    assert sums.dtype == dtype
    assert places.dtype == torch.int32
    # A stable sort leaves equal distances (the many zeros of `nearest`) in the order of their places.
    values, order = slow_distances(low, high, weight, nearest).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(places.long(), order[..., :terms])
    # Sums of at most 17 terms below 6, each product and each addition rounded once.
    expected = (values[..., :terms].double() * c.double()).sum(-1)
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=100 * terms * ROUNDING[dtype])


def test_equal_distances_are_told_by_the_smallest_places_across_tiles() -> None:
    x, weight = torch.zeros(1, 1, 50), torch.ones(1, 1, 50)
    weight[0, 0, ::2] = -1
    weight[0, 0, 40] = 2
    sums, places = sort_triton.top(x, x, weight, torch.full((20,), 0.5))
    assert places[0, 0, 0].tolist() == [40, *range(19)]
    assert sums.item() == 0.5 * (2 + 19)


def test_what_is_no_number_is_not_hidden() -> None:
    x, weight = torch.zeros(1, 2, 20), torch.ones(1, 1, 20)
    x[0, 1, 18] = math.nan
    for nearest in (False, True):
        sums, _ = sort_triton.top(x, x, weight, torch.ones(1), nearest=nearest)
        assert sums[0, 0].item() == 1
        assert not sums[0, 1].isfinite()
    assert not sort_triton.power_distance(x, weight, 8.0)[0, 1].isfinite()


def slow_norm(x: Tensor, weight: Tensor, exponent: float) -> Tensor:
    d = (x[:, :, None] - weight[:, None]).abs()
    largest = d.detach().amax(-1)
    return largest * (d / largest[..., None]).pow(exponent).sum(-1).pow(1 / exponent)


@pytest.mark.parametrize("exponent", [1.5, 8.0, 1000.0])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 17, 18, 33)])
def test_lp_norms_and_their_gradients_are_those_of_autograd(
    shape: tuple[int, int, int, int], exponent: float
) -> None:
    g, b, m, n = shape
    x, w = random(g, b, n, seed=1).double(), random(g, m, n, seed=2).double()
    x[0, 0, 1] = w[0, 0, 1]  # a distance of 0
    x[0, 1, 0], x[0, 1, 1] = w[0, 2, 0] + 8, w[0, 2, 1] - 8  # two largest distances, equal but for roundoff
    x, w = x.float().double().requires_grad_(), w.float().double().requires_grad_()
    y, dy = slow_norm(x, w, exponent), random(g, b, m, seed=3).double()
    gx, gw = torch.autograd.grad((y * dy).sum(), (x, w))
    a, c = x.detach().float(), w.detach().float()
    found = sort_triton.power_distance(a, c, exponent)
    # The p-th root undoes what the p-th power does to errors.
    torch.testing.assert_close(found.double(), y.detach(), rtol=2e-6, atol=0)
    fx, fw = sort_triton.power_gradients(a, c, exponent, found, dy.float())
    # A relative error of float32 distances, p times; sums of 18 terms for small p.
    tolerance = 1e-6 * max(10.0, exponent)
    torch.testing.assert_close(fx.double(), gx, rtol=0, atol=tolerance)
    torch.testing.assert_close(fw.double(), gw, rtol=0, atol=tolerance)


@pytest.mark.parametrize("exponent", [8.0, 1000.0])
def test_where_an_input_is_a_row_of_the_weight_nothing_is_lost(exponent: float) -> None:
    x, scale = random(1, 2, 5, seed=1), 1e-3
    y = sort_triton.power_distance(x, x, exponent)
    assert y[0].diagonal().abs().max() < 1e-9
    for part in sort_triton.power_gradients(x, x, exponent, y, torch.ones_like(y)):
        assert part.isfinite().all()
    # Without the largest taken out 0.001^1000 is 0, and 1000^1000 infinite.
    for size in (scale, 1 / scale):
        far = sort_triton.power_distance(torch.zeros(1, 1, 5), torch.full((1, 1, 5), size), exponent)
        assert far.item() == pytest.approx(size * 5 ** (1 / exponent), rel=2e-6)


def test_on_a_gpu_the_kernels_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.dtype, ...]] = []

    def usable(x: Tensor, *dtypes: torch.dtype) -> bool:
        asked.append(dtypes)
        return True

    x, w, c = random(1, 2, 5, seed=1), random(1, 3, 5, seed=2), torch.ones(2)
    plain = (sort_kernel.top(x, x, w, c)[0], sort_kernel.power_distance(x, w, 8.0))
    monkeypatch.setattr(sort_kernel, "usable", usable)
    monkeypatch.setattr(sort_kernel, "library", lambda: pytest.fail("the CPU's kernels were taken"))
    monkeypatch.setattr(sort_kernel, "_pieces", lambda *shape: pytest.fail("torch was taken"))
    y = sort_kernel.power_distance(x, w, 8.0)
    torch.testing.assert_close(sort_kernel.top(x, x, w, c, nearest=False)[0], plain[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(y, plain[1], rtol=2e-6, atol=0)
    dx, dw = sort_kernel.power_gradients(x, w, 8.0, y, torch.ones_like(y))
    assert (dx.shape, dw.shape) == (x.shape, w.shape)
    assert asked == 3 * [(torch.float32,)]  # what is certified is in float64
