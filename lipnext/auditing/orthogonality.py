"""How far stored matrices are from orthogonal, measured by LAPACK in float64 and none of our own routines."""

import torch
from torch import Tensor, nn

from lipnext.core.errors import DataError
from lipnext.core.module import LipschitzModule


def gram_residual(weight: Tensor) -> Tensor:
    """Return `||W^T W - I||_2` of matrices (..., m, n), float64 (...).

    A measurement, not a bound: it carries the rounding error of a float64 product and of the eigenvalues,
    about `n 1e-16`.

    Raises:
        DataError: where the matrices are not finite or not matrices.
    """
    matrix = _checked(weight)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # Eigenvalues of the symmetric residual; a singular value solver may not converge on so many equal ones.
    return torch.linalg.eigvalsh(matrix.mT @ matrix - identity).abs().amax(dim=-1)


def singular_values(weight: Tensor) -> Tensor:
    """Return the singular values of matrices (..., m, n), float64 (..., min(m, n)), the largest first.

    Raises:
        DataError: where the matrices are not finite or not matrices.
    """
    return torch.linalg.svdvals(_checked(weight))


def residuals(net: nn.Module) -> dict[str, float]:
    """Return the residual of every parameter that its layer's class declares orthogonal, by its full name.

    A stack of matrices is represented by its worst one. A parameter that a layer has dropped (`None`) is
    left out.

    Raises:
        DataError: where a weight is not finite.
    """
    found: dict[str, float] = {}
    for path, module in net.named_modules():
        declared = module.orthogonal if isinstance(module, LipschitzModule) else ()
        for name in declared:
            parameter = getattr(module, name)
            if parameter is not None:
                found[f"{path}.{name}".lstrip(".")] = gram_residual(parameter).max().item()
    return found


def _checked(weight: Tensor) -> Tensor:
    if weight.dim() < 2 or weight.numel() == 0:
        raise DataError(f"orthogonality needs matrices (..., m, n), got shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise DataError("orthogonality cannot be measured: the matrix holds NaN or infinity")
    return weight.detach().double()
