"""Ratchets: what the package shows, and what it must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import lipnext
from lipnext.cli import app

ROOT = Path(lipnext.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
NAMES = [
    "Certificate",
    "Classifier",
    "Experiment",
    "__version__",
    "certify_module",
    "list_systems",
    "load",
    "train",
]
COMMANDS = {
    "systems": ["--json"],
    "train": ["what", "--out", "--data", "--set", "--tensorboard", "--no-tensorboard", "--json"],
    "certify": [
        "run",
        "--data",
        "--model",
        "--eps",
        "--semantics",
        "--arithmetic",
        "--records",
        "--images",
        "--json",
    ],
    "analyse": ["model", "--data", "--eps", "--samples", "--json"],
    "verify": ["run", "--images", "--records", "--samples", "--json"],
    "audit": [
        "run",
        "--data",
        "--samples",
        "--attacks",
        "--eps",
        "--out",
        "--html",
        "--min-cra",
        "--semantics",
        "--arithmetic",
        "--json",
    ],
    "plot": ["runs", "--out", "--training"],
    "export": ["run", "--to", "--out", "--dtype", "--sample", "--eps", "--data", "--json"],
    "push": ["run", "name", "--dry-run", "--out", "--json"],
    "zoo list": ["--json"],
    "zoo verify": ["names", "--data", "--json"],
    "compare": [
        "what",
        "--data",
        "--folder",
        "--minutes",
        "--epochs",
        "--seeds",
        "--set",
        "--eps",
        "--attacked",
        "--images",
        "--norm",
        "--nearest-neighbour",
        "--no-nearest-neighbour",
        "--out",
        "--figure",
        "--json",
    ],
    "plan": ["what", "--gpus", "--gpu", "--data", "--set", "--json"],
    "serve": ["run", "--host", "--port", "--abstain-below", "--token-file"],
    "doctor": ["model", "--shape", "--json"],
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_public_names_are_these() -> None:
    assert sorted(dir(lipnext)) == NAMES
    for name in NAMES:
        assert getattr(lipnext, name) is not None
    with pytest.raises(AttributeError, match="module 'lipnext' has no attribute 'trian'"):
        lipnext.trian  # noqa: B018


def test_the_verbs_and_their_options_are_these() -> None:
    group = typer.main.get_command(app)
    commands = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        verbs = getattr(command, "commands", None)
        commands |= (
            {name: command.params} if verbs is None else {f"{name} {v}": c.params for v, c in verbs.items()}
        )
    options = {
        name: [text for p in params for text in (*p.opts, *p.secondary_opts)]
        for name, params in commands.items()
    }
    assert options == COMMANDS
    assert [text for p in group.params for text in p.opts] == ["--version"]


def test_the_layers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

    # It would switch off every logger there is, also for the tests that come after this one.
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)
    config = ROOT.parent / "pyproject.toml"
    if not config.is_file():
        pytest.skip("the contracts are in the repository, not in an installed package")
    assert lint_imports(config_filename=str(config), no_cache=True) == EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_keeps_the_rules(path: Path) -> None:
    module, name = tree(path), name_of(path)
    if path.name != "__init__.py" or path.read_text().strip():
        assert ast.get_docstring(module), f"{name} has no docstring"
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            assert "lipnext" not in [alias.name for alias in node.names], f"{name} imports the root package"
        if isinstance(node, ast.ImportFrom) and node.module == "lipnext":
            # subpackages and modules may be imported so, the names of the root may not
            for alias in node.names:
                found = [ROOT / alias.name / "__init__.py", ROOT / f"{alias.name}.py"]
                assert any(p.is_file() for p in found), f"{name} imports lipnext.{alias.name} from the root"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not called.endswith(".cuda"), f"{name} calls .cuda()"
            if called == "print":
                assert name in ("cli.py", "training/progress.py", "verify.py"), f"{name} prints"


SCRIPT = """
import sys
import lipnext
assert "torch" not in sys.modules, "importing lipnext imports torch"

import random
import rich.style  # draws a random number when imported
import numpy
import torch

def state():
    return [
        torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
    ]

before = state()
import importlib, logging, pkgutil, signal
handlers = list(logging.getLogger().handlers)
interrupt = signal.getsignal(signal.SIGINT)
for module in pkgutil.walk_packages(lipnext.__path__, "lipnext."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in dir(lipnext):
    getattr(lipnext, name)
assert state() == before
assert logging.getLogger().handlers == handlers
assert signal.getsignal(signal.SIGINT) is interrupt
"""


def test_importing_does_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
