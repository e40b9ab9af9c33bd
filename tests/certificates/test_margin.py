import copy
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import Flatten, fractions, rotations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.bounds.spectral import estimate_spectral_norm
from lipnext.certificates import margin
from lipnext.certificates.margin import MarginCertifier, head_distances
from lipnext.core.bound import Estimate, LipschitzBound
from lipnext.core.certificate import Certificate
from lipnext.core.errors import DataError, UnsoundError
from lipnext.core.files import sha256_tensors
from lipnext.core.module import LipschitzModule
from lipnext.core.network import LipschitzNetwork
from lipnext.core.propagation import after_product
from lipnext.core.rounding import RoundingState
from lipnext.nn import mixing
from lipnext.nn.block import ShiftBlock
from lipnext.nn.head import UnitRowHead
from lipnext.nn.pool import SpaceToDepth
from lipnext.nn.position import Centre
from lipnext.systems.lipnext import build


class Double(LipschitzModule):
    """`2 x`."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def lipschitz_bound(self) -> LipschitzBound:
        return LipschitzBound(value=2.0, norm=2.0, proof="scaling")

    def rounding(self, state: RoundingState) -> RoundingState:
        return after_product(state, 1, 2.0, 2.0)


def _stored(rows: Tensor, bias: Tensor) -> UnitRowHead:
    """A head that applies exactly these rows."""
    head = UnitRowHead(rows.shape[1], len(rows)).materialise().to(rows.dtype)
    with torch.no_grad():
        head.weight.copy_(rows)
        head.bias.copy_(bias)
    return head


def _linear(rows: Tensor, bias: Tensor, *before: LipschitzModule) -> LipschitzNetwork:
    """The identity (or `before`) and a linear head, on images of one row of pixels."""
    return LipschitzNetwork([*before, Flatten()], _stored(rows, bias), (1, 1, rows.shape[1]))


def _net(dtype: torch.dtype = torch.float32, seed: int = 0, encoding: str = "position") -> LipschitzNetwork:
    """A small LipNeXt with every weight away from its start."""
    net = build(
        input_shape=(1, 4, 4), classes=4, width=8, depth=2, patch=2, shift=0.125, encoding=encoding, seed=seed
    ).to(dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for k, block in enumerate(net.body[2:4]):
            block.mixing.copy_(rotations(n=8, seed=10 * seed + k))
            block.position.copy_(0.3 * torch.randn(block.position.shape, generator=g))
            block.bias.copy_(0.3 * torch.randn(8, generator=g))
        net.head.bias.copy_(0.1 * torch.randn(4, generator=g))
    return net


def _images(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check_against_exact(
    radius: float, logits: list[Fraction], rows: list[list[Fraction]], label: int
) -> None:
    """`radius <= (f_y - f_j) / ||w_y - w_j||` for all j, exactly, and no more than 1e-9 below the least."""
    squares = []
    for j, value in enumerate(logits):
        if j == label:
            continue
        gap = logits[label] - value
        distance = sum(((a - b) ** 2 for a, b in zip(rows[label], rows[j], strict=True)), Fraction(0))
        if gap <= 0:
            assert radius == 0
            return
        assert Fraction(radius) ** 2 * distance <= gap**2
        if distance:
            squares.append(gap**2 / distance)
    exact = math.sqrt(min(squares))
    # the slack is about 1e-15 of the logits, and the smallest distance drawn about 1e-3
    assert radius >= exact * (1 - 1e-9) - 1e-9


grid = st.integers(-64, 64).map(lambda k: k / 32)


@st.composite
def linear_problems(draw):
    classes, pixels = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    rows = [[draw(grid) for _ in range(pixels)] for _ in range(classes)]
    bias = [draw(grid) for _ in range(classes)]
    image = [draw(st.floats(0, 1)) for _ in range(pixels)]
    return torch.tensor(rows), torch.tensor(bias), torch.tensor(image)


@given(linear_problems())
@settings(max_examples=80, deadline=None)
def test_a_linear_network_against_exact_arithmetic(problem):
    rows, bias, image = problem
    cert = MarginCertifier(_linear(rows, bias))(image.view(1, 1, 1, -1))
    w, (x,) = fractions(rows), fractions(image[None])
    logits = [
        sum((a * b for a, b in zip(row, x, strict=True)), Fraction(c))
        for row, c in zip(w, bias.tolist(), strict=True)
    ]
    label = int(cert.label)
    # the true label may differ only where the margin is lost in rounding, and then nothing is certified
    if logits[label] == max(logits) and logits.count(max(logits)) == 1:
        coincide = all(w[j] == w[label] for j in range(len(w)))
        if not coincide:
            _check_against_exact(cert.radius.item(), logits, w, label)
    else:
        assert cert.radius.item() == 0.0


SIGNS = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


def test_margins_that_cancel_are_certified_by_their_exact_value():
    """Logits near 1000 with margins of a few ulps: without the slack the radius would exceed the true one."""
    g = torch.Generator().manual_seed(0)
    positive = wrong = 0
    for _ in range(300):
        rows, image = torch.randn(2, 3, generator=g), torch.rand(3, generator=g)
        bias = 1000 - rows @ image + 10 ** (-13 + 3 * torch.rand(2, generator=g))
        cert = MarginCertifier(_linear(rows, bias))(image.view(1, 1, 1, 3))
        w, (x,) = fractions(rows), fractions(image[None])
        label = int(cert.label)
        signed = [
            sum((a * b for a, b in zip(row, x, strict=True)), Fraction(c))
            for row, c in zip(w, bias.tolist(), strict=True)
        ]
        gap = signed[label] - signed[1 - label]
        square = sum(((a - b) ** 2 for a, b in zip(*w, strict=True)), Fraction(0))
        assert abs(gap - Fraction(cert.margin.item())) <= Fraction(cert.slack.item())
        if cert.radius.item() > 0:
            assert gap > 0
            assert Fraction(cert.radius.item()) ** 2 * square <= gap**2
        positive += cert.radius.item() > 0
        wrong += cert.margin.item() > gap
    assert positive > 50  # the slack leaves something
    assert wrong > 50  # and the plain float64 margin is often too large


HADAMARD = torch.tensor(SIGNS, dtype=torch.float64) / 2


def _exact_array(tensor: Tensor) -> np.ndarray:
    flat = [Fraction(v) for v in tensor.detach().double().flatten().tolist()]
    return np.array(flat, dtype=object).reshape(tensor.shape)


def _exact_block(block: ShiftBlock, tokens: np.ndarray) -> np.ndarray:
    """The block's equation in rationals, with the stored product; `tokens` is `(H, W, C)`."""
    u = (tokens + _exact_array(block.position)) @ _exact_array(block.rotation).T
    k = block.group
    for i, (axis, step) in enumerate(((0, 1), (0, -1), (1, 1), (1, -1))):
        u[..., i * k : (i + 1) * k] = np.roll(u[..., i * k : (i + 1) * k], step, axis)
    v = u @ _exact_array(block.product).T + _exact_array(block.bias)
    v[..., : block.folded] = abs(v[..., : block.folded])
    return v


