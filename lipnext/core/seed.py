"""Randomness that follows from keys alone."""

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator

import numpy as np
import torch

from lipnext.core.errors import ConfigError


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch inside the block and put back what was there.

    Args:
        seed: 0 to 2**32 - 1, the range of NumPy's generator.

    Raises:
        ConfigError: where the seed is outside that range.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed must lie in 0..{2**32 - 1}, got {seed}")
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # A process that has not touched CUDA must not start to because of a seed.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def generator(*keys: int | str) -> torch.Generator:
    """Return a CPU generator that depends on the keys alone, equal in every process and version of Python.

    The randomness of a batch is `generator(seed, "augment", epoch, batch)`: a resumed run and any number of
    workers derive it again without any state.

    Args:
        keys: integers and strings; 1 and "1" are different keys.
    """
    digest = hashlib.sha256(json.dumps(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
