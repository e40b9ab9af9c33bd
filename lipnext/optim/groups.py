"""Which parameters live on the orthogonal group and which are Euclidean, read off the layers' classes."""

from torch import nn

from lipnext.core.errors import ConfigError
from lipnext.core.module import LipschitzModule


def split_parameters(net: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split all parameters into orthogonal and Euclidean ones, by name in the order of the modules.

    A parameter belongs to the orthogonal group if the class of its layer lists it in `orthogonal`; the others of a
    `LipschitzModule` are Euclidean.

    Raises:
        ConfigError: if a parameter's owner is no `LipschitzModule` (no one says which group it belongs to), or
            if one declared orthogonal is not square.
    """
    orthogonal: dict[str, nn.Parameter] = {}
    euclidean: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if not isinstance(module, LipschitzModule):
                raise ConfigError(
                    f"no optimiser group matches parameter {full} of a {type(module).__name__}; derive the layer "
                    "from LipschitzModule and list its orthogonal matrices in `orthogonal`"
                )
            if name not in module.orthogonal:
                euclidean[full] = parameter
                continue
            if parameter.dim() < 2 or parameter.shape[-1] != parameter.shape[-2]:
                raise ConfigError(
                    f"{full} is declared orthogonal but has shape {tuple(parameter.shape)}; only square matrices are"
                )
            orthogonal[full] = parameter
    return orthogonal, euclidean
