"""The systems: one file, one system, one record, found by the name of its file, imported when asked for."""

import importlib
import inspect
import pkgutil
from typing import cast

from lipnext.core.errors import ConfigError, nearest
from lipnext.core.experiment import Experiment
from lipnext.core.network import LipschitzNetwork
from lipnext.core.system import System

HOME = "lipnext"
"""The system that an experiment without a system's name belongs to, where it has one of that name."""


def list_systems() -> list[str]:
    """Names of all systems, without importing any of them."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in names if not name.startswith("_"))


def get(name: str) -> System:
    """Return the record of a system.

    Raises:
        ConfigError: for an unknown name, with the nearest one.
    """
    if name not in list_systems():
        raise ConfigError(f"unknown system '{name}'; {nearest(name, list_systems())}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    system: System = module.SYSTEM
    return system


def experiment(name: str) -> Experiment:
    """Return a named experiment: "system/experiment", or just "experiment" where it is LipNeXt's or only one system has it.

    Raises:
        ConfigError: for an unknown or ambiguous name.
    """
    system, _, wanted = name.rpartition("/")
    if not system and wanted in get(HOME).experiments:
        return get(HOME).experiments[wanted]()
    candidates = {
        f"{key}/{title}": make
        for key in ([system] if system else list_systems())
        for title, make in get(key).experiments.items()
    }
    matches = [make for title, make in candidates.items() if title.partition("/")[2] == wanted]
    if len(matches) > 1:
        raise ConfigError(f"'{name}' names an experiment of several systems; write system/{wanted}")
    if not matches:
        # ten systems have a hundred experiments; a name alone is most likely meant for one of LipNeXt's
        known = candidates if system else [key for key in candidates if key.startswith(f"{HOME}/")]
        raise ConfigError(f"unknown experiment '{name}'; {nearest(name, known)}")
    return matches[0]()


def build_network(
    experiment: Experiment, input_shape: tuple[int, int, int], classes: int
) -> LipschitzNetwork:
    """Build the experiment's network for images of a shape, initialised from the experiment's seed.

    Raises:
        ConfigError: for an unknown model key, with the nearest one, or a value that the system refuses.
    """
    build = get(experiment.system).build
    given = ("input_shape", "classes", "seed")
    known = {
        name: p.annotation for name, p in inspect.signature(build).parameters.items() if name not in given
    }
    for key, value in experiment.model.items():
        if key not in known:
            raise ConfigError(f"model.{key}: unknown key; {nearest(key, known)}")
        if not _fits(value, known[key]):
            raise ConfigError(f"model.{key}: must be {_KINDS[known[key]]}, got {value!r}")
    network = build(input_shape=input_shape, classes=classes, seed=experiment.seed, **experiment.model)
    return cast(LipschitzNetwork, network)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _fits(value: bool | int | float | str, kind: object) -> bool:
    """Whether a value may stand for an argument annotated so; any other annotation is `build`'s business."""
    if kind not in _KINDS:
        return True
    return type(value) is kind or (kind is float and type(value) is int)
