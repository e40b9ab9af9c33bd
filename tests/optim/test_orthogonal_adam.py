import copy
import math

import pytest
import torch
from helpers import rotations
from torch import Tensor, nn

from lipnext.manifold.polar import residual
from lipnext.optim.orthogonal_adam import OrthogonalAdam
from lipnext.systems.lipnext import build

BETAS, EPS = (0.8, 0.95), 1e-8


def _slow_exp(a: Tensor) -> Tensor:
    """FastExp of one matrix: the power series up to the order that the Frobenius norm allows."""
    norm = math.sqrt(sum(v * v for v in a.flatten().tolist()))
    order = 2 if norm < 0.05 else 3 if norm < 0.25 else 4 if norm < 1 else 30
    total, term = torch.eye(len(a)), torch.eye(len(a))
    for k in range(1, order + 1):
        term = term @ a / k
        total = total + term
    return total


def _slow_adam(x: Tensor, gradients: list[Tensor], lr: float, lookahead: int) -> Tensor:
    """One matrix at a time, entry by entry, straight from the formulas."""
    n = len(x)
    first, second = torch.zeros(n, n), torch.zeros(n, n)
    slow, travel = x.clone(), torch.zeros(n, n)
    for t, gradient in enumerate(gradients, start=1):
        a = (x.T @ gradient - gradient.T @ x) / 2
        step = torch.zeros(n, n)
        for i in range(n):
            for j in range(n):
                first[i, j] = BETAS[0] * first[i, j] + (1 - BETAS[0]) * a[i, j]
                second[i, j] = BETAS[1] * second[i, j] + (1 - BETAS[1]) * a[i, j] ** 2
                mean = first[i, j] / (1 - BETAS[0] ** t)
                scale = second[i, j] / (1 - BETAS[1] ** t)
                step[i, j] = -lr * mean / (scale.sqrt() + EPS)
        travel = travel + step
        if lookahead and t % lookahead == 0:
            slow = slow @ _slow_exp(travel / 2)
            x, travel = slow, torch.zeros(n, n)
        else:
            x = x @ _slow_exp(step)
    return x


# 0.004, 0.03, 0.1 and 0.3 per entry of a 4 x 4 matrix reach all four branches of FastExp
@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize("lr", [0.004, 0.03, 0.1, 0.3])
def test_steps_are_those_of_the_slow_reference(lr, lookahead):
    starts = [rotations(n=n, seed=s) for s, n in enumerate((4, 3, 4, 1))]
    gradients = [[torch.randn(x.shape) * 10.0**k for _ in range(7)] for k, x in enumerate(starts)]
    params = [nn.Parameter(x.clone()) for x in starts]
    optimizer = OrthogonalAdam(params, lr=lr, betas=BETAS, eps=EPS, lookahead=lookahead)
    for t in range(7):
        for p, sequence in zip(params, gradients, strict=True):
            p.grad = sequence[t].clone()
        optimizer.step()
    for p, x, sequence in zip(params, starts, gradients, strict=True):
        assert torch.allclose(p, _slow_adam(x, sequence, lr, lookahead), rtol=0, atol=1e-12)


def test_a_stack_of_matrices_moves_like_its_matrices():
    starts = rotations(3, n=4, seed=0)
    gradients = [torch.randn(3, 4, 4) for _ in range(4)]
    stack, singles = nn.Parameter(starts.clone()), [nn.Parameter(x.clone()) for x in starts]
    together = OrthogonalAdam([stack], lr=0.1, lookahead=2)
    apart = OrthogonalAdam(singles, lr=0.1, lookahead=2)
    for gradient in gradients:
        stack.grad = gradient.clone()
        for p, g in zip(singles, gradient, strict=True):
            p.grad = g.clone()
        together.step()
        apart.step()
    assert torch.allclose(stack, torch.stack(list(singles)), rtol=0, atol=1e-14)


