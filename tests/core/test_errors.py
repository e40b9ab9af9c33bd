"""Hints name the closest key, and every error has an exit code for the command line."""

from lipnext.core.errors import (
    CheckError,
    ConfigError,
    LipnextError,
    TrainingError,
    UnsoundError,
    ViolationError,
    nearest,
)


def test_nearest_leads_with_the_closest_name_and_lists_all() -> None:
    assert nearest("epoch", ["lr", "epochs"]) == "did you mean 'epochs'? known: epochs, lr"
    assert nearest("zzz", ["lr", "epochs"]) == "known: epochs, lr"


def test_exit_codes() -> None:
    errors = (CheckError, LipnextError, ConfigError, UnsoundError, TrainingError, ViolationError)
    assert [e.exit_code for e in errors] == [1, 2, 2, 3, 4, 5]
