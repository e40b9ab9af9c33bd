"""Randomness follows from keys, in every process, and nothing leaks out of a seeded block."""

import random

import numpy as np
import pytest
import torch

from lipnext.core.errors import ConfigError
from lipnext.core.seed import generator, seeded


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_seeded_repeats_and_restores() -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with seeded(7):
        first = draw()
    with seeded(7):
        second = draw()
    with seeded(8):
        other = draw()
    assert first == second
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]


def test_seeded_restores_after_an_error() -> None:
    state = torch.get_rng_state()

    def interrupted() -> None:
        with seeded(1):
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"seed must lie in 0\.\.4294967295, got {seed}"), seeded(seed):
        pass


def test_generators_differ_by_every_key_and_its_type() -> None:
    keys = [(0,), (1,), ("1",), (1, 0), (0, 1), (1, "0"), ("1,0",), (0, "order", 1), (0, "order", 2), ()]
    draws = {torch.rand(4, generator=generator(*key)).sum().item() for key in keys}
    assert len(draws) == len(keys)


def test_generator_is_the_same_for_ever() -> None:
    # A change of this number changes every training run that is resumed.
    assert generator(3, "augment", 1, 2).initial_seed() == 8496042718124064745