@pytest.mark.parametrize("seed", range(4))
def test_a_deep_network_against_exact_arithmetic(seed):
    """Hadamard matrices of halves and signed permutations are orthogonal in binary, so K is exactly 1."""
    g = torch.Generator().manual_seed(seed)
    blocks = []
    for k in range(2):
        block = ShiftBlock(4, (2, 2), group=k, folded=2 + k)
        with torch.no_grad():
            block.rotation.copy_(HADAMARD[torch.randperm(4, generator=g)])
            block.mixing.copy_(torch.eye(4)[torch.randperm(4, generator=g)] @ HADAMARD)
            block.position.copy_(torch.randn(2, 2, 1, generator=g))
            block.bias.copy_(torch.randn(4, generator=g))
        blocks.append(block)
    rows, bias = torch.randn(5, 16, generator=g), torch.randn(5, generator=g)
    body = [Centre((1, 4, 4)), SpaceToDepth(2, 4), *blocks, Flatten()]
    certifier = MarginCertifier(LipschitzNetwork(body, _stored(rows, bias), (1, 4, 4)))
    # the proof cannot know that the products were exact: gamma_4 ||W||_F^2 a matrix
    assert 1 <= certifier.evidence.body.value <= 1 + 1e-13
    images = _images(8, torch.float64, seed)
    cert = certifier(images)
    w = fractions(rows)
    for n, image in enumerate(images):
        tokens = _exact_array(SpaceToDepth(2, 4)(image[None])[0]) - Fraction(1, 2)
        for block in certifier.network.body[2:4]:
            tokens = _exact_block(block, tokens)
        logits = list(_exact_array(rows) @ tokens.reshape(-1) + _exact_array(bias))
        label = int(cert.label[n])
        assert logits[label] == max(logits)
        assert cert.radius[n] > 0
        _check_against_exact(cert.radius[n].item(), logits, w, label)
        # the float64 margin is within the slack of the exact one
        rivals = [logits[label] - v for j, v in enumerate(logits) if j != label]
        gap = min(abs(Fraction(cert.margin[n].item()) - r) for r in rivals)
        assert gap <= Fraction(cert.slack[n].item())


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="needs an 80-bit long double as reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("encoding", ["position", "channel"])
def test_the_slack_covers_the_error_of_float64_and_the_radius_the_definition(encoding, dtype):
    """The whole network, L2 pooling included, against 64-bit mantissas."""
    certifier = MarginCertifier(_net(dtype, encoding=encoding))
    images = _images(16, dtype)
    cert = certifier(images)
    net = certifier.network

    def exact(tensor: Tensor) -> np.ndarray:
        return tensor.detach().numpy().astype(np.longdouble)

    rows = exact(net.head.weight)
    for n in range(len(images)):
        tokens = exact(SpaceToDepth(2, 8)(images[n : n + 1].double() - 0.5)[0])
        for block in net.body[2:4]:
            u = (tokens + exact(block.position)) @ exact(block.rotation).T
            for i, (axis, step) in enumerate(((0, 1), (0, -1), (1, 1), (1, -1))):
                u[..., i] = np.roll(u[..., i], step, axis)
            tokens = u @ exact(block.product).T + exact(block.bias)
            tokens[..., :4] = abs(tokens[..., :4])
        logits = rows @ np.sqrt((tokens**2).sum((0, 1))) + exact(net.head.bias)
        label = int(cert.label[n])
        assert label == int(np.argmax(logits))
        gaps = {j: logits[label] - logits[j] for j in range(4) if j != label}
        radii = {j: gap / np.sqrt(((rows[label] - rows[j]) ** 2).sum()) for j, gap in gaps.items()}
        binding = min(radii, key=radii.get)
        # the long double is itself a thousandth of the slack off
        assert abs(float(gaps[binding] - cert.margin[n].item())) <= cert.slack[n].item()
        assert cert.radius[n].item() * certifier.evidence.body.value <= radii[binding] * (1 - 1e-18)
        assert cert.radius[n].item() >= float(radii[binding]) * (1 - 1e-5) - 1e-9
    assert 0 < cert.slack.max() < 1e-11  # and it costs nothing


