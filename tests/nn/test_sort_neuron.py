"""Sort neurons: reference vectors, the compiled and the plain path, gradients of exactly one arg-max, masks, boxes."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.core.errors import ConfigError, UnsoundError
from lipnext.core.rounding import UNIT_ROUNDOFF, RoundingState
from lipnext.nn import sort_kernel
from lipnext.nn.sort_kernel import library, power_distance, power_gradients, top
from lipnext.nn.sort_neuron import (
    SortDense,
    SortHead,
    TanhHead,
    coefficients,
    distances,
    sort_neurons,
    worst_differences,
)

X = torch.tensor([[0.5, -1.0, 2.0, 0.25]], dtype=torch.float64)
W = torch.tensor([[0, 0, 0, 0], [1, -1, 1.5, -0.75], [-0.5, 0.5, 0.25, 2.0]], dtype=torch.float64)
BOXES = {
    # (q, eps): lower and upper sides
    (1.0, 0.1): ([1.9, 0.9, 1.65], [2.1, 1.1, 1.85]),
    (0.75, 0.1): ([1.62058824, 0.77176471, 1.62941176], [1.82058824, 0.97058824, 1.82941176]),
    (1.0, 0.6): ([1.4, 0.4, 1.15], [2.6, 1.6, 2.35]),
    (0.75, 0.6): ([1.12941176, 0.30117647, 1.12941176], [2.32058824, 1.47058824, 2.32941176]),
}

PATHS = ["compiled", "torch"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on both ways to compute the same."""
    if request.param == "torch":
        monkeypatch.setattr(sort_kernel, "library", lambda: None)
        monkeypatch.setattr(sort_kernel, "PIECE", 100)  # so small that everything is cut into pieces
    elif library() is None:
        pytest.skip("there is no C compiler")
    return str(request.param)


def layer_of(weight: Tensor, keep: float, terms: int = 10) -> SortDense:
    layer = SortDense(weight.shape[1], weight.shape[0], keep=keep, terms=terms).double().eval()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def slow(x: Tensor, w: Tensor, q: float, terms: int) -> Tensor:
    """The definition, neuron by neuron."""
    terms = min(terms, x.shape[1])
    c = [q * (1 - q) ** k / (1 - (1 - q) ** terms) for k in range(terms)]
    rows = []
    for point in x.tolist():
        d = [
            sorted((abs(a - b) for a, b in zip(point, row, strict=True)), reverse=True) for row in w.tolist()
        ]
        rows.append([sum(ck * dk for ck, dk in zip(c, row, strict=False)) for row in d])
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("exponent", "expected"),
    [
        (2.0, [2.30488611, 1.22474487, 3.06186218]),
        (8.0, [2.00097871, 1.00097324, 1.94230898]),
        (1000.0, [2.0, 1.0, 1.75121343]),
        (math.inf, [2.0, 1.0, 1.75]),
    ],
)
def test_the_distances_of_the_reference_vector(
    path: str, dtype: torch.dtype, exponent: float, expected: list[float]
) -> None:
    found = distances(X[None].to(dtype), W[None].to(dtype), exponent)[0, 0]
    tolerance = 1e-8 if dtype == torch.float64 else 2e-6
    assert found.tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("keep", "terms", "expected"),
    [
        (0.75, 10, [1.72058824, 0.87058824, 1.72941176]),
        (0.5, 2, [1.66666667, 0.83333333, 1.75]),
        (1.0, 10, [2.0, 1.0, 1.75]),
    ],
)
def test_the_neurons_of_the_reference_vector(
    path: str, keep: float, terms: int, expected: list[float]
) -> None:
    assert layer_of(W, keep, terms)(X)[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("keep", "eps"), BOXES)
def test_the_boxes_of_the_reference_vector(path: str, keep: float, eps: float) -> None:
    low, high = layer_of(W, keep).box(X - eps, X + eps, None)
    assert low[0].tolist() == pytest.approx(BOXES[keep, eps][0], abs=1e-6)
    assert high[0].tolist() == pytest.approx(BOXES[keep, eps][1], abs=1e-6)


def test_the_expectation_over_masks_is_that_of_the_reference_vector() -> None:
    d = (X[0] - W[1]).abs()
    masks = torch.rand(400_000, 4, generator=torch.Generator().manual_seed(1)) < 0.75
    # The deviation of the mean is 0.3 / sqrt(4e5) = 5e-4.
    assert (masks * d).amax(1).mean().item() == pytest.approx(0.8671875, abs=2e-3)
    series = sum(0.75 * 0.25**k * dk for k, dk in enumerate(d.sort(descending=True).values.tolist()))
    assert series == pytest.approx(0.8671875, abs=1e-12)


