import copy
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lipnext import certify_module
from lipnext.auditing.lipschitz import estimate_lipschitz
from lipnext.certificates import operations
from lipnext.certificates.activations import GroupSort, MaxMin, MaxMinReLU
from lipnext.certificates.graph import trace
from lipnext.certificates.module import CertifiedModule, ModuleCertifier, budget
from lipnext.certificates.operations import ARITHMETIC, Arithmetic, State
from lipnext.core.errors import ConfigError, DataError, UnsoundError

SHAPE = (2, 4, 4)
DTYPES = [torch.float64, torch.float32]
Forward = Callable[[nn.Module, Tensor], Tensor]


class Free(nn.Module):
    """A network whose forward is given as a function of the parts."""

    def __init__(self, forward: Forward, **parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Sum(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module, sign: int) -> None:
        super().__init__()
        self.left, self.right, self.sign = left, right, sign

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x) if self.sign > 0 else self.left(x) - self.right(x)


class Join(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Normaliser(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(channels))
        self.register_buffer("std", 0.2 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)


def conv(before: int, after: int, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, **settings)  # type: ignore[arg-type]


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.1, 2)  # type: ignore[union-attr]
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


# Each keeps (4, 4, 4) where linear pieces may follow each other in any order.
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "zeros": lambda: conv(4, 4),
    "circular": lambda: conv(4, 4, padding_mode="circular", groups=2),
    "pointwise": lambda: nn.Conv2d(4, 4, 1, bias=False),
    "batch norm": lambda: batch_norm(4),
    "sum": lambda: Sum(nn.Identity(), conv(4, 4), 1),
    "difference": lambda: Sum(conv(4, 4), nn.Conv2d(4, 4, 1), -1),
    "join": lambda: Join(conv(4, 2), nn.Conv2d(4, 2, 1)),
    "overlapping average": lambda: nn.AvgPool2d(3, 1, 1),
}
CURVED: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(-1.5),
    "max min": MaxMin,
    "group sort": lambda: GroupSort(2),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "overlapping max": lambda: nn.MaxPool2d(3, 1, 1),
    "residual relu": lambda: Sum(nn.Identity(), nn.Sequential(conv(4, 4), nn.ReLU(inplace=True)), 1),
    "dropout": lambda: nn.Dropout(0.5),
}
ENDS: dict[str, Callable[[], list[nn.Module]]] = {
    "flatten": lambda: [nn.Flatten(), nn.Linear(64, 3)],
    "average": lambda: [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)],
    "global": lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)],
    "unshuffle": lambda: [nn.PixelUnshuffle(2), nn.Flatten(), nn.Linear(64, 3, bias=False)],
}
CURVED_ENDS = {
    "l2": lambda: [nn.LPPool2d(2, 2), nn.Flatten(), nn.Linear(16, 3)],
    "max": lambda: [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.LeakyReLU()],
}


def network(names: Sequence[str], end: str, seed: int) -> nn.Module:
    blocks, ends = BLOCKS | CURVED, ENDS | CURVED_ENDS
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = [Normaliser(2), conv(2, 4), *(blocks[name]() for name in names), *ends[end]()]
    return nn.Sequential(*parts).float().eval()


def batch(n: int = 4, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)).float()


def dense(*sizes: int, seed: int = 0, gain: float = 1.0) -> nn.Sequential:
    """Plain ReLU layers with biases, activations of normal size (He et al. 2015), on images of one row."""
    g = torch.Generator().manual_seed(seed)
    parts: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layer = nn.Linear(before, after)
        with torch.no_grad():
            layer.weight.copy_(gain * math.sqrt(2 / before) * torch.randn(after, before, generator=g))
            layer.bias.copy_(0.1 * torch.randn(after, generator=g))
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).float().eval()


def final(net: nn.Module, images: Tensor, dtype: torch.dtype) -> State:
    """The state of the logits."""
    certifier = ModuleCertifier(net, tuple(images.shape[1:]), semantics="deployed", dtype=dtype)  # type: ignore[arg-type]
    return certifier._follow(images.double())[len(certifier.graph.places)]


def sphere(images: Tensor, radius: Tensor, seed: int) -> Tensor:
    """Points at the given distances, not clipped: the bound holds for any of them."""
    g = torch.Generator().manual_seed(seed)
    step = torch.randn(images.shape, generator=g, dtype=torch.float64)
    unit = step / step.flatten(1).norm(dim=1)[:, None, None, None]
    return images.double() + radius[:, None, None, None] * unit