def test_a_rival_that_is_not_the_runner_up_can_bind():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.3, 0.0]])
    bias = torch.tensor([0.0, 0.4, -0.35])
    cert = MarginCertifier(_linear(rows, bias))(torch.tensor([[[[0.5, 0.5]]]]))
    # logits 0.5, -0.1, -0.2: ratios 0.3 and 1.0; here the runner-up binds
    assert cert.radius.item() == pytest.approx(0.3, rel=1e-12)
    rows[1], bias[1] = torch.tensor([0.9, 0.0]), -0.55
    # the same logits with the second row close to the first: ratios 6.0 and 1.0
    cert = MarginCertifier(_linear(rows, bias))(torch.tensor([[[[0.5, 0.5]]]]))
    assert cert.radius.item() == pytest.approx(1.0, rel=1e-12)
    assert cert.margin.item() == pytest.approx(0.7)  # of the binding rival


def test_ties_and_margins_within_the_rounding_error_give_zero():
    rows = torch.tensor([[1.0, 0.5], [1.0, 0.5], [-1.0, 0.0]])
    image = torch.tensor([[[[0.3, 0.7]]]])
    tie = MarginCertifier(_linear(rows, torch.zeros(3)))(image)
    assert tie.radius.item() == 0.0
    assert tie.label.item() == 0
    rows[1] = torch.tensor([1.0, -0.5])
    x = torch.tensor([[[[0.3, 2e-16]]]])  # a margin of 2e-16, below the slack of about 1e-15
    near = MarginCertifier(_linear(rows, torch.zeros(3)))(x)
    assert 0 < near.margin.item() < near.slack.item()
    assert near.radius.item() == 0.0


