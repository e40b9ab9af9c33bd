import copy
import math

import pytest
import torch
from helpers import rotations, spectral_norm
from torch import Tensor, nn

from lipnext.manifold.exponential import taylor_exp
from lipnext.manifold.polar import residual
from lipnext.optim.muon import ANGLES, ManifoldMuon

MOMENTUM = 0.9


def _slow_sign(direction: Tensor, steps: int) -> Tensor:
    """The polynomials of `skew_sign` on the singular values of an SVD."""
    u, s, vh = torch.linalg.svd(direction)
    s = s / torch.linalg.vector_norm(s)
    for step in range(steps):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < steps - 2 else (15 / 8, -10 / 8, 3 / 8)
        s = a * s + b * s**3 + c * s**5
    j = u * s @ vh
    return (j - j.mT) / 2


def _slow_muon(x: Tensor, gradients: list[Tensor], lr: float, lookahead: int, sign_steps: int) -> Tensor:
    """One matrix at a time; the exponential is the exact one."""
    momentum, slow, travel = torch.zeros_like(x), x.clone(), torch.zeros_like(x)
    for t, gradient in enumerate(gradients, start=1):
        a = (x.T @ gradient - gradient.T @ x) / 2
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * a
        step = -lr * _slow_sign((1 - MOMENTUM) * a + MOMENTUM * momentum, sign_steps)
        travel = travel + step
        if lookahead and t % lookahead == 0:
            slow = slow @ torch.linalg.matrix_exp(travel / 2)
            x, travel = slow, torch.zeros_like(x)
        else:
            x = x @ torch.linalg.matrix_exp(step)
    return x


@pytest.mark.parametrize(("lookahead", "sign_steps"), [(0, 5), (0, 6), (1, 5), (3, 5)])
@pytest.mark.parametrize("lr", [0.01, 0.06, 0.3])
def test_steps_are_those_of_the_slow_reference(lr, lookahead, sign_steps):
    starts = [rotations(n=n, seed=s) for s, n in enumerate((4, 6, 4))]
    gradients = [[torch.randn(x.shape) * 10.0**k for _ in range(7)] for k, x in enumerate(starts)]
    params = [nn.Parameter(x.clone()) for x in starts]
    optimizer = ManifoldMuon(params, lr=lr, momentum=MOMENTUM, sign_steps=sign_steps, lookahead=lookahead)
    for t in range(7):
        for p, sequence in zip(params, gradients, strict=True):
            p.grad = sequence[t].clone()
        optimizer.step()
    # the Taylor remainder of the largest angle of each order: 0.029^4/24 and 0.127^5/120, in spectral norm,
    # a factor 2 for the Frobenius norm of four planes, seven times
    tolerance = 7 * 2 * max(0.029**4 / 24, 0.127**5 / 120)
    for p, x, sequence in zip(params, starts, gradients, strict=True):
        slow = _slow_muon(x, sequence, lr, lookahead, sign_steps)
        assert torch.linalg.matrix_norm(p - slow).item() < tolerance


def test_the_angles_keep_the_residual_below_float32_roundoff():
    for angle, order in ANGLES:
        worst = torch.zeros(2, 2)
        worst[0, 1], worst[1, 0] = angle, -angle
        p = taylor_exp(worst, order)
        defect = spectral_norm(p.mT @ p - torch.eye(2))
        assert defect < 2.0**-24
        assert defect > 2.0**-26  # and are not wastefully small
    assert [order for _, order in ANGLES] == [3, 4]


def test_every_plane_turns_by_the_angle():
    """One step from the identity: all eigenvalues of X are `exp(+-i t)`."""
    param = nn.Parameter(torch.eye(6))
    optimizer = ManifoldMuon([param], lr=0.05)
    param.grad = torch.randn(6, 6)
    optimizer.step()
    angles = torch.linalg.eigvals(param.detach()).angle().abs()
    # skew_sign leaves singular values within 6e-4 of 1 here
    assert torch.allclose(angles, torch.full((6,), 0.05), rtol=1e-3)


