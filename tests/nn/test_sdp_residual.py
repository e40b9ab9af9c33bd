"""SLL's layer: its scale against the definition, and the flaw that the erratum removed."""

import math

import pytest
import torch
from helpers import jacobian, spectral_norm
from torch import Tensor
from torch.nn import functional

from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.sdp_residual import SdpResidual


def slow_scale(weight: Tensor, log_q: Tensor) -> list[float]:
    """`2 T` from the definition, with sums over input channels, taps and offsets one by one."""
    m = len(weight)
    kernel = (
        weight.reshape(m, weight.shape[1], weight.shape[-1], -1)
        if weight.dim() == 4
        else weight.view(m, -1, 1, 1)
    )
    k, scale = kernel.shape[-1], []
    for i in range(m):
        total = 0.0
        for j in range(m):
            for dy in range(1 - k, k):
                for dx in range(1 - k, k):
                    entry = 0.0
                    for y in range(k):
                        for x in range(k):
                            if 0 <= y + dy < k and 0 <= x + dx < k:
                                entry += (kernel[i, :, y, x] @ kernel[j, :, y + dy, x + dx]).item()
                    total += abs(entry) * math.exp(log_q[j].item() - log_q[i].item())
        scale.append(2 / total)
    return scale


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_the_scale_is_the_definition(kind: str) -> None:
    inner = Dense(5, 4) if kind == "dense" else Convolution(2, 3, 3, (4, 4), padding=1)
    layer = SdpResidual(inner)
    wanted = torch.tensor(slow_scale(layer.inner.weight.detach(), layer.log_q.detach()))
    torch.testing.assert_close(layer.form_scale(), wanted, rtol=1e-12, atol=0)
    stored = layer.materialise().scale
    assert stored is not None
    assert ((stored < wanted) & (stored > wanted * (1 - 5e-7))).all()


def test_the_scale_does_not_see_a_common_factor_of_q() -> None:
    layer = SdpResidual(Dense(5, 4))
    before = layer.form_scale()
    with torch.no_grad():
        layer.log_q.add_(1000.0)  # exp of it overflows
    torch.testing.assert_close(layer.form_scale(), before)
    assert layer.materialise().lipschitz_bound().value == 1.0


def test_the_gradients_of_scale_and_layer_are_right() -> None:
    layer = SdpResidual(Dense(4, 3))
    x = torch.randn(2, 4)

    def apply(weight: Tensor, bias: Tensor, log_q: Tensor) -> Tensor:
        parameters = {"inner.weight": weight, "inner.bias": bias, "log_q": log_q}
        return torch.func.functional_call(layer, parameters, (x,))

    assert torch.autograd.gradcheck(apply, tuple(p.detach().clone().requires_grad_() for p in (
        layer.inner.weight, layer.inner.bias, layer.log_q)))  # fmt: skip


@pytest.mark.parametrize(("q", "lowest"), [(1e-6, 1.2), (1e-7, 8.0)])
def test_the_scale_of_the_first_version_is_seen_to_be_too_large(q: float, lowest: float) -> None:
    """It divided by `q + 1e-6` in one place and by q in the other: T too large by `(q + 1e-6) / q`."""
    layer = SdpResidual(Dense(6, 6, generator=torch.Generator().manual_seed(0)))
    assert layer.inner.bias is not None
    with torch.no_grad():
        layer.log_q.fill_(math.log(q))
        layer.inner.bias.fill_(10.0)
    stored = layer.materialise()
    assert stored.scale is not None
    sound = spectral_norm(jacobian(stored, torch.zeros(1, 6)))
    assert sound <= 1 + 1e-12
    stored.scale = stored.scale * ((q + 1e-6) / q)
    slope = spectral_norm(jacobian(stored, torch.zeros(1, 6)))
    assert slope > lowest
    assert slope <= stored.lipschitz_bound().value


def test_with_orthogonal_rows_nothing_is_lost() -> None:
    """Then the sums are the squared norms of the rows, and the layer reflects: its slope is -1 along each active row."""
    rows = torch.eye(4)[:3] * torch.tensor([[0.5], [1.0], [4.0]])
    layer = SdpResidual(Dense(4, 3))
    with torch.no_grad():
        layer.inner.weight.copy_(rows)
        layer.inner.bias.fill_(10.0)  # type: ignore[union-attr]
    j = jacobian(layer.materialise(), torch.zeros(1, 4))
    torch.testing.assert_close(j, torch.diag(torch.tensor([-1.0, -1.0, -1.0, 1.0])), rtol=0, atol=1e-6)


def test_rows_of_zeros_are_left_out() -> None:
    layer = SdpResidual(Dense(4, 3))
    with torch.no_grad():
        layer.inner.weight[1] = 0.0
    x = torch.randn(2, 4)
    scale = layer.form_scale()
    assert scale[1] == 0
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.materialise().lipschitz_bound().value == 1.0
    assert layer.materialise()(x).isfinite().all()


def test_there_is_no_power_iteration_to_keep() -> None:
    assert list(SdpResidual(Dense(4, 3)).state_dict()) == ["log_q", "inner.weight", "inner.bias"]


def test_the_scale_is_formed_in_full_precision_under_autocast() -> None:
    layer = SdpResidual(Convolution(8, 16, 3, (6, 6), padding=1)).float()
    wanted = layer.form_scale()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.form_scale(), wanted)
        assert layer(torch.rand(1, 8, 6, 6, dtype=torch.float32)).dtype == torch.float32


def test_the_convolution_is_torch_s_with_its_own_transpose() -> None:
    layer = SdpResidual(Convolution(3, 5, 3, (6, 4), padding=1))
    x = torch.randn(2, 3, 6, 4)
    hidden = torch.relu(functional.conv2d(x, layer.inner.weight, layer.inner.bias, padding=1))
    scaled = layer.form_scale().view(-1, 1, 1) * hidden
    branch = functional.conv_transpose2d(scaled, layer.inner.weight, padding=1)
    torch.testing.assert_close(layer(x), x - branch)