def test_rows_that_coincide_are_told_apart_by_the_bias_at_any_distance():
    rows = torch.tensor([[1.0, 0.5], [1.0, 0.5]])
    cert = MarginCertifier(_linear(rows, torch.tensor([0.5, 0.0])))(torch.tensor([[[[0.3, 0.7]]]]))
    assert cert.label.item() == 0
    assert 1e20 < cert.radius.item() < math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_logits_that_are_not_finite_give_zero(bad, position):
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    certifier = MarginCertifier(_linear(rows, torch.zeros(3)))
    with torch.no_grad():
        certifier.network.head.bias[position] = bad
    cert = certifier(torch.tensor([[[[0.9, 0.1]]], [[[0.2, 0.8]]]]))
    assert torch.equal(cert.radius, torch.zeros(2))


def test_labels_are_the_argmax_and_the_record_is_complete():
    net = _net()
    certifier = MarginCertifier(net)
    images = _images(32)
    cert = certifier(images)
    frozen = net.materialise()
    assert torch.equal(cert.label, frozen.double()(images.double()).argmax(dim=1))
    assert (cert.norm, cert.kind, cert.confidence, cert.semantics) == (2.0, "deterministic", 1.0, "real")
    assert cert.lipschitz is certifier.evidence.body
    assert cert.model_sha256 == sha256_tensors(net.materialise().state_dict())
    assert (cert.radius >= 0).all()
    assert cert.radius.max() > 0.01
    assert len(certifier(images[:0])) == 0


def test_the_batch_split_does_not_matter():
    certifier = MarginCertifier(_net())
    images = _images(33)
    whole = certifier(images)
    for size in (1, 2, 7, 32):
        parts = Certificate.cat([certifier(part) for part in images.split(size)])
        assert torch.equal(parts.label, whole.label)
        # the margins differ by less than the slack; distances are about 1
        assert ((parts.radius - whole.radius).abs() <= 2 * whole.slack / 0.1).all()


def test_float32_images_are_exact_reals():
    certifier = MarginCertifier(_net())
    images = _images(8, torch.float32)
    single, double = certifier(images), certifier(images.double())
    assert torch.equal(single.radius, double.radius)
    assert torch.equal(single.label, double.label)


def test_a_certifier_outlives_its_network():
    net = _net()
    certifier = MarginCertifier(net)
    images = _images(8)
    before = certifier(images)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3.0)
    after = certifier(images)
    assert torch.equal(after.radius, before.radius)
    assert torch.equal(after.label, before.label)
    assert after.model_sha256 == before.model_sha256
    assert MarginCertifier(net).model_sha256 != before.model_sha256


def test_autocast_around_the_call_is_refused_or_has_no_effect():
    """Blocks follow autocast; what may not happen is a radius from bfloat16 logits."""
    certifier, images = MarginCertifier(_net()), _images(8)
    outside = certifier(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        proved_inside = MarginCertifier(_net())
        try:
            inside = certifier(images).radius
        except UnsoundError:
            inside = outside.radius
    assert torch.equal(inside, outside.radius)
    assert torch.equal(proved_inside(images).radius, outside.radius)


def test_certifying_leaves_network_and_generator_alone():
    net = _net().train()
    weights = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    MarginCertifier(net)(_images(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 1, 4, 4), 1.5), r"images must lie in \[0, 1\], got values from 1.5 to 1.5"),
        (torch.full((1, 1, 4, 4), math.nan), "images must be finite"),
        (torch.zeros(1, 3, 4, 4), r"images must have the shape \(n, 1, 4, 4\), got \(1, 3, 4, 4\)"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "divide by 255"),
    ],
)
def test_images_that_the_error_bounds_do_not_cover_are_refused(images, message):
    with pytest.raises(DataError, match=message):
        MarginCertifier(_net())(images)