@given(st.floats(0.05, 1), st.integers(1, 30))
def test_coefficients_fall_and_add_up_to_exactly_one(keep: float, terms: int) -> None:
    c = [Fraction(v) for v in coefficients(keep, terms).tolist()]
    assert sum(c) == 1
    assert all(v >= 0 for v in c)
    assert c[1:] == sorted(c[1:], reverse=True)
    total = 1 - (1 - keep) ** terms
    assert float(c[0]) == pytest.approx(keep / total, abs=terms * 2**-24)
    # They survive a bundle, which is rounded to float32.
    assert [Fraction(v) for v in coefficients(keep, terms).float().double().tolist()] == c


def test_the_constant_is_that_of_the_stored_coefficients() -> None:
    layer = layer_of(W, 0.75)
    assert layer.lipschitz_bound().value == 1.0
    assert layer.lipschitz_bound().norm == math.inf
    layer.coefficients[1] += 2.0**-20
    assert layer.lipschitz_bound().value == 1 + 2.0**-20


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.7, 1.0]), st.integers(1, 12), st.integers(1, 40))
def test_neurons_are_the_sorted_sums_and_move_by_no_more_than_the_inputs(
    seed: int, keep: float, terms: int, n: int
) -> None:
    x, w = random(3, n, seed=seed), random(5, n, seed=seed + 1)
    layer = layer_of(w, keep, terms)
    y = layer(x)
    # coefficients are rounded to 2^-24
    torch.testing.assert_close(y, slow(x, w, keep, terms), rtol=0, atol=1e-5)
    other = x + 0.3 * random(3, n, seed=seed + 2)
    moved = (x - other).abs().amax(1, keepdim=True)
    assert ((layer(other) - y).abs() <= moved * (1 + 1e-12)).all()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer_of(w[:, order], keep, terms)(x[:, order]), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "terms"), [(1, 1), (5, 3), (64, 10), (130, 10), (200, 17)])
@pytest.mark.parametrize("nearest", [False, True])
def test_both_paths_take_the_same_distances(dtype: torch.dtype, n: int, terms: int, nearest: bool) -> None:
    low, w = random(2, 3, n, dtype=dtype), random(2, 4, n, seed=1, dtype=dtype)
    high = low + random(2, 3, n, seed=2, dtype=dtype).abs()
    c = coefficients(0.6, terms).to(dtype)
    sums, places = top(low, high, w, c, nearest=nearest)
    below, above = w[:, None] - low[:, :, None], high[:, :, None] - w[:, None]
    d = torch.minimum(below, above).neg().clamp_min(0) if nearest else torch.maximum(below, above)
    values = d.sort(-1, descending=True).values[..., :terms]
    torch.testing.assert_close(d.gather(-1, places.long()), values, rtol=0, atol=0)
    torch.testing.assert_close(sums, values @ c, rtol=0, atol=8 * terms * torch.finfo(dtype).eps)
    assert all(len(set(row.tolist())) == terms for row in places.flatten(0, 2))


@pytest.mark.parametrize("exponent", [2.5, 8.0, 37.0, 1000.0])
@pytest.mark.parametrize("n", [3, 64, 130])
def test_lp_norms_and_their_gradients_are_those_of_autograd(path: str, exponent: float, n: int) -> None:
    x, w = random(2, 5, n).requires_grad_(), random(2, 9, n, seed=1).requires_grad_()
    d = (x[:, :, None] - w[:, None]).abs()
    largest = d.amax(-1).detach()
    y = largest * (d / largest[..., None]).pow(exponent).sum(-1).pow(1 / exponent)
    dy = random(2, 5, 9, seed=2)
    gx, gw = torch.autograd.grad((y * dy).sum(), (x, w))
    found = power_distance(x.detach().float(), w.detach().float(), exponent)
    # A relative error of float32 distances, p times, in the gradients.
    torch.testing.assert_close(found.double(), y.detach(), rtol=2e-6, atol=0)
    fx, fw = power_gradients(x.detach().float(), w.detach().float(), exponent, found, dy.float())
    tolerance = 1e-6 * max(10.0, exponent)
    torch.testing.assert_close(fx.double(), gx, rtol=0, atol=tolerance)
    torch.testing.assert_close(fw.double(), gw, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("exponent", [8.0, 1000.0, math.inf])
def test_where_an_input_is_a_row_of_the_weight_nothing_is_lost(
    path: str, dtype: torch.dtype, exponent: float
) -> None:
    x, w = random(1, 2, 5, dtype=dtype).requires_grad_(), random(1, 2, 5, dtype=dtype).requires_grad_()
    y = distances(x, w, exponent)
    assert y[0].diagonal().abs().max() < 1e-9
    y.sum().backward()
    for part in (x, w):
        assert part.grad is not None
        assert part.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_a_tie_goes_to_exactly_one_input(path: str, training: bool) -> None:
    layer = layer_of(W[2:], 1.0).train(training)
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    # Inputs 3 and 4 are both at a distance of 1.75, on different sides.
    assert x.grad is not None
    assert sorted(x.grad.abs().tolist()[0]) == [0, 0, 0, 1]
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, -x.grad)
    three = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    layer_of(torch.ones(1, 6, dtype=torch.float64), 0.5, 3)(three).sum().backward()
    assert three.grad is not None
    assert three.grad.abs().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (three.grad != 0).sum() == 3


