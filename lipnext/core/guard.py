"""What must hold before anything is certified. Every check refuses; none warns or repairs.

The error bounds behind a certificate assume the standard model of floating-point arithmetic: every product
and sum rounded once, to the full precision of its type, subnormal numbers kept. Each setting that breaks it
is looked for, and a matrix product with a known answer is computed as a last resort.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from lipnext.core.errors import DataError, UnsoundError

# Bits of the significand, the implicit one included.
PRECISION = {torch.float32: 24, torch.float64: 53}


def check_certifiable(module: nn.Module) -> None:
    """Refuse a network or an environment whose computed numbers the error bounds do not cover.

    Args:
        module: the network, in eval mode, with float32 or float64 weights.

    Raises:
        UnsoundError: for train mode, autocast, TF32 or other reduced precision, flushed subnormal numbers,
            weights in half precision or not finite, or a matrix product that fails its known answer; the
            message says which and what to do.
    """
    _check_eval(module)
    _check_forward(module)
    _check_weights(module)
    tensors = [tensor for _, tensor in _floating_tensors(module)]
    devices = {tensor.device for tensor in tensors} | {torch.device("cpu")}
    _check_precision_settings(on_cuda=any(device.type == "cuda" for device in devices))
    _check_subnormal()
    for device in sorted(devices, key=str):
        for dtype in {torch.float64} | {tensor.dtype for tensor in tensors}:
            selftest_matmul(dtype, device)


def check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    """Refuse everything that is not a batch of images of the given shape in [0, 1].

    Args:
        images: float32 or float64 (n, C, H, W), n >= 0.
        shape: (C, H, W).

    Raises:
        DataError: one line that says what came and what is allowed.
    """
    wanted = f"(n, {shape[0]}, {shape[1]}, {shape[2]})"
    if not isinstance(images, Tensor):
        raise DataError(f"images must be a tensor of shape {wanted}, got {type(images).__name__}")
    if images.dtype == torch.uint8:
        raise DataError("images must be float32 or float64 in [0, 1], got uint8; divide by 255")
    if images.dtype not in PRECISION:
        raise DataError(f"images must be float32 or float64, got {images.dtype}; convert them first")
    if images.dim() == 3 and tuple(images.shape) == tuple(shape):
        raise DataError(f"images must be a batch {wanted}, got one image; use images[None]")
    if images.dim() != 4 or tuple(images.shape[1:]) != tuple(shape):
        raise DataError(f"images must have the shape {wanted}, got {tuple(images.shape)}")
    if images.numel() == 0:
        return
    if not bool(torch.isfinite(images).all()):
        raise DataError("images must be finite, got NaN or infinity")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise DataError(
            f"images must lie in [0, 1], got values from {low:g} to {high:g}; divide 8-bit values by "
            "255 and leave out mean and standard deviation"
        )


def selftest_matmul(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Compute matrix products of integers whose answer is known exactly, and compare bit for bit.

    With entries below 2^a and 2^b and 32 = 2^5 terms, every partial sum lies below 2^(a+b+5) = 2^p and is
    exact in any order, p being the precision of the type. Entries of up to p - 6 significant bits lose theirs
    in TF32, bfloat16 and split products that keep less.

    Args:
        dtype: float32 or float64.
        device: where to compute.

    Raises:
        UnsoundError: where a product is off.
    """
    bits = PRECISION[dtype] - 5
    generator = torch.Generator().manual_seed(0)
    for left_bits in (1, bits // 2, bits - 1):
        left = _odd_integers((64, 32), left_bits, generator)
        right = _odd_integers((32, 64), bits - left_bits, generator)
        product = left.to(device, dtype) @ right.to(device, dtype)
        if not torch.equal(product.cpu(), (left @ right).to(dtype)):
            raise UnsoundError(
                f"a {dtype} matrix product on {device} is not exact where it must be; no error bound holds; "
                "switch off reduced precision (TF32, bfloat16, emulation) or certify on another device"
            )


def _odd_integers(shape: tuple[int, int], bits: int, generator: torch.Generator) -> Tensor:
    """Draw int64 entries of either sign, odd so that the lowest bit counts, of size below 2^bits."""
    size = torch.randint(2 ** (bits - 1), 2**bits, shape, generator=generator, dtype=torch.int64) | 1
    sign = 1 - 2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int64)
    return size * sign