def test_networks_that_cannot_be_proved_are_refused():
    with pytest.raises(UnsoundError, match="needs a LipschitzNetwork, got a Linear; build it from layers of"):
        MarginCertifier(torch.nn.Linear(2, 2))
    for name in (
        "body.2.rotation",
        "body.3.mixing",
        "body.2.position",
        "body.3.bias",
        "head.weight",
        "head.bias",
    ):
        for bad in (math.nan, math.inf):
            net = _net()
            with torch.no_grad():
                net.get_parameter(name).view(-1)[0] = bad
            with pytest.raises(UnsoundError):
                MarginCertifier(net)


@given(seed=st.integers(0, 999), k=st.integers(1, 5), c=st.integers(1, 6), exponent=st.integers(-30, 30))
@settings(max_examples=40, deadline=None)
def test_head_distances_are_never_below_the_exact_ones(seed, k, c, exponent):
    rows = torch.randn(k, c, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    rows[0] = rows[-1]  # a pair that coincides
    if k > 2:
        rows[1] = rows[-1] * (1 + 1e-9)  # and one that nearly does
    distances, w = head_distances(rows), fractions(rows)
    for i in range(k):
        for j in range(k):
            exact = sum(((a - b) ** 2 for a, b in zip(w[i], w[j], strict=True)), Fraction(0))
            assert Fraction(distances[i, j].item()) ** 2 >= exact
            assert distances[i, j].item() <= math.sqrt(exact) * (1 + 1e-14) + 1e-300
    assert torch.equal(distances, distances.mT)
    assert torch.equal(head_distances(rows.float()), head_distances(rows.float().double()))


def test_the_description_re_derives_the_radius():
    certifier = MarginCertifier(_net())
    cert = certifier(_images(8))
    told = json.loads(json.dumps(certifier.describe()))
    logits = certifier.network(_images(8).double()).tolist()
    for n in range(8):
        y = int(cert.label[n])
        ratios = [
            (logits[n][y] - logits[n][j] - told["margin_error"][y][j])
            / (told["lipschitz"]["bound"] * told["head_distances"][y][j])
            for j in range(4)
            if j != y
        ]
        assert cert.radius[n].item() == pytest.approx(max(min(ratios), 0.0), rel=1e-12)
    product = math.prod(layer["bound"] for layer in told["layers"])
    assert told["lipschitz"]["bound"] == pytest.approx(product, rel=1e-14)


# Planted mistakes: an exhaustive attack in two dimensions, where the radius is the distance to the boundary.

CENTRE = torch.tensor([0.45, 0.5], dtype=torch.float64)
STAR = (
    torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]], dtype=torch.float64),
    torch.tensor([0.2, 0.7, -0.4], dtype=torch.float64),
)


def _distance_to_boundary(rows: Tensor, bias: Tensor, image: Tensor) -> float:
    """Point to line, for the nearest line; exact for a linear classifier of the plane."""
    logits = rows @ image + bias
    y = int(logits.argmax())
    return min(
        ((logits[y] - logits[j]) / (rows[y] - rows[j]).norm()).item() for j in range(len(rows)) if j != y
    )


def _attack_flips(net: LipschitzNetwork, image: Tensor, radius: float) -> bool:
    """Whether some point of the circle has another label: 20,000 directions miss the nearest by 1.3e-8."""
    angle = torch.linspace(0, 2 * math.pi, 20_001)
    points = image + radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    label = net(image.view(1, 1, 1, 2)).argmax()
    return bool((net(points.view(-1, 1, 1, 2)).argmax(dim=1) != label).any())


def _certified(net: LipschitzNetwork, image: Tensor = CENTRE) -> float:
    return MarginCertifier(net)(image.view(1, 1, 1, 2)).radius.item()


@given(
    entries=st.lists(grid, min_size=9, max_size=9),
    image=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=40, deadline=None)