def test_the_gradient_of_a_sort_neuron_is_that_of_differences(path: str) -> None:
    x, w = random(1, 2, 12).requires_grad_(), random(1, 3, 12, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: sort_neurons(a, b, coefficients(0.6, 4).double()), (x, w))


def test_a_masked_step_is_the_distance_over_the_chosen_inputs(path: str) -> None:
    layer = SortDense(9, 6, keep=0.5, generator=torch.Generator().manual_seed(7)).double().train()
    layer.exponent = 8.0
    assert layer.kept == 4  # of 4.5, to even
    columns, rows = torch.tensor([[0, 2, 5, 7], [1, 2, 3, 8]]), torch.tensor([[0, 4], [1, 5]])
    x = random(2, 3, 9)
    chosen = x.gather(2, columns[:, None].expand(-1, 3, -1))
    found = layer.respond_masked(chosen, columns, rows)
    for g in range(2):
        for b in range(3):
            for o in range(2):
                d = x[g, b, columns[g]] - layer.weight[rows[g, o], columns[g]]
                assert found[g, b, o].item() == pytest.approx(torch.linalg.vector_norm(d, 8).item(), rel=1e-9)
    dy = random(2, 3, 2, seed=3)
    (found * dy).sum().backward()
    # The same by indexing with both at once.
    weight = layer.weight.detach().clone().requires_grad_()
    again = distances(chosen, weight[rows[:, :, None], columns[:, None, :]], 8.0)
    (again * dy).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=0, atol=1e-12)


def test_the_exponent_of_training_does_not_reach_the_deployed_neuron() -> None:
    layer = layer_of(W, 0.75)
    before = layer(X)
    layer.exponent = 8.0
    assert torch.equal(layer(X), before)
    assert torch.equal(layer.materialise()(X), before)
    assert not torch.equal(layer.train()(X), before)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.4, 1.0]), st.floats(1e-3, 2))
def test_boxes_hold_every_point_and_no_side_moves_by_more_than_eps(
    seed: int, keep: float, eps: float
) -> None:
    x, layer = random(2, 9, seed=seed), layer_of(random(4, 9, seed=seed + 1), keep, 4)
    low, high = layer.box(x - eps, x + eps, None)
    y = layer(x)
    assert (low >= y - eps - 1e-12).all()
    assert (high <= y + eps + 1e-12).all()
    inside = x[:, None] + eps * (
        2 * torch.rand(2, 50, 9, generator=torch.Generator().manual_seed(seed)).double() - 1
    )
    values = layer(inside.flatten(0, 1)).unflatten(0, (2, 50))
    assert (values >= low[:, None]).all()
    assert (values <= high[:, None]).all()


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_a_box_around_a_point_holds_the_exact_value_and_that_of_a_float32_program(seed: int) -> None:
    x, w = random(1, 7, seed=seed).float(), random(3, 7, seed=seed + 1).float()
    layer = SortDense(7, 3, keep=0.6, terms=5).eval()
    with torch.no_grad():
        layer.weight.copy_(w)
    executed = layer(x).double()
    exact = []
    c = [Fraction(v) for v in layer.coefficients.tolist()]
    for row in w.tolist():
        d = sorted(
            (abs(Fraction(a) - Fraction(b)) for a, b in zip(x[0].tolist(), row, strict=True)), reverse=True
        )
        exact.append(sum((ck * dk for ck, dk in zip(c, d, strict=False)), Fraction(0)))
    double = layer.double()
    low, high = double.box(x.double(), x.double(), None)
    assert all(
        Fraction(a) <= e <= Fraction(b)
        for a, e, b in zip(low[0].tolist(), exact, high[0].tolist(), strict=True)
    )
    assert (high - low).max() < 1e-13
    low, high = double.box(x.double(), x.double(), UNIT_ROUNDOFF[torch.float32])
    assert ((low <= executed) & (executed <= high)).all()
    assert (high - low).max() < 1e-4


def head_of(kind: str) -> SortHead | TanhHead:
    g = torch.Generator().manual_seed(0)
    head = (
        SortHead(6, 4, keep=0.6, generator=g) if kind != "tanh" else TanhHead(6, 4, 5, generator=g)
    ).double()
    with torch.no_grad():
        head.bias.copy_(0.3 * random(4, seed=5))
        if isinstance(head, SortHead):
            head.scale.fill_(-1.5 if kind == "negative" else 2.5)
    return head.eval()


