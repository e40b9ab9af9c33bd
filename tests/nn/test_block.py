import copy

import pytest
import torch
from helpers import rotations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipnext.nn.block import ShiftBlock

PARAMETERS = ("rotation", "mixing", "position", "bias")


def _block(
    channels: int, grid: tuple[int, int], group: int, folded: int, seed: int = 0, each: bool = False
) -> ShiftBlock:
    """A block with every weight away from its start."""
    generator = torch.Generator().manual_seed(seed)
    block = ShiftBlock(channels, grid, group=group, folded=folded, each=each, generator=generator)
    with torch.no_grad():
        block.mixing.copy_(rotations(n=channels, seed=seed))
        block.position.copy_(torch.randn(block.position.shape, generator=generator))
        block.bias.copy_(0.3 * torch.randn(channels, generator=generator))
    return block


def _tokens(block: ShiftBlock, batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, *block.grid, block.channels, generator=torch.Generator().manual_seed(seed))


def _slow(block: ShiftBlock, tokens: Tensor, product: Tensor | None = None) -> Tensor:
    """`act(M R^T shift(R (X + p)) + b)` straight from the equation, position by position."""
    h, w = block.grid
    k, r = block.group, block.rotation
    m = block.mixing @ r.mT if product is None else product
    u = torch.einsum("ij,bhwj->bhwi", r, tokens + block.position)
    rows = []
    for y in range(h):
        for x in range(w):
            groups = [
                u[:, (y - 1) % h, x, :k],
                u[:, (y + 1) % h, x, k : 2 * k],
                u[:, y, (x - 1) % w, 2 * k : 3 * k],
                u[:, y, (x + 1) % w, 3 * k : 4 * k],
                u[:, y, x, 4 * k :],
            ]
            rows.append(torch.einsum("ij,bj->bi", m, torch.cat(groups, dim=1)) + block.bias)
    v = torch.stack(rows, dim=1).view(-1, h, w, block.channels)
    return torch.cat([v[..., : block.folded].abs(), v[..., block.folded :]], dim=-1)


shapes = st.tuples(
    st.integers(1, 9),  # channels
    st.tuples(st.integers(1, 4), st.integers(1, 4)),  # grid
    st.floats(0, 1),  # share of the largest group
    st.floats(0, 1),  # share folded
    st.integers(1, 3),  # batch
    st.integers(0, 999),
    st.booleans(),  # a number for each channel of a position
)