def test_in_the_plane_the_radius_is_the_distance_to_the_boundary(entries, image):
    rows, bias, x = torch.tensor(entries[:6]).view(3, 2), torch.tensor(entries[6:]), torch.tensor(image)
    pairs = [(rows[i] - rows[j]).norm().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    if min(pairs) == 0:
        return
    net, exact = _linear(rows, bias), _distance_to_boundary(rows, bias, x)
    radius = _certified(net, x)
    assert exact - 1e-9 <= radius <= exact * (1 + 1e-15)
    if radius > 1e-6:
        assert not _attack_flips(net, x, radius * (1 - 1e-12))
        assert _attack_flips(net, x, radius * (1 + 1e-6))


def test_the_attack_finds_nothing_inside_the_true_radius():
    net = _linear(*STAR)
    radius = _certified(net)
    assert radius == pytest.approx(_distance_to_boundary(*STAR, CENTRE), abs=1e-9)
    assert not _attack_flips(net, CENTRE, radius)
    assert _attack_flips(net, CENTRE, radius * (1 + 1e-6))


def test_mutant_sqrt2_for_every_pair_is_caught(monkeypatch):
    """Opposite unit rows are 2 apart, not sqrt(2)."""
    rows, bias = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.0, 0.3])
    net = _linear(rows, bias)
    assert not _attack_flips(net, CENTRE, _certified(net))
    monkeypatch.setattr(
        margin, "head_distances", lambda w: math.sqrt(2) * (1 - torch.eye(len(w), dtype=torch.float64))
    )
    assert _attack_flips(net, CENTRE, _certified(net))


def test_mutant_runner_up_only_is_caught():
    """STAR's runner-up is the third class; the second is further behind but nearer in the plane."""
    rows, bias = STAR
    logits = rows @ CENTRE + bias
    first, second = logits.topk(2).indices.tolist()
    mutant = ((logits[first] - logits[second]) / (rows[first] - rows[second]).norm()).item()
    net = _linear(rows, bias)
    assert mutant > 1.05 * _certified(net)
    assert _attack_flips(net, CENTRE, mutant)


def test_mutant_forgotten_body_constant_is_caught(monkeypatch):
    rows, bias = STAR
    net = _linear(rows, bias, Double())
    honest = _certified(net)
    assert not _attack_flips(net, CENTRE, honest)
    assert _attack_flips(net, CENTRE, honest * (1 + 1e-6))
    monkeypatch.setattr(
        Double, "lipschitz_bound", lambda self: LipschitzBound(value=1.0, norm=2.0, proof="isometry")
    )
    assert _attack_flips(net, CENTRE, _certified(net))


def test_mutant_power_iteration_cannot_reach_a_certificate(monkeypatch):
    monkeypatch.setattr(mixing, "near_orthogonal_bound", estimate_spectral_norm)
    assert isinstance(mixing.near_orthogonal_bound(torch.eye(3)), Estimate)
    with pytest.raises(UnsoundError, match="power iteration, 50 steps"):
        MarginCertifier(_net())
    monkeypatch.setattr(mixing, "near_orthogonal_bound", lambda w: estimate_spectral_norm(w).value)
    with pytest.raises(UnsoundError, match="a proved LipschitzBound is needed, got float"):
        MarginCertifier(_net())


def test_mutant_weight_off_the_manifold_is_paid_for():
    """A thousandth on one weight: K grows, and every radius with the same margin shrinks."""
    net = _net(torch.float64)
    before = MarginCertifier(net).evidence.body.value
    with torch.no_grad():
        net.body[2].rotation[0, 0] += 1e-3 * net.body[2].rotation[0, 0].sign()
    assert MarginCertifier(net).evidence.body.value > before + 1e-5


# ---- Deployed semantics


def test_deployed_radii_lose_next_to_nothing_in_float64_and_more_in_float32() -> None:
    net, images = _net(), _images(64)
    real = MarginCertifier(net)(images)
    float64 = MarginCertifier(net, "deployed")(images)
    float32 = MarginCertifier(net, "deployed", "float32")(images)
    assert (float32.semantics, float32.arithmetic) == ("deployed", "float32")
    sure = real.radius > 0.01
    assert bool(sure.any())
    assert bool((float64.radius < real.radius)[sure].all())
    assert bool((float64.radius > real.radius * (1 - 1e-9))[sure].all())
    assert bool((float32.radius < float64.radius)[sure].all())
    assert bool((float32.radius > real.radius * 0.9)[sure].all())


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_executed_margins_stay_within_the_ball_error_on_the_whole_ball(arithmetic: str) -> None:
    """Points up to sqrt(n) away from images; the exact network is evaluated in rationals, its pooling in float64."""
    net = _net()
    certifier = MarginCertifier(net, "deployed", arithmetic)
    dtype = margin.ARITHMETIC[arithmetic]
    g = torch.Generator().manual_seed(3)
    direction = torch.randn(200, 16, generator=g)
    direction = direction / direction.norm(dim=1, keepdim=True) * 4 * torch.rand(200, 1, generator=g)
    points = (_images(200) + direction.view(200, 1, 4, 4)).to(dtype)
    executed = net.materialise().to(dtype)(points).double()
    exact = certifier.network(
        points.double()
    )  # off by 1e-15 itself, which the table allows for many times over
    difference = (executed[:, :, None] - executed[:, None]) - (exact[:, :, None] - exact[:, None])
    bound = margin.ball_error(certifier.network, certifier.evidence.distances, arithmetic)
    assert bool((difference.abs() <= bound).all())
    if arithmetic == "float32":
        assert difference.abs().max() > 1e-3 * bound.max()  # it measures something