# --- the Lipschitz constant


@settings(deadline=None, max_examples=12)
@given(
    names=st.lists(st.sampled_from(list(BLOCKS)), max_size=2),
    end=st.sampled_from(list(ENDS)),
    seed=st.integers(0, 999),
)
def test_the_constant_of_a_linear_network_is_not_below_its_norm(
    names: list[str], end: str, seed: int
) -> None:
    net = network(names, end, seed).double()
    place = trace(net, SHAPE).places[-1]
    x = torch.zeros(1, *SHAPE, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(net, x).reshape(3, -1)
    # The singular values are off by about 1e-15 of the largest one, in either direction.
    exact = torch.linalg.matrix_norm(matrix, 2).item() * (1 - 1e-13)
    assert place.lipschitz is not None
    assert place.lipschitz.value >= exact


def test_the_constant_of_branches_is_attained() -> None:
    """The same branch twice: a sum doubles, a concatenation gains sqrt(2), a difference of opposites doubles."""
    one = nn.Linear(4, 4, bias=False)
    nn.init.eye_(one.weight)
    for forward, factor in (
        (lambda m, x: m.one(x) + m.one(x), 2.0),
        (lambda m, x: torch.cat([m.one(x), m.one(x)], 1), math.sqrt(2)),
        (lambda m, x: m.one(x) - (-m.one(x)), 2.0),
        (lambda m, x: 3 * m.one(x), 3.0),
        (lambda m, x: 1 - m.one(x) / 0.25, 4.0),
    ):
        flat = Free(lambda m, x, f=forward: f(m, x.flatten(1)), one=one).eval()  # type: ignore[misc]
        bound = trace(flat, (1, 1, 4)).places[-1].lipschitz
        assert bound is not None
        assert factor <= bound.value <= factor * (1 + 1e-6)


@settings(deadline=None, max_examples=10)
@given(
    names=st.lists(st.sampled_from(list(BLOCKS | CURVED)), min_size=1, max_size=3),
    end=st.sampled_from(list(ENDS | CURVED_ENDS)),
    seed=st.integers(0, 999),
)
def test_no_pair_of_images_is_driven_apart_further(names: list[str], end: str, seed: int) -> None:
    net = network(names, end, seed).double()
    bound = trace(net, SHAPE).places[-1].lipschitz
    found = estimate_lipschitz(net, batch(2, seed).double(), steps=8)
    assert bound is not None
    assert found.value <= bound.value * (1 + 1e-9)


# --- rounding


@settings(deadline=None, max_examples=15)
@given(
    names=st.lists(st.sampled_from(list(BLOCKS | CURVED)), min_size=1, max_size=3),
    end=st.sampled_from(list(ENDS | CURVED_ENDS)),
    seed=st.integers(0, 999),
)
def test_the_float32_program_stays_within_its_error(names: list[str], end: str, seed: int) -> None:
    net = network(names, end, seed)
    images = batch(3, seed)
    state = final(net, images, torch.float32)
    for reach in (0.0, 0.1, 3.0):
        radius = torch.full((3,), reach, dtype=torch.float64)
        points = sphere(images, radius, seed).float()
        away = (points.double() - images).flatten(1).norm(dim=1)
        with torch.no_grad():
            executed = net(points).double()
            exact = copy.deepcopy(net).double()(points.double())  # off by 1e-9 of the float32 error
        error = (executed - exact).norm(dim=1)
        assert (error <= (state.fixed + state.slope * away) * (1 + 1e-6)).all()
    assert state.fixed.max() < 1e-3  # and it says something


def test_a_unit_roundoff_that_is_too_small_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails for gamma of the wrong dtype, and so does the module's own comparison."""
    wrong = Arithmetic(2.0**-53, 2.0**-1074, torch.finfo(torch.float32).max, 2.0**-126)
    monkeypatch.setitem(ARITHMETIC, torch.float32, wrong)
    with pytest.raises(UnsoundError, match=r"give different logits in torch\.float32"):
        final(network(["zeros", "relu"], "flatten", 0), batch(), torch.float32)


def _exact(net: nn.Sequential, image: Tensor) -> list[Fraction]:
    """A dense ReLU network in rational numbers."""
    x = [Fraction(v) for v in image.double().flatten().tolist()]
    for layer in net:
        if isinstance(layer, nn.Linear):
            rows = zip(layer.weight.double().tolist(), layer.bias.double().tolist(), strict=True)
            x = [sum((Fraction(w) * v for w, v in zip(row, x, strict=True)), Fraction(b)) for row, b in rows]
        elif isinstance(layer, nn.ReLU):
            x = [max(v, Fraction(0)) for v in x]
    return x


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES))
def test_errors_against_rational_arithmetic(seed: int, dtype: torch.dtype) -> None:
    net = dense(5, 7, 6, 3, seed=seed)
    images = batch(2, seed, (1, 1, 5))
    state = final(net, images, dtype)
    with torch.no_grad():
        executed = copy.deepcopy(net).to(dtype)(images.to(dtype)).double()
    for k, image in enumerate(images):
        exact = _exact(net, image)
        for values, bound in ((state.value[k], state.centre[k]), (executed[k], state.fixed[k])):
            parts = [Fraction(v) - e for v, e in zip(values.tolist(), exact, strict=True)]
            assert sum(p * p for p in parts) <= Fraction(bound.item()) ** 2


