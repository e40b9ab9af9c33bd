import importlib
from pathlib import Path
from types import ModuleType

import pytest

from lipnext import systems
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import Experiment
from lipnext.core.system import System


def test_every_file_is_a_system_and_listing_imports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> ModuleType:
        raise AssertionError(f"imported {name}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    folder = Path(systems.__file__).parent
    files = [path.stem.replace("_", "-") for path in folder.glob("*.py") if path.stem != "__init__"]
    assert systems.list_systems() == sorted(files)
    assert "lipnext" in systems.list_systems()


def test_a_system_is_found_by_its_name() -> None:
    assert isinstance(systems.get("lipnext"), System)


def test_an_unknown_system_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown system 'lipnexd'; did you mean 'lipnext'\? known: .*lipnext"
    ):
        systems.get("lipnexd")


def test_a_new_file_is_a_new_system(new_system: str) -> None:
    assert new_system in systems.list_systems()
    assert systems.get(new_system).summary == "the eleventh"


def test_an_experiment_is_found_with_and_without_its_system() -> None:
    full = systems.experiment("lipnext/digits")
    assert isinstance(full, Experiment)
    assert full.system == "lipnext"
    assert systems.experiment("digits") == full


def test_an_unknown_experiment_is_answered_with_the_nearest() -> None:
    for name in ("digit", "lipnext/digit"):
        with pytest.raises(ConfigError, match=rf"unknown experiment '{name}'; .*lipnext/digits"):
            systems.experiment(name)
    with pytest.raises(ConfigError, match="unknown system 'liresnext'"):
        systems.experiment("liresnext/digits")


def test_a_name_alone_is_lipnext_s_where_it_has_one_and_has_to_be_full_where_others_share_it(
    new_system: str,
) -> None:
    assert systems.experiment("digits").system == "lipnext"
    assert systems.experiment(f"{new_system}/digits").system == new_system
    with pytest.raises(
        ConfigError, match="'cifar10-xlarge' names an experiment of several systems; write system/cifar10"
    ):
        systems.experiment("cifar10-xlarge")
    assert systems.experiment(f"{new_system}/cifar10-xlarge").system == new_system


def test_a_network_is_built_from_an_experiment() -> None:
    experiment = systems.experiment("lipnext/digits").override(["model.width=16", "model.depth=1"])
    network = systems.build_network(experiment, (1, 8, 8), 10)
    assert network.input_shape == (1, 8, 8)
    assert network.head.weight.shape == (10, 16)


def test_an_unknown_model_key_is_answered_with_the_nearest() -> None:
    experiment = systems.experiment("lipnext/digits").override(["model.widht=16"])
    with pytest.raises(ConfigError, match=r"model.widht: unknown key; did you mean 'width'\?"):
        systems.build_network(experiment, (1, 8, 8), 10)


SOURCE = """
from lipnext.core.experiment import Experiment
from lipnext.core.system import System

SYSTEM = System(
    summary="the eleventh",
    reference="nowhere",
    norm=2.0,
    build=lambda **model: None,
    certify=lambda net: None,
    presets={"tiny": {}},
    experiments={name: lambda: Experiment(system="eleventh-system") for name in ("digits", "cifar10-xlarge")},
)
"""


@pytest.fixture
def new_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Drop one file beside the others, as a newcomer would."""
    import sys

    (tmp_path / "eleventh_system.py").write_text(SOURCE)
    monkeypatch.setattr(systems, "__path__", [*systems.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "lipnext.systems.eleventh_system", raising=False)
    importlib.invalidate_caches()
    return "eleventh-system"