def _drawn(shape) -> tuple[ShiftBlock, Tensor]:
    channels, grid, group, folded, batch, seed, each = shape
    block = _block(channels, grid, int(group * (channels // 4)), int(folded * channels), seed, each)
    return block, _tokens(block, batch, seed)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_forward_is_the_equation_and_the_chain_of_layers(shape):
    block, tokens = _drawn(shape)
    fused = block(tokens)
    # 1e-13: three products of at most 9 terms of size about 3
    assert torch.allclose(fused, _slow(block, tokens), rtol=0, atol=1e-13)
    chained = tokens
    for layer in block.layers():
        chained = layer(chained)
    assert torch.allclose(fused, chained, rtol=0, atol=1e-13)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_backward_is_autograd_through_the_equation(shape):
    block, tokens = _drawn(shape)
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    grads = []
    for function in (block, lambda t: _slow(block, t)):
        inputs = [tokens.clone().requires_grad_(), *(getattr(block, name) for name in PARAMETERS)]
        grads.append(torch.autograd.grad((function(inputs[0]) * weight).sum(), inputs))
    for fused, slow in zip(*grads, strict=True):
        assert fused.shape == slow.shape
        assert torch.allclose(fused, slow, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("group", "folded"), [(0, 0), (1, 4), (2, 8)])
def test_gradcheck(group, folded):
    block = _block(8, (2, 3), group, folded)
    tokens = _tokens(block, 2).requires_grad_()
    weights = [getattr(block, name) for name in PARAMETERS]

    def run(tokens, *values):
        return torch.func.functional_call(block, dict(zip(PARAMETERS, values, strict=True)), tokens)

    assert torch.autograd.gradcheck(run, (tokens, *weights), fast_mode=True)


def test_gradcheck_of_a_materialised_block():
    block = _block(8, (2, 3), 1, 4).materialise()
    names = ("rotation", "product", "position", "bias")
    assert sorted(name for name, _ in block.named_parameters()) == sorted(names)

    def run(tokens, *values):
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), tokens)

    tokens = _tokens(block, 2).requires_grad_()
    assert torch.autograd.gradcheck(run, (tokens, *(getattr(block, n) for n in names)), fast_mode=True)


@pytest.mark.parametrize("materialised", [False, True])
def test_frozen_weights_leave_the_gradient_of_the_tokens_as_it_is(materialised):
    block = _block(8, (2, 3), group=2, folded=5).double()
    block = block.materialise() if materialised else block
    weight = torch.randn(3, *block.grid, 8, dtype=torch.float64)
    gradients = []
    for trained in (True, False):
        tokens = _tokens(block, 3).double().requires_grad_(True)
        (block.requires_grad_(trained)(tokens) * weight).sum().backward()
        gradients.append(tokens.grad)
    assert torch.equal(*gradients)
    block.rotation.requires_grad_(True)  # one that is trained is enough
    (block(_tokens(block, 3).double().requires_grad_(True)) * weight).sum().backward()
    assert block.rotation.grad.abs().max() > 0


def test_gradient_at_the_kink_is_an_element_of_the_subdifferential():
    """All tokens zero: `|v|` at 0 takes the slope +1, and the gradient is that without folding."""
    block = ShiftBlock(4, (2, 2), group=1, folded=4)
    tokens = torch.zeros(1, 2, 2, 4, requires_grad=True)
    block(tokens).sum().backward()
    plain = copy.deepcopy(block)
    plain.folded = 0
    unfolded = torch.zeros(1, 2, 2, 4, requires_grad=True)
    plain(unfolded).sum().backward()
    assert torch.equal(tokens.grad, unfolded.grad)


def test_gradients_of_other_memory_layouts():
    """Strided tokens, an expanded gradient (`sum`) and a transposed one give what contiguous ones do."""
    block = _block(8, (3, 4), 2, 4)
    tokens = _tokens(block, 2)
    strided = tokens.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(block(strided), block(tokens))
    turned = torch.randn(8, 4, 3, 2).permute(3, 2, 1, 0)
    for grad in (torch.ones(()).expand(tokens.shape), turned):
        results = []
        for g in (grad, grad.contiguous()):
            block.zero_grad()
            block(strided).backward(g)
            results.append([getattr(block, name).grad.clone() for name in PARAMETERS])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_an_empty_batch():
    block = _block(8, (3, 4), 1, 4)
    assert block(torch.zeros(0, 3, 4, 8)).shape == (0, 3, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", [0, 2])
def test_materialise_is_bit_for_bit_the_same_function(dtype, group):
    block = _block(16, (3, 4), group, 8).to(dtype)
    tokens = _tokens(block, 3).to(dtype)
    frozen = block.materialise()
    assert frozen.mixing is None
    assert frozen.product.dtype == dtype
    assert torch.equal(frozen(tokens), block(tokens))
    assert torch.equal(frozen.materialise()(tokens), block(tokens))
    assert block.product is None  # the block itself is as it was


def test_materialise_does_not_share_weights():
    block = _block(8, (2, 2), 1, 4)
    frozen = block.materialise()
    tokens = _tokens(block, 1)
    before = frozen(tokens)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1.0)
    assert torch.equal(frozen(tokens), before)


def test_double_after_materialise_keeps_the_stored_product():
    """The order matters: the product is formed in float32, then taken as exact."""
    block = _block(16, (2, 2), 1, 8).float()
    frozen = block.materialise().double()
    assert torch.equal(frozen.product, (block.mixing @ block.rotation.mT).double())
    assert not torch.equal(frozen.product, block.mixing.double() @ block.rotation.double().mT)


def test_the_block_starts_as_shift_and_fold_in_a_rotated_basis():
    block = ShiftBlock(8, (3, 3), group=1, folded=0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block.rotation, block.mixing)
    tokens = _tokens(block, 1)
    assert block(tokens).norm().item() == pytest.approx(tokens.norm().item(), rel=1e-13)


def test_bfloat16_autocast_runs_and_gradients_are_close():
    block = _block(32, (4, 4), 2, 16).float()
    tokens = _tokens(block, 8).float()
    weight = torch.randn(tokens.shape, dtype=torch.float32)
    outputs, grads = [], []
    for enabled in (False, True):
        block.zero_grad()
        leaf = tokens.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = block(leaf)
        (out.float() * weight).sum().backward()
        outputs.append(out)
        grads.append([leaf.grad, *(getattr(block, name).grad.clone() for name in PARAMETERS)])
    assert outputs[1].dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 2^-8 an operation, a handful of operations in a row
    assert (outputs[1].float() - outputs[0]).norm() < 0.02 * outputs[0].norm()
    for exact, rough in zip(*grads, strict=True):
        assert rough.dtype == torch.float32
        # folds near zero may flip sign: a few per cent of the gradient
        assert (rough - exact).norm() < 0.1 * exact.norm()


def test_orthogonal_parameters_are_declared_on_the_class():
    assert ShiftBlock.orthogonal == ("rotation", "mixing", "product")
    assert copy.deepcopy(_block(4, (2, 2), 1, 2)).orthogonal == ShiftBlock.orthogonal


def test_bad_sizes_are_refused():
    with pytest.raises(
        ValueError, match=r"`group` must be between 0 and a quarter of the 8 channels, got 3\."
    ):
        ShiftBlock(8, (2, 2), group=3, folded=0)
    with pytest.raises(ValueError, match=r"`folded` must be between 0 and the 8 channels, got 9\."):
        ShiftBlock(8, (2, 2), group=1, folded=9)
    with pytest.raises(ValueError, match="got -1"):
        ShiftBlock(8, (2, 2), group=-1, folded=0)