@pytest.mark.parametrize("lookahead", [0, 4])
def test_alignment_falls_to_nothing_and_orthogonality_stays(lookahead):
    target = rotations(2, n=6, seed=1, det=1)
    params = [nn.Parameter(x) for x in rotations(2, n=6, seed=0, det=1)]
    optimizer = ManifoldMuon(params, lr=0.1, momentum=0.8, lookahead=lookahead)
    losses = []
    for step in range(300):
        optimizer.zero_grad()
        loss = sum((p - q).square().sum() for p, q in zip(params, target, strict=True))
        loss.backward()
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 300)
        optimizer.step()
    assert losses[-1] < 1e-4 * losses[0]
    # at most 2^-24 a step and plane: 300 steps, six planes
    assert max(residual(p).item() for p in params) < 300 * 6 * 2.0**-24
    optimizer.retract()
    assert max(residual(p).item() for p in params) < 1e-13


def test_float32_drifts_slowly_and_retraction_takes_it_back():
    """1,000 steps without retraction in float32, odd size (singular momentum): below 1e-3 (2e-5 seen)."""
    n = 25
    params = [nn.Parameter(rotations(n=n, seed=s).float()) for s in range(3)]
    optimizer = ManifoldMuon(params, lr=0.06)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        for p in params:
            p.grad = torch.randn(n, n, generator=generator, dtype=torch.float32)
        optimizer.step()
    worst = max(residual(p).item() for p in params)
    assert math.isfinite(worst)
    assert worst < 1e-3
    optimizer.retract()
    assert max(residual(p).item() for p in params) <= 1e-5


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e30])
def test_vanishing_and_exploding_gradients_do_not_poison_the_weights(scale):
    param = nn.Parameter(rotations(n=6, seed=0).float())
    optimizer = ManifoldMuon([param], lr=0.05)
    gradient = torch.randn(6, 6, dtype=torch.float32)
    for _ in range(3):
        param.grad = gradient * scale
        optimizer.step()
    assert torch.isfinite(param).all()
    assert residual(param) < 1e-5


def test_half_precision_signs_reach_the_same_place():
    """The products of the sign in bfloat16: the step is a per cent off, and just as orthogonal."""
    starts, gradient = rotations(n=8, seed=0).float(), torch.randn(8, 8, dtype=torch.float32)
    moved = []
    for sign_dtype in (None, torch.bfloat16):
        param = nn.Parameter(starts.clone())
        optimizer = ManifoldMuon([param], lr=0.05, sign_dtype=sign_dtype)
        param.grad = gradient.clone()
        optimizer.step()
        moved.append(param.detach())
        assert residual(param) < 1e-5
    assert not torch.equal(*moved)
    assert spectral_norm(moved[0] - moved[1]) < 0.05 * 0.02


@pytest.mark.parametrize("lookahead", [0, 3])
def test_a_state_dict_round_trip_goes_on_bit_for_bit(lookahead):
    generator = torch.Generator().manual_seed(0)
    gradients = [
        [torch.randn(n, n, generator=generator, dtype=torch.float32) for n in (4, 5)] for _ in range(9)
    ]

    def run(params: list[nn.Parameter], optimizer: ManifoldMuon, steps: list[list[Tensor]]) -> None:
        for grads in steps:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()

    params = [nn.Parameter(rotations(n=n, seed=n).float()) for n in (4, 5)]
    optimizer = ManifoldMuon(params, lr=0.05, lookahead=lookahead)
    run(params, optimizer, gradients[:4])
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    run(params, optimizer, gradients[4:])
    other = ManifoldMuon(resumed, lr=1.0, lookahead=lookahead)  # the saved lr comes back
    other.load_state_dict(saved)
    run(resumed, other, gradients[4:])
    for a, b in zip(params, resumed, strict=True):
        assert torch.equal(a, b)
