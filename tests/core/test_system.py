"""The record of a system checks itself."""

from typing import Any

import pytest
from torch import nn

from lipnext.core.errors import ConfigError, UnsoundError
from lipnext.core.system import System


def system(**changes: Any) -> System:
    fields: dict[str, Any] = {
        "summary": "a system",
        "reference": "nobody, 2026",
        "norm": 2.0,
        "build": nn.Linear,
        "certify": lambda net: lambda images: None,
        "presets": {"tiny": {}},
        "experiments": {},
    }
    return System(**(fields | changes))


def test_a_complete_record_is_frozen() -> None:
    record = system()
    assert record.losses == {}
    assert record.published is None
    with pytest.raises(AttributeError):
        record.summary = "other"  # type: ignore[misc]


def test_unusable_records_are_refused() -> None:
    with pytest.raises(ConfigError, match="summary must be one line, got 'a\\\\nb'"):
        system(summary="a\nb")
    with pytest.raises(ConfigError, match="needs a preset 'tiny' for the tests, got: huge"):
        system(presets={"huge": {}})
    with pytest.raises(UnsoundError, match=r"the norm must be 2\.0 or inf, got 3"):
        system(norm=3)
