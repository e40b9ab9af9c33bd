import math

import torch
from torch import Tensor

from lipnext.manifold.haar import haar

SAMPLES = 4000


def _statistics(q: Tensor) -> tuple[float, float, float]:
    """How far the means of trace, diagonal and determinant are from zero, in standard errors."""
    n = q.shape[-1]
    diagonal = torch.diagonal(q, dim1=-2, dim2=-1)
    root = math.sqrt(len(q))
    # Haar: the trace has variance 1, an entry 1/n, the determinant's sign 1
    trace = diagonal.sum(-1).mean().item() * root
    entry = diagonal.mean(0).abs().max().item() * root * math.sqrt(n)
    sign = torch.linalg.det(q).sign().mean().item() * root
    return abs(trace), abs(entry), abs(sign)


def test_samples_are_orthogonal():
    q = haar(12, 3, 2, generator=torch.Generator().manual_seed(0))
    assert q.shape == (3, 2, 12, 12)
    assert q.dtype == torch.float64
    # Householder QR: a few n u
    assert (q.mT @ q - torch.eye(12)).abs().max() < 20 * 12 * 2.0**-53


def test_dtype_is_a_rounding_of_the_same_sample():
    double = haar(5, generator=torch.Generator().manual_seed(1))
    single = haar(5, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    assert torch.equal(single, double.float())


def test_generator_decides():
    first, again, other = (haar(4, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_distribution_is_invariant_and_plain_qr_is_not():
    """4.5 standard errors at a fixed seed; the bare Q of LAPACK fails the same test by far."""
    generator = torch.Generator().manual_seed(0)
    assert max(_statistics(haar(3, SAMPLES, generator=generator))) < 4.5
    bare = torch.linalg.qr(torch.randn(SAMPLES, 3, 3, generator=generator)).Q
    assert max(_statistics(bare)) > 10


def test_both_components_are_reached():
    signs = torch.linalg.det(haar(4, 64, generator=torch.Generator().manual_seed(2))).sign()
    assert set(signs.tolist()) == {-1.0, 1.0}