def test_a_matrix_that_joins_later_starts_its_own_count():
    """Bias correction and Lookahead go by a matrix's own steps; the others keep their moments."""
    early, late = (nn.Parameter(rotations(n=3, seed=s)) for s in (0, 1))
    starts = [early.detach().clone(), late.detach().clone()]
    optimizer = OrthogonalAdam([early, late], lr=0.1, betas=BETAS, eps=EPS, lookahead=2)
    gradients = [torch.randn(3, 3) for _ in range(5)]
    for t, gradient in enumerate(gradients):
        early.grad = gradient.clone()
        late.grad = gradient.clone() if t >= 2 else None
        optimizer.step()
    assert torch.allclose(early, _slow_adam(starts[0], gradients, 0.1, 2), rtol=0, atol=1e-12)
    assert torch.allclose(late, _slow_adam(starts[1], gradients[2:], 0.1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lookahead", [0, 4])
def test_alignment_falls_to_nothing_and_orthogonality_stays(lookahead):
    """`||X - Q||^2` for Q in the same component has no other attractor than Q."""
    target = rotations(2, n=6, seed=1, det=1)
    params = [nn.Parameter(x) for x in rotations(2, n=6, seed=0, det=1)]
    optimizer = OrthogonalAdam(params, lr=0.02, lookahead=lookahead)
    losses, steps = [], 600 if lookahead else 300  # Lookahead goes half the way
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum((p - q).square().sum() for p, q in zip(params, target, strict=True))
        loss.backward()
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        optimizer.step()
    assert losses[-1] < 1e-4 * losses[0]
    # Entries of at most 0.02: norm 0.02 sqrt(30) = 0.11, order 3, and t = 0.11 / sqrt(2) leaves
    # t^4/12 = 3e-6 in two directions, every time at the very most
    assert max(residual(p).item() for p in params) < steps * 2**0.5 * 3e-6
    optimizer.retract()
    assert max(residual(p).item() for p in params) < 1e-13


def test_float32_drifts_slowly_and_retraction_takes_it_back():
    """1,000 steps without retraction in float32 stay below 1e-3 (6e-5 where this was written)."""
    n = 24
    params = [nn.Parameter(rotations(n=n, seed=s).float()) for s in range(3)]
    optimizer = OrthogonalAdam(params, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, n, n, generator=generator, dtype=torch.float32)
    for _ in range(1000):
        noise = torch.randn(3, n, n, generator=generator, dtype=torch.float32)
        for p, g in zip(params, mean + noise, strict=True):
            p.grad = g
        optimizer.step()
    worst = max(residual(p).item() for p in params)
    assert math.isfinite(worst)
    assert worst < 1e-3
    optimizer.retract()
    assert max(residual(p).item() for p in params) <= 1e-5


@pytest.mark.parametrize("lookahead", [0, 3])
def test_a_state_dict_round_trip_goes_on_bit_for_bit(lookahead):
    def make() -> tuple[list[nn.Parameter], OrthogonalAdam]:
        params = [nn.Parameter(rotations(n=n, seed=n).float()) for n in (3, 5, 3)]
        return params, OrthogonalAdam(params, lr=0.05, lookahead=lookahead)

    generator = torch.Generator().manual_seed(0)
    gradients = [
        [torch.randn(n, n, generator=generator, dtype=torch.float32) for n in (3, 5, 3)] for _ in range(9)
    ]

    def run(params: list[nn.Parameter], optimizer: OrthogonalAdam, steps: list[list[Tensor]]) -> None:
        for grads in steps:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()

    params, optimizer = make()
    run(params, optimizer, gradients[:4])
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    run(params, optimizer, gradients[4:])

    resumed, other = make()
    other.load_state_dict(saved)
    with torch.no_grad():
        for p, w in zip(resumed, weights, strict=True):
            p.copy_(w)
    run(resumed, other, gradients[4:])
    for a, b in zip(params, resumed, strict=True):
        assert torch.equal(a, b)


def test_a_deep_copy_of_a_network_can_be_optimised():
    net = build(input_shape=(1, 4, 4), classes=3, width=8, depth=1, patch=2, shift=0.125)
    clone = copy.deepcopy(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    block = clone.body[2]
    optimizer = OrthogonalAdam([block.rotation, block.mixing], lr=0.1)
    clone(torch.rand(4, 1, 4, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(block.mixing, before["body.2.mixing"])
    assert residual(block.mixing) < 1e-3
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])


def test_parameters_without_a_gradient_stay():
    still, moving = nn.Parameter(rotations(n=3, seed=0)), nn.Parameter(rotations(n=3, seed=1))
    optimizer = OrthogonalAdam([still, moving], lr=0.1)
    before = still.detach().clone()
    moving.grad = torch.randn(3, 3)
    optimizer.step()
    assert torch.equal(still, before)
    assert optimizer.state_dict()["state"].keys() == {1} or not optimizer.state_dict()["state"].get(0)


def test_retract_covers_the_slow_copies():
    param = nn.Parameter(rotations(n=5, seed=0))
    optimizer = OrthogonalAdam([param], lr=0.03, lookahead=4)
    for _ in range(6):
        param.grad = torch.randn(5, 5)
        optimizer.step()
    slow = optimizer.state[param]["slow"]
    assert residual(slow) > 1e-12
    optimizer.retract()
    assert residual(optimizer.state[param]["slow"]) < 1e-13
    assert residual(param) < 1e-13


def test_a_closure_is_called_with_gradients():
    param = nn.Parameter(rotations(n=3, seed=0, det=1))
    optimizer = OrthogonalAdam([param], lr=0.01)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param - torch.eye(3)).square().sum()
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    assert first is not None
    assert optimizer.step(closure) < first
