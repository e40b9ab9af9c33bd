"""Sizes of two-dimensional windows as torch takes them: one integer for both axes, or a pair."""

from lipnext.core.errors import ConfigError

Pair = int | tuple[int, int]


def as_pair(name: str, value: object, least: int) -> tuple[int, int]:
    """Return the values of both axes.

    Raises:
        ConfigError: unless it is an integer of at least `least`, or two of them.
    """
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(is_integer(v) and v >= least for v in pair):
        raise ConfigError(f"{name} must be an integer of at least {least} or a pair of them, got {value!r}")
    return pair[0], pair[1]


def is_integer(value: object) -> bool:
    """True for an int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