def test_underflow_counts() -> None:
    """In float16 products of small numbers vanish: the relative error alone would not allow for it."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).float().eval()
    nn.init.constant_(net[1].weight, 2.0**-14)  # type: ignore[arg-type]
    images = torch.full((1, 1, 1, 4), 2.0**-14).float()
    state = final(net, images, torch.float16)
    with torch.no_grad():
        executed = copy.deepcopy(net).half()(images.half()).double()
    error = (executed - 4 * 2.0**-28).norm()
    relative = operations.gamma(5, 2.0**-11) * math.sqrt(2) * 4 * 2.0**-28
    assert relative < error <= state.fixed[0]


def test_overflow_leaves_no_radius() -> None:
    """Fine in real arithmetic and in float32; in float16 the first layer leaves the range."""
    net = dense(4, 4, 3)
    with torch.no_grad():
        net[1].weight.fill_(30000.0)  # type: ignore[union-attr,operator]
        net[1].bias.zero_()  # type: ignore[union-attr,operator]
        net[3].weight.copy_(2.0**-14 * torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))  # type: ignore[union-attr,operator]
        net[3].bias.zero_()  # type: ignore[union-attr,operator]
    images = torch.full((1, 1, 1, 4), 0.875).float()
    assert certify_module(net, (1, 1, 4), 3).certify(images).radius > 0
    assert _deployed(net, images, torch.float32).certify(images).radius > 0
    state = operations.start(images.double(), torch.float16)
    for place in trace(net, (1, 1, 4)).places:
        assert place.operation is not None
        assert place.lipschitz is not None
        state = place.operation.follow([state], place.lipschitz.value, ARITHMETIC[torch.float16])
    assert state.limit < 0


# --- radii


def _deployed(net: nn.Module, images: Tensor, dtype: torch.dtype) -> CertifiedModule:
    shape = tuple(images.shape[1:])
    classes = net(images[:1]).shape[1]
    return certify_module(net, shape, classes, semantics="deployed", dtype=dtype)  # type: ignore[arg-type]


def _two_rows() -> nn.Module:
    """Two classes on one row of pixels; the boundary is at distance |m| / ||w_0 - w_1||."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
        net[1].bias.copy_(torch.tensor([0.0, 1.0]))
    return net.eval()


@pytest.mark.parametrize(
    ("semantics", "dtype"), [("real", torch.float64), *(("deployed", d) for d in DTYPES)]
)
def test_the_radius_of_a_linear_network_is_its_distance(semantics: str, dtype: torch.dtype) -> None:
    images = torch.tensor([[[[1.0, 0.5, 0.25, 0.0]]], [[[0.0, 0.25, 1.0, 0.25]]]]).float()
    model = certify_module(_two_rows(), (1, 1, 4), 2, semantics=semantics, dtype=dtype)  # type: ignore[arg-type]
    certificate = model.certify(images)
    exact = torch.tensor([1.0, 0.25], dtype=torch.float64) / math.sqrt(6)
    assert certificate.label.tolist() == [0, 1]
    assert (certificate.radius < exact).all()
    loss = 1e-11 if dtype == torch.float64 else 1e-5
    assert (certificate.radius > exact * (1 - loss)).all()
    assert certificate.semantics == semantics
    assert certificate.arithmetic == str(dtype).removeprefix("torch.")


