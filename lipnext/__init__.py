"""Image classifiers with a proof: next to every label a radius that no change of the image can beat."""

import importlib
from typing import TYPE_CHECKING, Any

from lipnext._version import __version__ as __version__

if TYPE_CHECKING:
    from lipnext.certificates.module import certify_module as certify_module
    from lipnext.core.certificate import Certificate as Certificate
    from lipnext.core.classifier import Classifier as Classifier
    from lipnext.core.experiment import Experiment as Experiment
    from lipnext.runs import load as load
    from lipnext.runs import train as train
    from lipnext.systems import list_systems as list_systems

# Imported when asked for: torch takes seconds, and `lipnext --help` needs none of it.
_HOMES = {
    "Certificate": "lipnext.core.certificate",
    "Classifier": "lipnext.core.classifier",
    "Experiment": "lipnext.core.experiment",
    "certify_module": "lipnext.certificates.module",
    "list_systems": "lipnext.systems",
    "load": "lipnext.runs",
    "train": "lipnext.runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lipnext' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *_HOMES]
