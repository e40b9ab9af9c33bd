"""Errors that own their sentence: what came, what is allowed, what to do, in one line.

The command line prints the sentence and exits with the class's `exit_code`; a traceback is for our own bugs.
"""

import difflib
from collections.abc import Iterable


class LipnextError(Exception):
    """Base of everything that is the caller's to mend; `str(error)` is one line."""

    exit_code = 2


class ConfigError(LipnextError):
    """A setting, name or command-line value that is not allowed."""


class DataError(LipnextError):
    """A data set or image that is missing, damaged or of the wrong form."""


class BundleError(LipnextError):
    """A saved model or checkpoint that is missing, damaged, or not the one asked for."""


class TrainingError(LipnextError):
    """Training that cannot go on: the loss is not finite, the disk is full."""

    exit_code = 4


class ViolationError(LipnextError):
    """A claim of a certificate that an audit has refuted: an attack, a steeper pair or a recount says otherwise."""

    exit_code = 5


class CheckError(LipnextError):
    """A check that was asked for and did not hold, such as `lipnext audit --min-cra`."""

    exit_code = 1


class UnsoundError(LipnextError):
    """A request that could put an unproved number into a certificate; always refused."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `known` as a sentence ending, led by the closest match to a mistyped `name` if there is one."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(known)}"
