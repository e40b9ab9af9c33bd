"""The prose holds: the README's numbers are those of the JSON files, the worked example runs, the benchmarks answer."""

import importlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lipnext import systems

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_readme_says_what_the_result_files_say() -> None:
    done = run("benchmarks/readme.py", "--check")
    assert done.returncode == 0, "run python benchmarks/readme.py"


def test_result_files_carry_what_a_reader_needs() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*-seed*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        for key in ("preset", "seed", "minutes", "clean", "cra", "acr", "command", "commit"):
            assert result[key] is not None, f"{path.name}: {key}"
        assert result["clean"] >= result["cra"]["36/255"] >= result["cra"]["108/255"]


def test_local_links_of_the_prose_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.fixture
def worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Drop the file of the prose beside the other systems."""
    text = (ROOT / "docs" / "add-a-system.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "sandwich.py").write_text(code)
    assert "sandwich" not in systems.list_systems()
    monkeypatch.setattr(systems, "__path__", [*systems.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "lipnext.systems.sandwich", raising=False)
    importlib.invalidate_caches()
    return "sandwich"


def contract() -> Iterator[tuple[str, Callable[..., None], dict[str, object]]]:
    """The contract tests of every system, with the arguments that each of them is run with."""
    spec = importlib.util.spec_from_file_location(
        "contract_of_systems", ROOT / "tests" / "systems" / "test_contract.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    for name, test in vars(module).items():
        marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        if not any(mark.args[0] == "name" for mark in marks):
            continue
        choices = []
        for names, values in (mark.args for mark in marks if mark.args[0] != "name"):
            keys = [names] if isinstance(names, str) else list(names)
            rows = [[value] if isinstance(names, str) else value for value in values]
            choices.append([dict(zip(keys, row, strict=True)) for row in rows])
        for chosen in itertools.product(*choices):
            yield name, test, {key: value for part in chosen for key, value in part.items()}


def test_the_worked_example_of_a_new_system_keeps_the_contract(worked_example: str) -> None:
    assert worked_example in systems.list_systems()
    ran = set()
    for name, test, arguments in contract():
        test(name=worked_example, **arguments)
        ran.add(name)
    assert len(ran) >= 12, ran


@torch.no_grad()
def test_the_worked_example_proves_a_true_bound(worked_example: str) -> None:
    """Away from its start, at scales of D that differ, the layer is driven by its steepest pair of points."""
    net = systems.get(worked_example).build(input_shape=(1, 4, 4), classes=3, width=16, depth=1)
    layer = net.body[2]
    layer.scale.copy_(torch.randn(16))
    layer.bias.copy_(torch.randn(16))
    stored = layer.materialise()
    x = torch.randn(512, 16)
    slopes = [torch.diag((stored.inner @ one + stored.bias > 0).double()) for one in x]
    steepest = max(
        torch.linalg.matrix_norm(stored.outer @ slope @ stored.inner, 2).item() for slope in slopes
    )
    assert 0.5 < steepest <= stored.lipschitz_bound().value <= 1 + 1e-6
    assert torch.equal(stored(x), layer(x))
    # Planted: weights that were changed afterwards, and the naive bound, which is no 1.
    stored.outer.mul_(1.5)
    assert stored.lipschitz_bound().value >= 1.5 * steepest
    naive = torch.linalg.matrix_norm(layer.materialise().outer, 2) * torch.linalg.matrix_norm(stored.inner, 2)
    assert naive > 1.5


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (
            [
                "benchmarks/step.py",
                "--json",
                "--width",
                "48",
                "--depth",
                "1",
                "--side",
                "8",
                "--batch",
                "4",
                "--repeats",
                "2",
            ],
            ["ratio_to_gemm", "ratio_to_adamw"],
        ),
        (
            ["benchmarks/manifold_step.py", "--json", "--size", "16", "--count", "4"],
            ["speedup_vs_geoopt", "speedup_vs_matrix_exp"],
        ),
    ],
)
def test_benchmarks_print_one_json_document(command: list[str], keys: list[str]) -> None:
    pytest.importorskip("geoopt", reason="geoopt is not installed (extra: dev)")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert all(document[key] > 0 for key in keys)