def test_ties_and_rivals() -> None:
    """A tie has no radius; the closest rival need not be the runner-up."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0], [0.0], [8.0]]))
        net[1].bias.copy_(torch.tensor([1.0, 0.5, -4.0]))
    model = certify_module(net.eval(), (1, 1, 1), 3)
    certificate = model.certify(torch.tensor([0.5, 0.625]).view(2, 1, 1, 1))
    assert certificate.radius[0].item() == pytest.approx(1 / 8)
    assert certificate.radius[1].item() == 0


def test_a_last_operation_that_is_no_matrix_loses_sqrt_2_only() -> None:
    net = Free(lambda m, x: 2 * m.flat(x), flat=nn.Flatten()).eval()
    certificate = certify_module(net, (1, 1, 2), 2).certify(torch.tensor([[[[0.75, 0.25]]]]))
    assert certificate.radius.item() == pytest.approx(0.5 / math.sqrt(2))
    assert certificate.radius.item() < 0.5 / math.sqrt(2)


@settings(deadline=None, max_examples=8)
@given(
    names=st.lists(st.sampled_from(list(BLOCKS | CURVED)), min_size=1, max_size=2),
    end=st.sampled_from(list(ENDS | CURVED_ENDS)),
    seed=st.integers(0, 999),
)
def test_no_point_of_a_ball_changes_the_executed_label(names: list[str], end: str, seed: int) -> None:
    net = network(names, end, seed)
    images = batch(3, seed)
    certificate = _deployed(net, images, torch.float32).certify(images)
    x = images.double().requires_grad_(True)
    logits = copy.deepcopy(net).double()(x)
    (gradient,) = torch.autograd.grad(
        logits.gather(1, certificate.label[:, None]).sum() * 2 - logits.sum(), x
    )
    unit = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
    for sign in (-0.999999, 0.999999):
        points = (images.double() + sign * certificate.radius[:, None, None, None] * unit).float()
        inside = (points.double() - images).flatten(1).norm(dim=1) <= certificate.radius
        with torch.no_grad():
            labels = net(points).argmax(1)
        assert ((labels == certificate.label) | ~inside | (certificate.radius == 0)).all()


# --- deep dense networks


@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.float32, (64, *[48] * 9, 5)), (torch.float16, (16, 12, 12, 3))]
)
def test_dense_errors_hold_anywhere_in_the_ball(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    net = dense(*sizes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.half().float())
    shape = (1, 1, sizes[0])
    images = batch(4, shape=shape).half().float()
    certifier = ModuleCertifier(net, shape, semantics="deployed", dtype=dtype)
    tail = certifier._tail
    assert tail is not None
    assert len(tail.layers) == len(sizes) - 1
    states = certifier._follow(images.double())
    label = states[len(certifier.graph.places)].value.argmax(1)
    program = copy.deepcopy(net).to(dtype)
    for reach in (1e-6, 1e-2, 0.5):
        radius = torch.full((4,), reach, dtype=torch.float64)
        bound = tail.errors(states, label, radius, ARITHMETIC[dtype])
        for seed in range(5):
            points = sphere(images, radius * 0.99, seed).to(dtype)
            inside = (points.double() - images).flatten(1).norm(dim=1) <= radius
            with torch.no_grad():
                error = program(points).double() - copy.deepcopy(net).double()(points.double())
            pair = (error.gather(1, label[:, None]) - error).abs()
            assert ((pair <= bound) | ~inside[:, None]).all()


def test_a_deep_dense_network_keeps_its_float32_radii() -> None:
    """Products of norms alone give an error far above every margin; the pattern of active units does not."""
    net, images = dense(196, *[96] * 11, 10), batch(6, shape=(1, 14, 14))
    real = certify_module(net, (1, 14, 14), 10).certify(images)
    deployed = _deployed(net, images, torch.float32).certify(images)
    kept = (deployed.radius / real.radius)[real.margin > 0.2]
    assert len(kept) > 1
    assert (kept > 0.5).all()
    assert (deployed.radius < real.radius).all()
    assert final(net, images, torch.float32).fixed.min() > real.margin.max()


def test_a_vacuous_bound_says_so_once() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).float().eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.cat([torch.ones(32), -torch.ones(32)]) + torch.zeros(2, 1))
        net[1].weight[0, 0] += 2.0**-14
        net[1].bias.zero_()
    images = torch.full((1, 1, 8, 8), 0.5).float()
    model = _deployed(net, images, torch.float32)
    with pytest.warns(UserWarning, match="no radius is proved.*deploy in torch.float64"):
        certificate = model.certify(images)
    assert certificate.radius.item() == 0
    assert model.certify(images).radius.item() == 0  # a second warning would be an error here


# --- the bounds' mutants


def test_mutants_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches by maximum, a head's sqrt(2) left out, errors of the centre alone: each breaks a test above."""
    with monkeypatch.context() as m:
        largest = lambda self, *ks: max(ks, key=lambda k: k.value)  # noqa: E731
        m.setattr(operations.Sum, "bound", largest)
        with pytest.raises(AssertionError):
            test_the_constant_of_branches_is_attained()
    with monkeypatch.context() as m:
        m.setattr("lipnext.certificates.module.sqrt_up", lambda x: 1.0)
        with pytest.raises(AssertionError):
            test_a_last_operation_that_is_no_matrix_loses_sqrt_2_only()
    with monkeypatch.context() as m:
        m.setattr(operations, "gamma", lambda n, u: 0.0)
        with pytest.raises((AssertionError, UnsoundError)):
            final(network(["zeros", "relu"], "flatten", 0), batch(), torch.float32)