def test_a_label_that_float32_execution_changes_is_not_certified_as_deployed_in_float32() -> None:
    """Logits near 1000 with margins of 1e-5: the float32 program rounds them to ties and worse."""
    g = torch.Generator().manual_seed(0)
    changed = 0
    for _ in range(100):
        rows, image = torch.randn(2, 3, generator=g).float(), torch.rand(3, generator=g).float()
        bias = (1000 - rows @ image).float()
        net = _linear(rows, bias)
        batch = image.view(1, 1, 1, 3)
        real, deployed = MarginCertifier(net)(batch), MarginCertifier(net, "deployed", "float32")(batch)
        executed = net(batch).argmax(1)
        assert deployed.radius.item() == 0
        changed += int(real.radius.item() > 0 and executed.item() != real.label.item())
    assert changed > 5  # what `real` does not promise does happen


def test_a_deployed_radius_ends_where_the_error_was_bounded() -> None:
    rows, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([100.0, 0.0])
    image = torch.zeros(1, 1, 1, 2)
    assert MarginCertifier(_linear(rows, bias))(image).radius.item() > 70
    radius = MarginCertifier(_linear(rows, bias), "deployed")(image).radius.item()
    assert math.sqrt(2) * (1 - 1e-12) < radius < math.sqrt(2)


def test_what_cannot_be_deployed_is_refused() -> None:
    with pytest.raises(UnsoundError, match="needs weights stored in float32, got float64 ones"):
        MarginCertifier(_net(torch.float64), "deployed", "float32")
    with pytest.raises(UnsoundError, match="arithmetic must be one of float64 for semantics 'real'"):
        MarginCertifier(_net(), "real", "float32")
    with pytest.raises(
        UnsoundError, match="a program in float16 cannot be certified; deploy in one of float64"
    ):
        MarginCertifier(_net(), "deployed", "float16")
    net = _net()
    with torch.no_grad():
        net.body[2].bias.fill_(1e15)  # overflows when squared in float32, not in float64
    assert len(MarginCertifier(net, "deployed")(_images(2))) == 2
    with pytest.raises(UnsoundError, match="may overflow; check the weights, or use float64"):
        MarginCertifier(net, "deployed", "float32")


@given(st.integers(1, 40), st.integers(1, 20))
@settings(max_examples=20)
def test_a_radius_is_the_same_bits_in_every_batch(count: int, size: int) -> None:
    """Wide enough that a product of one row and one of many add in different orders where blocks are not filled."""
    net = build(input_shape=(1, 8, 8), classes=10, width=96, depth=2, patch=4, shift=0.125, seed=0)
    certify = MarginCertifier(net)
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(size))
    whole = certify(images)
    parts = Certificate.cat([certify(part) for part in images.split(size)])
    for name in ("radius", "margin", "rival"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))


def test_the_rival_is_the_class_that_decides_the_radius() -> None:
    net = _net().double()
    certificate = MarginCertifier(net)(_images(32))
    frozen = net.materialise()
    logits, distance = frozen(_images(32).double()), torch.cdist(frozen.head.weight, frozen.head.weight)
    for k, label in enumerate(certificate.label.tolist()):
        ratios = {
            j: ((logits[k, label] - logits[k, j]) / distance[label, j]).item() for j in range(4) if j != label
        }
        assert certificate.rival is not None
        assert certificate.rival[k].item() == min(ratios, key=ratios.__getitem__)
