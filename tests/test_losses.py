import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lipnext.core.errors import ConfigError
from lipnext.losses import cross_entropy, emma, margins


def _data(
    batch: int = 6, classes: int = 4, seed: int = 0, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and the distances of random unit rows."""
    g = torch.Generator().manual_seed(seed)
    rows = functional.normalize(torch.randn(classes, 5, generator=g), dim=1)
    distances = torch.stack([(rows - row).norm(dim=1) for row in rows])
    labels = torch.randint(classes, (batch,), generator=g)
    return scale * torch.randn(batch, classes, generator=g), labels, distances


def _slow_cross_entropy(logits, labels, temperature, offset, annealing, smoothing) -> float:
    total = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        z = [(v - offset * (k == y)) / temperature for k, v in enumerate(z)]
        log_p = [v - math.log(sum(math.exp(w) for w in z)) for v in z]
        target = [(1 - smoothing) * (k == y) + smoothing / len(z) for k in range(len(z))]
        plain = -sum(t * lp for t, lp in zip(target, log_p, strict=True))
        total += temperature * (1 - math.exp(log_p[y])) ** annealing * plain
    return total / len(labels)


@given(
    seed=st.integers(0, 999),
    temperature=st.floats(0.05, 4),
    offset=st.floats(0, 3),
    extra=st.sampled_from([(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (5.0, 0.0), (0.0, 0.1)]),
)
@settings(max_examples=60, deadline=None)
def test_cross_entropy_is_the_formula(seed, temperature, offset, extra):
    annealing, smoothing = extra
    logits, labels, _ = _data(seed=seed)
    value = cross_entropy(
        logits, labels, temperature=temperature, offset=offset, annealing=annealing, smoothing=smoothing
    )
    slow = _slow_cross_entropy(logits, labels, temperature, offset, annealing, smoothing)
    # the slow 1 - exp(log p) cancels where p is near 1: 1e-16 to the power of 1/2
    assert value.item() == pytest.approx(slow, rel=1e-9, abs=1e-7)


def test_without_options_it_is_the_library_one():
    logits, labels, _ = _data()
    assert torch.equal(cross_entropy(logits, labels), functional.cross_entropy(logits, labels))
    assert torch.equal(cross_entropy(logits, labels, annealing=0.0), functional.cross_entropy(logits, labels))


def test_annealing_fades_out_what_is_right_and_keeps_what_is_wrong():
    labels = torch.tensor([0])
    right, wrong = torch.tensor([[6.0, 0.0]]), torch.tensor([[-6.0, 0.0]])
    assert cross_entropy(right, labels, annealing=5.0) < 1e-6 * cross_entropy(right, labels)
    assert cross_entropy(wrong, labels, annealing=5.0) > 0.98 * cross_entropy(wrong, labels)


def test_the_size_of_gradients_does_not_follow_the_temperature():
    logits, labels, _ = _data()
    norms = []
    for temperature in (0.1, 1.0):
        leaf = torch.zeros_like(logits).requires_grad_()
        cross_entropy(leaf, labels, temperature=temperature).backward()
        norms.append(leaf.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("annealing", [0.5, 1.0, 5.0])
def test_saturated_probabilities_have_finite_gradients(annealing, dtype):
    """`p = 1` and `p = 0` to the last bit: the slope of `(1 - p)^0.5` must not meet `log p = 0`."""
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4], [40.0, 0.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(4, dtype=torch.int64), temperature=0.1, annealing=annealing)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1, 0] == pytest.approx(-0.25)


def test_smoothing_with_annealing_is_refused():
    logits, labels, _ = _data()
    with pytest.raises(
        ConfigError, match=r"smoothing \(0\.1\) and annealing \(5\) cannot be combined; set one"
    ):
        cross_entropy(logits, labels, annealing=5.0, smoothing=0.1)


def _slow_emma(logits: Tensor, labels: Tensor, distances: Tensor, radius: float) -> Tensor:
    result = torch.zeros_like(logits)
    for b, y in enumerate(labels.tolist()):
        for i in range(logits.shape[1]):
            if i == y:
                continue
            u = (logits[b, i] - logits[b, y]).item()
            reach = radius * distances[y, i].item()
            share = min(max(-u / max(reach, 1e-8), 0.01), 1.0)
            result[b, i] = u + share * reach
    return result


@given(seed=st.integers(0, 999), radius=st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_emma_is_the_formula(seed, radius):
    logits, labels, distances = _data(seed=seed, scale=0.5)
    shifted = emma(logits, labels, distances, radius)
    assert torch.allclose(shifted, _slow_emma(logits, labels, distances, radius), rtol=0, atol=1e-13)


@given(seed=st.integers(0, 999), radius=st.floats(0.01, 3))
@settings(max_examples=40, deadline=None)
def test_emma_shares_lie_between_a_hundredth_and_one(seed, radius):
    logits, labels, distances = _data(seed=seed, scale=0.5)
    shifted = emma(logits, labels, distances, radius)
    rival = ~functional.one_hot(labels, 4).bool()
    u = logits - logits.gather(1, labels[:, None])
    share = ((shifted - u) / (radius * distances[labels]))[rival]
    assert share.min() >= 0.01 - 1e-9
    assert share.max() <= 1 + 1e-9
    assert torch.equal(shifted[~rival], torch.zeros(len(labels)))
    # a rival that the radius cannot bring to the boundary gets the full shift, one behind it lands on it
    for b in range(len(labels)):
        for i in range(4):
            reach = radius * distances[labels[b], i]
            if -u[b, i] >= reach > 0:
                assert shifted[b, i].item() == pytest.approx((u[b, i] + reach).item(), abs=1e-12)
            elif 0.01 * reach < -u[b, i]:
                assert shifted[b, i].item() == pytest.approx(0.0, abs=1e-12)


def test_emma_at_radius_zero_is_plain_differences():
    logits, labels, distances = _data()
    shifted = emma(logits, labels, distances, 0.0)
    assert torch.equal(shifted, logits - logits.gather(1, labels[:, None]))
    assert cross_entropy(shifted, labels).item() == pytest.approx(
        cross_entropy(logits, labels).item(), rel=1e-14
    )


def test_emma_differentiates_logits_and_distances_but_not_the_share():
    logits, labels, distances = _data(scale=0.3)
    logits.requires_grad_()
    distances.requires_grad_()
    radius = 0.4
    weight = torch.randn(6, 4)
    (emma(logits, labels, distances, radius) * weight).sum().backward()
    expected_logits, expected_distances = torch.zeros(6, 4), torch.zeros(4, 4)
    shifted = _slow_emma(logits.detach(), labels, distances.detach(), radius)
    for b, y in enumerate(labels.tolist()):
        for i in range(4):
            if i == y:
                continue
            expected_logits[b, i] += weight[b, i]
            expected_logits[b, y] -= weight[b, i]
            u = (logits[b, i] - logits[b, y]).item()
            share = (shifted[b, i].item() - u) / (radius * distances[y, i].item())
            expected_distances[y, i] += weight[b, i] * share * radius
    assert torch.allclose(logits.grad, expected_logits, rtol=0, atol=1e-12)
    assert torch.allclose(distances.grad, expected_distances, rtol=0, atol=1e-12)
    assert distances.grad.abs().max() > 0


def test_emma_with_coinciding_rows_is_finite():
    logits, labels, distances = _data()
    distances = torch.full_like(distances, 1e-6).requires_grad_()
    cross_entropy(emma(logits, labels, distances, 0.0), labels).backward()
    cross_entropy(emma(logits, labels, distances, 0.5), labels).backward()
    assert torch.isfinite(distances.grad).all()


def test_margins():
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, 1.0], [2.0, 2.0, 0.0]])
    assert torch.equal(margins(logits, torch.tensor([0, 2, 1])), torch.tensor([0.5, -3.0, 0.0]))
    z, y, _ = _data(batch=20)
    for b, k in enumerate(y.tolist()):
        rivals = [z[b, j].item() for j in range(4) if j != k]
        assert margins(z, y)[b].item() == z[b, k].item() - max(rivals)
