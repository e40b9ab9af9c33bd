"""Networks of neighbouring libraries with what their layers compute made plain: deel-torchlip and orthogonium.

Their layers derive a weight from others at every call, by power iteration and orthogonalisation, and call the result
1-Lipschitz. `plain` stores the derived weights once, in ordinary layers of torch; what is proved about those
holds whatever the derivation has converged to. Neither library is imported: layers are known by their class's home.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lipnext.certificates.activations import GroupSort, MaxMin, MaxMinReLU
from lipnext.core.errors import UnsoundError


def plain(net: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
    """Return a copy in evaluation mode, made of layers that `certify_module` understands.

    Derived weights of `Linear` and `Conv2d` are stored, sorting activations and scaled poolings are replaced. Everything
    else stays as it is, and is refused later if it is not understood. The copy is compared with the network itself.

    Args:
        net: a network of deel-torchlip or orthogonium layers, or any with parametrised weights.
        input_shape: (C, H, W), for the comparison.

    Raises:
        UnsoundError: where a layer cannot be made plain, or copy and network differ by more than float32 rounding explains.
    """
    net = copy.deepcopy(net).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about layers of other libraries among their own
        converted = _convert(copy.deepcopy(net)).eval()
        generator = torch.Generator().manual_seed(0)
        images = torch.rand((4, *input_shape), generator=generator)
        like = next((p for p in converted.parameters()), images)
        images = images.to(like.device, like.dtype)
        ours, theirs = converted(images), net(images)
    close = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    if not close:
        raise UnsoundError(
            f"the plain copy of {type(net).__name__} gives other logits; replace its unusual layers by hand"
        )
    return converted


class Scaled(nn.Module):
    """A layer whose result is multiplied by a number."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer = layer
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and multiply."""
        return self.layer(x) * self.factor


def _convert(module: nn.Module) -> nn.Module:
    home, name = type(module).__module__.split(".")[0], type(module).__name__
    replace = _REPLACEMENTS.get((home, name))
    if replace is not None:
        return replace(module)
    for kind, make in ((nn.Linear, _linear), (nn.Conv2d, _convolution)):
        # A weight that is no parameter is derived at every call.
        if isinstance(module, kind) and module._parameters.get("weight") is None:
            return make(module)
    for name, child in list(module.named_children()):
        setattr(module, name, _convert(child))
    return module


def _linear(module: Any) -> nn.Module:
    _check_forward(module, "torch.nn.modules.linear")
    weight = module.weight
    made = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=weight.dtype)
    return _filled(made, module)


def _convolution(module: Any) -> nn.Module:
    _check_forward(module, "torch.nn.modules.conv", "deel.torchlip.modules.unconstrained")
    mode = getattr(module, "old_padding_mode", module.padding_mode)
    if mode.lower() == "symmetric":
        raise UnsoundError("a convolution with symmetric padding has no proved bound; use zeros or circular")
    made = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.bias is not None,
        mode,
        dtype=module.weight.dtype,
    )
    return _filled(made, module)


def _filled(made: nn.Linear | nn.Conv2d, module: Any) -> nn.Module:
    """Store the weight that a layer derives at this moment, and its bias."""
    made.weight = nn.Parameter(module.weight.detach().clone())
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().clone())
    return made


def _check_forward(module: nn.Module, *homes: str) -> None:
    """Refuse layers that do more with their weight than the layer they are derived from."""
    if type(module).forward.__module__ not in homes:
        raise UnsoundError(f"{type(module).__name__} has a forward of its own; replace it by a plain layer")


def _torchlip_sort(module: Any) -> nn.Module:
    return _scaled(GroupSort(module.group_size), module)


def _torchlip_max_min(module: Any) -> nn.Module:
    if module._dim not in (None, 1):
        raise UnsoundError(f"MaxMin along dimension {module._dim} is not understood; use dimension 1")
    return _scaled(MaxMinReLU(), module)


def _scaled(layer: nn.Module, module: Any) -> nn.Module:
    factor = module._coefficient_lip
    return layer if factor == 1 else Scaled(layer, float(factor))


def _orthogonium_max_min(module: Any) -> nn.Module:
    if module.axis != 1:
        raise UnsoundError(f"MaxMin along dimension {module.axis} is not understood; use dimension 1")
    return MaxMin()


_REPLACEMENTS: dict[tuple[str, str], Callable[[Any], nn.Module]] = {
    ("deel", "GroupSort"): _torchlip_sort,
    ("deel", "GroupSort2"): _torchlip_sort,
    ("deel", "FullSort"): _torchlip_sort,
    ("deel", "MaxMin"): _torchlip_max_min,
    ("orthogonium", "MaxMin"): _orthogonium_max_min,
}
