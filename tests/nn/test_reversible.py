import pytest
import torch
from helpers import rotations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipnext.core.network import in_turn
from lipnext.nn import reversible
from lipnext.nn.block import ShiftBlock
from lipnext.nn.reversible import pack_signs, run_reversibly, unpack_signs


def chain(depth: int, channels: int, dtype: torch.dtype, drift: float = 0.0) -> nn.ModuleList:
    """Blocks with every weight away from its start, and matrices that are `drift` away from orthogonal."""
    rng = torch.Generator().manual_seed(depth)
    blocks = nn.ModuleList()
    for number in range(depth):
        block = ShiftBlock(
            channels,
            (2, 3),
            group=channels // 8,
            folded=channels // 2 + 1,
            each=number % 2 == 1,
            generator=rng,
        )
        with torch.no_grad():
            block.mixing.copy_(rotations(n=channels, seed=number))
            for weight in (block.mixing, block.rotation):
                noise = torch.randn(channels, channels, generator=rng, dtype=weight.dtype)
                weight.add_(drift * noise / channels**0.5)
            block.position.copy_(torch.randn(block.position.shape, generator=rng, dtype=torch.float64) / 10)
            block.bias.copy_(torch.randn(channels, generator=rng, dtype=torch.float64) / 10)
        blocks.append(block)
    return blocks.to(dtype)


def inputs(channels: int, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(5, 2, 3, channels, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(blocks: nn.ModuleList, run, autocast: bool = False) -> list[Tensor]:
    tokens = inputs(blocks[0].channels, blocks[0].bias.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = run(list(blocks), tokens)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out.double() * weight).sum(), [tokens, *blocks.parameters()])]


def furthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative distance of two lists of tensors, tensor by tensor."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    return max((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item() for a, b in pairs)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_signs_survive_packing(rows: int, columns: int, seed: int) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed = pack_signs(values)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-rows * columns // 8)
    assert torch.equal(unpack_signs(packed, (rows, columns), values.dtype), values.sign())


def test_every_byte_is_packed_as_itself() -> None:
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    assert torch.equal(pack_signs(0.5 - bits.double()), torch.arange(256).to(torch.uint8))


# Float64: restored inputs carry the roundings of some 10 products of 16 terms a block. Float32: the bar of the project.
@pytest.mark.parametrize(
    ("dtype", "depth", "bar"),
    [(torch.float64, 8, 1e-13), (torch.float32, 8, 1e-5), (torch.float32, 32, 1e-5)],
)
def test_gradients_of_a_chain_run_backwards_are_those_of_the_usual_path(dtype, depth, bar) -> None:
    blocks = chain(depth, 16, dtype)
    usual, backwards = gradients(blocks, in_turn), gradients(blocks, run_reversibly)
    assert torch.equal(usual[0], backwards[0])
    assert furthest(backwards, usual) < bar


def test_weights_that_drifted_off_the_manifold_are_undone_exactly_enough(monkeypatch) -> None:
    """At 1e-5 from orthogonal, what an epoch of float32 may leave: the correction squares that, the transpose would not."""
    blocks = chain(32, 16, torch.float32, drift=1e-5)
    usual = gradients(blocks, in_turn)
    assert furthest(gradients(blocks, run_reversibly), usual) < 1e-5
    monkeypatch.setattr("lipnext.nn.block._undone", lambda matrix: matrix)  # planted: the transpose
    assert furthest(gradients(blocks, run_reversibly), usual) > 3e-5


def test_half_precision_is_no_further_from_the_truth_than_the_usual_path() -> None:
    blocks = chain(32, 16, torch.float32)
    truth = gradients(blocks, in_turn)[1:]
    usual = gradients(blocks, in_turn, autocast=True)[1:]
    backwards = gradients(blocks, run_reversibly, autocast=True)[1:]
    assert furthest(backwards, truth) < 1.2 * furthest(usual, truth)


def test_a_materialised_chain_and_a_second_backward_pass() -> None:
    blocks = nn.ModuleList([block.materialise() for block in chain(3, 16, torch.float64)])
    assert furthest(gradients(blocks, run_reversibly), gradients(blocks, in_turn)) < 1e-13
    out = run_reversibly(list(blocks), inputs(16, torch.float64)).square().sum()
    first = torch.autograd.grad(out, list(blocks.parameters()), retain_graph=True)
    again = torch.autograd.grad(out, list(blocks.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_weight_that_changed_before_the_backward_pass_is_noticed() -> None:
    blocks = chain(2, 8, torch.float64)
    out = run_reversibly(list(blocks), inputs(8, torch.float64)).sum()
    with torch.no_grad():
        blocks[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_gradients_of_the_last_weights_come_first() -> None:
    """So that they can travel to other processes while the rest is still being computed."""
    blocks, order = chain(3, 8, torch.float64), []
    for number, block in enumerate(blocks):
        block.rotation.register_post_accumulate_grad_hook(lambda _, number=number: order.append(number))
    run_reversibly(list(blocks), inputs(8, torch.float64)).sum().backward()
    assert order == [2, 1, 0]


def test_a_wrong_sign_is_seen(monkeypatch) -> None:
    """Planted: bits of the other order."""
    blocks = chain(2, 16, torch.float64)
    usual = gradients(blocks, in_turn)
    monkeypatch.setattr(reversible, "_BIT_OF_BYTE", 0x0102040810204080)
    assert furthest(gradients(blocks, run_reversibly), usual) > 1e-2
