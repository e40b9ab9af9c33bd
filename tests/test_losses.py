import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lipnext import losses
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


@given(
    seed=st.integers(0, 999),
    temperature=st.floats(0.2, 4),
    offset=st.floats(0, 3),
    power=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
)
@settings(max_examples=60, deadline=None)
def test_a_power_has_the_gradient_of_its_term(seed, temperature, offset, power):
    logits, labels, _ = _data(seed=seed)
    leaf = logits.double().clone().requires_grad_()
    p = torch.softmax((leaf - offset * functional.one_hot(labels, 4)) / temperature, 1)
    p = p.gather(1, labels[:, None]).squeeze(1)
    (wanted,) = torch.autograd.grad(temperature * ((1 - p) ** power / power).mean(), leaf)
    loss = cross_entropy(leaf, labels, temperature=temperature, offset=offset, power=power)
    (found,) = torch.autograd.grad(loss, leaf)
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    largest = (grid * (1 - grid) ** (power - 1)).max()  # a grid that fine misses a maximum by 1e-9
    torch.testing.assert_close(found * largest, wanted, rtol=1e-7, atol=1e-9)


def test_the_terms_add_up_to_cross_entropy():
    """`-log p = sum (1 - p)^k / k`: 2,000 gradients, of which the next is below `0.99^2000` where p is above 0.01."""
    logits, labels, _ = _data(scale=1.0)
    leaf = logits.double().clone().requires_grad_()
    assert torch.softmax(leaf / 0.5, 1).gather(1, labels[:, None]).min() > 0.01
    total = torch.zeros_like(leaf)
    for k in range(1, 2001):
        loss = cross_entropy(leaf, labels, temperature=0.5, power=k)
        total += torch.autograd.grad(loss, leaf)[0] * math.exp(
            (k - 1) * math.log(max(k - 1, 1)) - k * math.log(k)
        )
    (wanted,) = torch.autograd.grad(cross_entropy(leaf, labels, temperature=0.5), leaf)
    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_a_power_takes_over_by_its_share(power):
    """The weights of the samples lie between 1 and those of the term, geometrically."""
    logits, labels, _ = _data()
    pulls = []
    for share in (0.0, 0.5, 1.0):
        leaf = logits.double().clone().requires_grad_()
        cross_entropy(leaf, labels, power=power, share=share).backward()
        pulls.append(leaf.grad.norm(dim=1))
    torch.testing.assert_close(pulls[1] ** 2, pulls[0] * pulls[2], rtol=1e-10, atol=0)
    assert (pulls[2] <= pulls[0] * (1 + 1e-12)).all()


@pytest.mark.parametrize("power", [0.5, 0.99])
def test_a_power_below_one_is_refused(power):
    logits, labels, _ = _data()
    with pytest.raises(ConfigError, match="must be 0 or at least 1, got"):
        cross_entropy(logits, labels, power=power)


def test_what_is_hopeless_pulls_at_a_power_as_little_as_what_is_safe():
    labels = torch.tensor([0, 0, 0])
    logits = torch.tensor([[-8.0, 0.0], [0.5, 0.0], [8.0, 0.0]], requires_grad=True)
    cross_entropy(logits, labels, power=2.0).backward()
    pull = logits.grad.norm(dim=1)
    assert pull[0] < 0.01 * pull[1]
    assert pull[2] < 0.01 * pull[1]


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_saturated_probabilities_have_finite_gradients_with_a_power(power):
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4], [40.0, 0.0], [0.0, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(4, dtype=torch.int64), temperature=0.1, power=power, share=0.5)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("other", ["annealing", "smoothing"])
def test_a_power_with_annealing_or_smoothing_is_refused(other):
    logits, labels, _ = _data()
    with pytest.raises(ConfigError, match=r"loss: power \(2\) cannot be combined"):
        cross_entropy(logits, labels, power=2.0, share=0.0, **{other: 0.1})


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


