"""Triton where it is installed; without it the modules of kernels can still be imported, and nothing calls them.

Only those modules import this one, when a kernel is first needed: `import lipnext` never imports Triton.
"""

import contextlib
from typing import Any

tl: Any = None
jit: Any = lambda kernel: kernel  # noqa: E731

with contextlib.suppress(ImportError):
    import triton
    from triton import language

    tl, jit = language, triton.jit


def tiles(*counts_and_sizes: tuple[int, int]) -> tuple[int]:
    """Return the launch grid of one program a tile: the product of the numbers of tiles, in one dimension.

    Other dimensions of a grid are limited to 65535.
    """
    number = 1
    for count, size in counts_and_sizes:
        number *= -(-count // size)
    return (number,)
