"""Random orthogonal matrices."""

import torch
from torch import Tensor


def haar(
    n: int, *batch: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Sample orthogonal `n x n` matrices from the Haar measure, shape `(*batch, n, n)`.

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q (Mezzadri 2007): without the
    signs the distribution is not uniform.
    """
    gaussian = torch.randn(*batch, n, n, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    signs = torch.diagonal(r, dim1=-2, dim2=-1).sign()
    return (q * signs.unsqueeze(-2)).to(dtype or torch.get_default_dtype()).contiguous()  # QR gives columns
