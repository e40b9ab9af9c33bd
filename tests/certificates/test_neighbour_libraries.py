"""Networks of deel-torchlip and orthogonium, made plain and certified."""

import warnings

import pytest
import torch
from torch import nn

from lipnext import certify_module
from lipnext.certificates.adapters import plain
from lipnext.core.errors import UnsoundError

SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True)
def _float32() -> None:
    torch.set_default_dtype(torch.float32)  # the libraries build their tensors in it


def _settled(net: nn.Module) -> nn.Module:
    """Power iterations move in train mode."""
    for _ in range(5):
        net(torch.rand(2, *SHAPE))
    return net.eval()


def test_a_torchlip_network() -> None:
    tl = pytest.importorskip("deel.torchlip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = _settled(
            tl.Sequential(
                tl.SpectralConv2d(1, 4, 3, padding=1, padding_mode="circular"),
                tl.GroupSort2(),
                tl.ScaledL2NormPool2d((2, 2)),
                tl.SpectralConv2d(4, 4, 3, padding=1),
                tl.MaxMin(),
                tl.ScaledAvgPool2d((2, 2)),
                nn.Flatten(),
                tl.SpectralLinear(32, 16),
                tl.FullSort(),
                tl.FrobeniusLinear(16, 3),
                k_coef_lip=2.0,
            )
        )
    images = torch.rand(4, *SHAPE)
    copied = plain(net, SHAPE)
    torch.testing.assert_close(copied(images), net(images))
    model = certify_module(copied, SHAPE, 3)
    certificate = model.certify(images)
    assert (certificate.radius > 0).any()
    assert certificate.lipschitz is not None
    assert 0.1 < certificate.lipschitz.value < 2.1


def test_an_orthogonium_network() -> None:
    pytest.importorskip("orthogonium")
    from orthogonium.layers import (
        Abs,
        AdaptiveOrthoConv2d,
        BatchCentering2D,
        MaxMin,
        OrthoLinear,
        UnitNormLinear,
    )

    net = _settled(
        nn.Sequential(
            AdaptiveOrthoConv2d(1, 4, 3),
            MaxMin(),
            AdaptiveOrthoConv2d(4, 8, 4, stride=2, padding=1),
            BatchCentering2D(8),
            Abs(),
            nn.LPPool2d(2, 2),
            nn.Flatten(),
            OrthoLinear(32, 16),
            nn.ReLU(),
            UnitNormLinear(16, 3),
        )
    )
    images = torch.rand(4, *SHAPE)
    copied = plain(net, SHAPE)
    torch.testing.assert_close(copied(images), net(images))
    certificate = certify_module(copied, SHAPE, 3, semantics="deployed", dtype=torch.float32).certify(images)
    assert (certificate.radius > 0).any()
    assert certificate.lipschitz is not None
    assert 0.9 < certificate.lipschitz.value < 1.01


def test_any_parametrised_network() -> None:
    net = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 3))).eval()
    with pytest.raises(UnsoundError, match="parametrised"):
        certify_module(net, SHAPE, 3)
    assert len(certify_module(plain(net, SHAPE), SHAPE, 3).certify(torch.rand(2, *SHAPE))) == 2


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    net = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(Twice(64, 3))).eval()
    with pytest.raises(UnsoundError, match=r"Twice has a forward of its own; replace it"):
        plain(net, SHAPE)


def test_a_copy_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 3))).eval()
    monkeypatch.setattr("lipnext.certificates.adapters._linear", lambda module: nn.Linear(64, 3))
    with pytest.raises(UnsoundError, match="gives other logits"):
        plain(net, SHAPE)
