"""LipNeXt's Triton kernels, in Triton's interpreter on the CPU, against the equations written out, and the plain block."""

import os

import pytest
import torch
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, which nothing does before the tests run
pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from lipnext.nn import block as block_module
from lipnext.nn import shift_triton
from lipnext.nn.block import ShiftBlock
from lipnext.nn.triton_dispatch import usable

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slow_shift(x: Tensor, group: int, sign: int) -> Tensor:
    """Pixel by pixel: down, up, right, left."""
    y, (height, width) = x.clone(), x.shape[1:3]
    for i, (down, right) in enumerate([(1, 0), (-1, 0), (0, 1), (0, -1)]):
        part = slice(i * group, (i + 1) * group)
        for h in range(height):
            for w in range(width):
                y[:, (h + sign * down) % height, (w + sign * right) % width, part] = x[:, h, w, part]
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("shape", "group"),
    [((2, 3, 5, 9), 2), ((1, 1, 1, 4), 1), ((1, 2, 4, 300), 70), ((2, 4, 1, 13), 3), ((1, 2, 2, 3), 0)],
)
def test_the_shift_moves_every_pixel_by_one(
    shape: tuple[int, ...], group: int, sign: int, dtype: torch.dtype
) -> None:
    x = random(*shape, seed=1, dtype=dtype)
    y = x.clone()
    shift_triton.shift_(y, group, sign)
    assert torch.equal(y, slow_shift(x, group, sign))


# More rows and channels than one tile, and fewer.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels", "folded"), [(5, 7, 3), (70, 130, 65), (3, 4, 4), (3, 4, 0)])
def test_beta_abs_and_its_gradient(rows: int, channels: int, folded: int, dtype: torch.dtype) -> None:
    v, grad = random(rows, channels, seed=1, dtype=dtype), random(rows, channels, seed=2, dtype=dtype)
    v[0, 0], v[1, 0] = 0.0, -0.0
    expected, slope = v.clone(), torch.ones(rows, channels, dtype=dtype)
    expected[:, :folded] = v[:, :folded].abs()
    slope[:, :folded][v[:, :folded] < 0] = -1
    kept = shift_triton.fold_(v, folded)
    assert torch.equal(v, expected)
    assert not v[:, :folded].signbit().any()
    assert kept.dtype == torch.int8
    assert torch.equal(kept.to(dtype), slope[:, :folded])
    # The gradient may come as a view.
    gv, gbias = shift_triton.unfolded(grad.mT.contiguous().mT, kept)
    assert torch.equal(gv, grad * slope)
    # A float32 sum of 70 terms below 4; in bfloat16 it is then rounded to 8 bits, and is below 64.
    tolerance = 1e-4 if dtype == torch.float32 else 0.125
    assert gbias.dtype == dtype
    torch.testing.assert_close(gbias.double(), (grad * slope).double().sum(0), rtol=0, atol=tolerance)


def step(block: ShiftBlock, tokens: Tensor, dy: Tensor) -> list[Tensor]:
    """The output and the gradients of the tokens and of all weights."""
    tokens = tokens.clone().requires_grad_()
    y = block(tokens)
    y.backward(dy)
    grads = [tokens.grad, *(p.grad for p in block.parameters())]
    block.zero_grad()
    return [y.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each", [False, True])
def test_a_block_in_training_is_the_plain_block_and_nothing_else_is_touched(
    dtype: torch.dtype, each: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.dtype, ...]] = []

    def everywhere(x: Tensor, *dtypes: torch.dtype) -> bool:
        asked.append(dtypes)
        return x.dtype in dtypes

    block = ShiftBlock(
        9, (3, 4), group=2, folded=5, each=each, generator=torch.Generator().manual_seed(1)
    ).to(dtype)
    with torch.no_grad():
        block.position.copy_(random(*block.position.shape, seed=2))
        block.bias.copy_(random(9, seed=3))
    tokens, dy = random(2, 3, 4, 9, seed=4, dtype=dtype), random(2, 3, 4, 9, seed=5, dtype=dtype)
    plain = step(block, tokens, dy)
    monkeypatch.setattr(block_module, "usable", everywhere)
    with monkeypatch.context() as patched:
        patched.setattr(block_module, "shift_", lambda *given: pytest.fail("torch's shift was taken"))
        found = step(block, tokens, dy)
    assert asked == [tuple(DTYPES)]
    assert len(found) == len(plain) == 6
    # All are the same operations on the same numbers, but for the sum of the gradient of the bias, 24 terms.
    for a, b in zip(plain[:-1], found[:-1], strict=True):
        assert torch.equal(a, b)
    tolerance = 1e-5 if dtype == torch.float32 else 0.25
    torch.testing.assert_close(found[-1], plain[-1], rtol=0, atol=tolerance)
    # What is evaluated, and with it what is certified, keeps torch's operations.
    monkeypatch.setattr(shift_triton, "fold_", lambda *given: pytest.fail("Triton was taken"))
    assert torch.equal(block.eval()(tokens), plain[0])


def test_tokens_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(ValueError, match="must be contiguous"):
        shift_triton.shift_(torch.zeros(1, 4, 2, 2).permute(0, 2, 3, 1), 1)
    with pytest.raises(ValueError, match="must be contiguous"):
        shift_triton.fold_(torch.zeros(4, 2).mT, 1)


def test_a_cpu_and_tensors_without_memory_keep_torch() -> None:
    assert not usable(torch.zeros(2), torch.float32)
    assert not usable(torch.zeros(2, device="meta"), torch.float32)