# The worked vector of the calibrated loss: three classes in the plane, K_g = 3, eps = 0.15, p = 0.3.
CLL_ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]], dtype=torch.float64)
CLL_LOGITS = torch.tensor([[1.2, 0.5, -0.3], [0.4, 0.5, 0.0]], dtype=torch.float64)
CLL_LABELS = torch.tensor([0, 0])


def cll_distances() -> torch.Tensor:
    return 3 * torch.cdist(CLL_ROWS, CLL_ROWS)


@pytest.mark.parametrize(
    ("two_sided", "wanted"), [(True, [1.95048724, 4.03838254]), (False, [0.72488348, 2.38282783])]
)
def test_the_calibrated_loss_matches_its_vector(two_sided: bool, wanted: list[float]) -> None:
    seen = [
        losses.cll(
            CLL_LOGITS[i : i + 1], CLL_LABELS[:1], cll_distances(), 0.15, slack=0.3, two_sided=two_sided
        ).item()
        for i in range(2)
    ]
    assert seen == pytest.approx(wanted, abs=1e-7)
    total = losses.cll(
        CLL_LOGITS, CLL_LABELS, cll_distances(), 0.15, slack=0.3, penalty=1e-4, two_sided=two_sided
    )
    assert total.item() == pytest.approx(sum(wanted) / 2 + 1e-4 * 5.69209979**2, abs=1e-7)


@pytest.mark.parametrize(
    ("eps", "p", "sigma"),
    [
        (0.15, 0.3, 0.08647522),
        (0.25, 0.05, 0.06823961),
        (0.25, 0.1, 0.08490582),
        (0.5, 0.01, 0.09445895),
        (1, 0.025, 0.22886187),
        (1, 0.003, 0.15382748),
        (1, 0.001, 0.13157198),
        (0.15, 0.1, 0.05094349),
    ],
)
def test_the_calibrated_width_is_the_published_one(eps: float, p: float, sigma: float) -> None:
    # On the boundary (all signed distances 0) rival and label are 2 eps / sigma apart.
    logits, labels, distances = torch.zeros(1, 2), torch.tensor([0]), torch.ones(2, 2)
    seen = losses.cll(logits.double(), labels, distances.double(), eps, slack=p).item()
    assert seen == pytest.approx(math.log1p(math.exp(2 * eps / sigma)), rel=1e-6)


def test_only_the_penalty_makes_the_calibrated_loss_shrink_the_constant() -> None:
    constant = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = losses.cll(CLL_LOGITS, CLL_LABELS, constant * torch.cdist(CLL_ROWS, CLL_ROWS), 0.15, slack=0.3)
    assert not loss.requires_grad
    penalised = losses.cll(
        CLL_LOGITS, CLL_LABELS, constant * torch.cdist(CLL_ROWS, CLL_ROWS), 0.15, slack=0.3, penalty=0.5
    )
    (slope,) = torch.autograd.grad(penalised, constant)
    assert slope.item() == pytest.approx(3.0 * 1.8973666**2, rel=1e-6)


def test_the_calibrated_loss_does_not_see_a_common_scale_of_logits_and_constant() -> None:
    one = losses.cll(CLL_LOGITS, CLL_LABELS, cll_distances(), 0.15, slack=0.3)
    other = losses.cll(7 * CLL_LOGITS, CLL_LABELS, 7 * cll_distances(), 0.15, slack=0.3)
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


@pytest.mark.parametrize(("radius", "slack"), [(0.0, 0.3), (0.1, 0.0), (0.1, 1.0)])
def test_a_calibrated_loss_without_width_is_refused(radius: float, slack: float) -> None:
    with pytest.raises(ConfigError, match=r"cll needs a radius above 0 and a slack in \(0, 1\), got"):
        losses.cll(CLL_LOGITS, CLL_LABELS, cll_distances(), radius, slack=slack)