def _check_eval(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if part.training:
            raise UnsoundError(
                f"cannot certify in train mode ({name or type(part).__name__} is); call .eval() first"
            )


def _check_forward(module: nn.Module) -> None:
    """What runs must be what the class says: no hooks, no replaced `forward`, no parametrisation."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise UnsoundError(
            "cannot certify with global forward hooks, which may change any output; remove them"
        )
    for name, part in module.named_modules():
        where = name or type(part).__name__
        if part._forward_hooks or part._forward_pre_hooks:
            raise UnsoundError(
                f"cannot certify {where}: it has forward hooks, which may change its output; remove them"
            )
        if "forward" in vars(part):
            raise UnsoundError(
                f"cannot certify {where}: its forward has been replaced; use a class of its own"
            )
        if parametrize.is_parametrized(part):
            raise UnsoundError(
                f"cannot certify {where}: its weights are parametrised; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )


def _floating_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for named in (module.named_parameters(), module.named_buffers()):
        yield from ((name, t) for name, t in named if t.is_floating_point() or t.is_complex())


def _check_weights(module: nn.Module) -> None:
    for name, tensor in _floating_tensors(module):
        if tensor.dtype not in PRECISION:
            raise UnsoundError(
                f"cannot certify {name} in {tensor.dtype}; store the weights in float32 or float64, "
                "such as net.float()"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise UnsoundError(f"cannot certify: {name} holds NaN or infinity; load a good checkpoint")


def _check_precision_settings(on_cuda: bool) -> None:
    """Refuse autocast and every setting that lets products keep fewer bits than their type; cheap.

    Raises:
        UnsoundError: naming the setting and what to do.
    """
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise UnsoundError(f"cannot certify under autocast ({device}); leave the torch.autocast block")
    # torch refuses to answer where its old and new settings are mixed; then the state counts as reduced.
    if _setting(torch.get_float32_matmul_precision) != "highest":
        raise UnsoundError(
            "cannot certify with reduced float32 products; call torch.set_float32_matmul_precision('highest')"
        )
    if _setting(lambda: torch.backends.cuda.matmul.allow_tf32) is not False:
        raise UnsoundError("cannot certify with TF32; set torch.backends.cuda.matmul.allow_tf32 = False")
    if on_cuda and _setting(lambda: torch.backends.cudnn.allow_tf32) is not False:
        raise UnsoundError("cannot certify with TF32; set torch.backends.cudnn.allow_tf32 = False")
    for place in ("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"):
        owner: Any = torch.backends
        for part in place.split("."):
            owner = getattr(owner, part, None)
        # Older versions of torch have no such setting and always compute in full precision.
        if getattr(owner, "fp32_precision", "none") not in ("none", "ieee"):
            setting = f"torch.backends.{place}.fp32_precision"
            raise UnsoundError(f"cannot certify with reduced float32 products; set {setting} = 'ieee'")


def _setting(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None


def _check_subnormal() -> None:
    # Bit patterns, because a comparison of floats flushes its operands as well: 16 is 2^-1070, 8 is 2^-1071.
    subnormal = torch.full((64,), 16, dtype=torch.int64).view(torch.float64)
    if not bool(((subnormal * 0.5).view(torch.int64) == 8).all()):
        raise UnsoundError(
            "cannot certify while subnormal numbers are flushed to zero; call torch.set_flush_denormal(False)"
        )


def fast_convolution(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a convolution may not be a plain sum of products, or return None.

    Winograd and FFT round in a way that no order of summation explains; NNPACK uses them in float32.
    """
    if device.type != "cpu":
        return "convolutions on a GPU may be computed by Winograd or FFT; move the net to the CPU"
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if dtype == torch.float32 and not has_onednn:
        return "without oneDNN, torch may convolve by Winograd in float32; use float64"
    return None


def refuse_fast_convolution(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to bound the rounding of a convolution that may be computed so.

    Raises:
        UnsoundError: with what `fast_convolution` says.
    """
    problem = fast_convolution(device, dtype)
    if problem is not None:
        raise UnsoundError(problem)