@pytest.mark.parametrize("kind", ["sort", "negative", "tanh"])
def test_margins_of_a_head_hold_in_the_box_and_constants_bound_differences(kind: str) -> None:
    head, centre = head_of(kind), random(3, 6)
    labels = head(centre).argmax(1)
    constants = head.constants()
    assert (constants >= head.distances().detach()).all()
    for eps in (0.0, 0.05, 0.5):
        margins = head.margins(centre - eps, centre + eps, labels, None)
        points = centre[:, None] + eps * (2 * torch.rand(3, 300, 6).double() - 1)
        logits = head(points.flatten(0, 1)).unflatten(0, (3, 300))
        found = logits.gather(2, labels[:, None, None].expand(-1, 300, 1)) - logits
        others = torch.arange(4) != labels[:, None]
        assert ((found.amin(1) - margins)[others] >= -1e-15).all()
        # Nothing is lost but what intervals lose: at a point, next to nothing.
        assert eps or (found.amin(1) - margins)[others].max() < 1e-12
        other = head(centre + eps)
        change = (other[:, :, None] - other[:, None]) - (head(centre)[:, :, None] - head(centre)[:, None])
        assert (change.abs() <= constants * eps + 1e-12).all()


@pytest.mark.parametrize("kind", ["sort", "negative", "tanh"])
def test_margins_hold_for_the_float32_program_too(kind: str) -> None:
    head = head_of(kind).float()
    features = random(400, 6).float()
    logits = head(features).double()
    labels = logits.argmax(1)
    unit = UNIT_ROUNDOFF[torch.float32]
    margins = head.double().margins(features.double(), features.double(), labels, unit)
    found = logits.gather(1, labels[:, None]) - logits
    others = torch.arange(4) != labels[:, None]
    assert (margins <= found)[others].all()
    assert (found - margins)[others].max() < 1e-3


def test_the_last_layer_is_elided_as_in_the_reference_vector() -> None:
    weight = torch.tensor([[0.5, -1, 0.2], [0.1, 0.4, -0.3]], dtype=torch.float64) / math.sqrt(3)
    bias = torch.tensor([0.05, -0.1], dtype=torch.float64)
    low, high = torch.tensor([[-0.2, 0.1, 0.3]]).double(), torch.tensor([[0.4, 0.5, 0.9]]).double()
    worst = worst_differences(weight, bias, low, high, torch.tensor([0]))
    assert worst[0].tolist() == pytest.approx([0, 0.21373067], abs=1e-8)


def test_training_bounds_of_the_mlp_are_those_of_the_certificate() -> None:
    head, centre = head_of("tanh"), random(3, 6)
    assert isinstance(head, TanhHead)
    labels = torch.tensor([0, 3, 1])
    worst = head.worst(centre - 0.1, centre + 0.1, labels)
    margins = head.margins(centre - 0.1, centre + 0.1, labels, None)
    torch.testing.assert_close(-worst, margins, rtol=0, atol=1e-12)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"keep must lie in \(0, 1\], got 0"):
        SortDense(3, 2, keep=0.0)
    with pytest.raises(ConfigError, match="terms must be at least 1, got 0"):
        SortDense(3, 2, terms=0)
    with pytest.raises(ValueError, match="flatten it first"):
        SortDense(3, 2)(torch.zeros(2, 1, 3))
    state = RoundingState(norm=1.0, error=0.0, unit=2.0**-53)
    for part in (SortDense(3, 2), SortHead(3, 2), TanhHead(3, 2, 4)):
        with pytest.raises(UnsoundError, match="no rounding bound in l2"):
            part.rounding(state)


def test_without_a_compiler_there_is_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sort_kernel.shutil, "which", lambda name: None)
    assert library.__wrapped__() is None
    monkeypatch.setattr(sort_kernel.shutil, "which", lambda name: "/bin/false")
    assert library.__wrapped__() is None


def test_an_identity_start_passes_inputs_on() -> None:
    layer = SortDense(4, 6, identity=10.0, spread=0.01, generator=torch.Generator().manual_seed(0)).eval()
    x = random(3, 4)
    torch.testing.assert_close(layer(x), (x + 10)[:, [0, 1, 2, 3, 0, 1]], rtol=0, atol=1e-12)


def test_tensors_without_memory_take_the_plain_path() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.randn(1, 3, 5, dtype=torch.float32), torch.randn(1, 4, 5, dtype=torch.float32)
        assert distances(x, w, 8.0).shape == (1, 3, 4)
        assert distances(x, w, math.inf).shape == (1, 3, 4)
