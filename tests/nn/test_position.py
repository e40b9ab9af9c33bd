import torch

from lipnext.core.rounding import RoundingState
from lipnext.nn.position import Centre, ChannelBias, PositionalEncoding


def test_translations_add_what_they_say():
    x = torch.randn(2, 3, 4, 5)
    encoding, bias = PositionalEncoding(3, 4, 5), ChannelBias(5, 12)
    assert torch.equal(encoding(x), x)
    assert torch.equal(bias(x), x)
    with torch.no_grad():
        encoding.weight.copy_(torch.randn(3, 4, 1))
        bias.weight.copy_(torch.randn(5))
    for h in range(3):
        for w in range(4):
            assert torch.equal(encoding(x)[:, h, w], x[:, h, w] + encoding.weight[h, w, 0])
    for c in range(5):
        assert torch.equal(bias(x)[..., c], x[..., c] + bias.weight[c])
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(Centre((3, 4, 4))(images), images - 0.5)


def test_each_channel_of_a_position_may_have_its_own_number():
    encoding = PositionalEncoding(3, 4, 5, each=True)
    with torch.no_grad():
        encoding.weight.copy_(torch.randn(3, 4, 5))
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(encoding(x), x + encoding.weight)


def test_norms_count_every_copy_of_the_constant():
    encoding, bias = PositionalEncoding(3, 4, 5), ChannelBias(5, 12)
    each = PositionalEncoding(3, 4, 5, each=True)
    with torch.no_grad():
        each.weight.fill_(1.0)
        encoding.weight.fill_(1.0)
        bias.weight.fill_(1.0)
    zero = RoundingState(norm=0.0, error=0.0, unit=2.0**-53)
    whole = torch.ones(3, 4, 5).norm().item()
    centre = Centre((3, 4, 5))
    assert whole / 2 <= centre.rounding(zero).norm <= whole / 2 * (1 + 1e-14)
    for layer in (encoding, each, bias):
        assert whole <= layer.rounding(zero).norm <= whole * (1 + 1e-14)