# --- refusals


def _view_of_the_batch(m: nn.Module, x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def _in_place_through_a_view(m: nn.Module, x: Tensor) -> Tensor:
    y = m.head(x.flatten(1))  # type: ignore[operator]
    z = y.view(-1, 3)
    return z + functional.relu(y, inplace=True)


REFUSED: dict[str, tuple[Forward, str]] = {
    "softmax": (
        lambda m, x: m.head(x.flatten(1)).softmax(1),
        "forward: softmax: softmax has no proved bound",
    ),
    "product": (lambda m, x: m.head(x.flatten(1)) * m.head(x.flatten(1)), "product of two activations"),
    "quotient": (lambda m, x: 1 / m.head(x.flatten(1)), "division by an activation"),
    "batch": (_view_of_the_batch, "transpose"),
    "joined images": (lambda m, x: torch.cat([m.head(x.flatten(1))] * 2), "dimension 0"),
    "noise": (
        lambda m, x: functional.dropout(m.head(x.flatten(1)), 0.5),
        "dropout with training=True is random",
    ),
    "in place": (_in_place_through_a_view, "it overwrites its input"),
    "image in place": (
        lambda m, x: m.head(functional.relu(x, inplace=True).flatten(1)),
        "overwrites its input",
    ),
    "constant": (
        lambda m, x: m.head(x.flatten(1)) * m.head.weight.exp()[:, 0],
        "store the result as a buffer",
    ),
    "zero": (lambda m, x: m.head(x.flatten(1)) / 0, "divides by zero"),
    "control flow": (lambda m, x: m.head(x.flatten(1)) if x.sum() > 0 else x, "torch.fx cannot trace"),
    "broadcast": (
        lambda m, x: m.head(x.flatten(1)) + m.head(x.flatten(1))[:, :1],
        "getitem has no proved bound",
    ),
    "two results": (lambda m, x: (m.head(x.flatten(1)), x), "must return one tensor of logits"),
    "no image": (lambda m, x: m.head.weight, "must return one tensor of logits"),
    "shape": (lambda m, x: m.head(x), "does not run on images"),
    "no logits": (lambda m, x: x * 2, "must return logits"),
    "keyword": (
        lambda m, x: torch.add(m.head(x.flatten(1)), 1, alpha=2),
        "called in a way that is not understood",
    ),
    "batch size": (lambda m, x: m.head(x.flatten(1)) * x.shape[0], "computes with the size of the batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    forward, words = REFUSED[name]
    net = Free(forward, head=nn.Linear(32, 3)).eval()
    with pytest.raises(UnsoundError, match=words) as caught:
        certify_module(net, SHAPE, 3)
    assert "\n" not in str(caught.value)


def test_refused_modules_name_their_path() -> None:
    for layer, words in (
        (nn.GELU(), r"cannot certify 1\.0: GELU has no proved bound"),
        (nn.BatchNorm1d(3, track_running_stats=False), r"cannot certify 1\.0: batch norm without stored"),
        (nn.Softmax(1), r"cannot certify 1\.0: Softmax"),
        (nn.LeakyReLU(math.nan), "slope nan"),
    ):
        net = nn.Sequential(nn.Flatten(), nn.Sequential(layer)).eval()
        with pytest.raises(UnsoundError, match=words):
            certify_module(net, (1, 1, 3), 3)
    conv_net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten()).eval()
    with pytest.raises(UnsoundError, match="padding_mode"):
        certify_module(conv_net, SHAPE, 48)


def test_work_in_place_that_tracing_hides_is_refused() -> None:
    """`x += 1` on a symbolic value is traced as a sum; the program also changes the view."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.head(x.flatten(1))  # type: ignore[operator]
        z = y.view(-1, 3)
        y += 1
        return y + z

    with pytest.raises(UnsoundError, match="give different logits"):
        certify_module(Free(forward, head=nn.Linear(32, 3)).eval(), SHAPE, 3)


def test_autocast_inside_of_forward_is_refused() -> None:
    """Tracing does not see it, float64 is not touched by it, and the float32 bound alone could be too wide to tell."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.head(x.flatten(1))  # type: ignore[operator]

    net = Free(forward, head=nn.Linear(32, 3)).float().eval()
    with pytest.raises(UnsoundError, match=r"computes in torch\.bfloat16 where torch\.float32 is certified"):
        certify_module(net, SHAPE, 3, semantics="deployed", dtype=torch.float32)


def test_what_must_hold_before() -> None:
    net = network(["relu"], "flatten", 0)
    for change, words in (
        (lambda n: n.train(), "train mode"),
        (lambda n: n[1].weight.data.fill_(math.nan), "NaN"),
        (lambda n: nn.utils.parametrizations.spectral_norm(n[-1]).eval(), "parametrised"),
        (lambda n: n.half(), "float16"),
    ):
        other = copy.deepcopy(net)
        change(other)
        with pytest.raises(UnsoundError, match=words):
            certify_module(other, SHAPE, 3)
    rounded = copy.deepcopy(net).double()
    rounded[1].weight.data += 1e-12  # type: ignore[union-attr,operator]
    with pytest.raises(UnsoundError, match=r"cannot certify 1 in torch.float32: its weight is not exact"):
        certify_module(rounded, SHAPE, 3, semantics="deployed", dtype=torch.float32)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)).eval()
    nn.init.zeros_(wide[1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(wide[1].bias)  # type: ignore[arg-type]
    with pytest.raises(UnsoundError, match=r"n u = 1.* use float64"):
        certify_module(wide, (3, 32, 32), 2, semantics="deployed", dtype=torch.float16)
    for settings_, words in (
        ({"semantics": "exact"}, "semantics must be"),
        ({"dtype": torch.float32}, "real arithmetic has no dtype"),
        ({"semantics": "deployed", "dtype": torch.bfloat16}, "dtype must be"),
    ):
        with pytest.raises(ConfigError, match=words):
            certify_module(net, SHAPE, 3, **settings_)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="gives 3 logits"):
        certify_module(net, SHAPE, 4)


def test_images_and_batches() -> None:
    model = certify_module(network(["relu"], "l2", 1), SHAPE, ("a", "b", "c"))
    images = batch(5)
    whole, parts = model.certify(images), model.certify(images, batch_size=2)
    # Sums may run in another order in another batch size.
    torch.testing.assert_close(whole.radius, parts.radius, rtol=1e-9, atol=0)
    assert len(model.certify(images[:0])) == 0
    assert "float error" in budget(whole, 0)
    for bad, words in ((images * 2, r"\[0, 1\]"), (images[0], "batch"), (images[..., :2], "shape")):
        with pytest.raises(DataError, match=words):
            model.certify(bad)
    with pytest.raises(ConfigError, match="batch_size"):
        model.certify(images, batch_size=0)


def test_the_network_is_copied() -> None:
    net = network(["relu"], "flatten", 2)
    model = certify_module(net, SHAPE, 3)
    before = model.certify(batch()).radius
    with torch.no_grad():
        net[1].weight.mul_(100)  # type: ignore[union-attr,operator]
    assert torch.equal(model.certify(batch()).radius, before)


def test_max_min_relu_and_functions_are_understood() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = functional.avg_pool2d(m.split(x), 2)  # type: ignore[operator]
        x = functional.max_pool2d(torch.abs(x), 2)
        x = torch.tanh(x).reshape(x.shape[0], -1)
        return functional.linear(torch.sigmoid(x), m.head.weight, m.head.bias).contiguous()  # type: ignore[union-attr,arg-type]

    net = Free(forward, split=MaxMinReLU(), head=nn.Linear(4, 3)).eval()
    assert (certify_module(net, SHAPE, 3).certify(batch()).radius > 0).any()
