"""The prose holds: the README's numbers are those of the JSON files, the worked example runs, the benchmarks answer."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lipnext.core.classifier import Classifier

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


def test_the_worked_example_of_a_new_system_certifies() -> None:
    text = (ROOT / "docs" / "add-a-system.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    namespace: dict[str, object] = {}
    exec(code.group(1), namespace)
    system = namespace["SYSTEM"]
    net = system.build(input_shape=(1, 8, 8), classes=4, **system.presets["tiny"]).eval()  # type: ignore[attr-defined]
    model = Classifier(net, system.certify, (1, 8, 8), 4, "example")  # type: ignore[attr-defined]
    certificate = model.certify(torch.rand(5, 1, 8, 8))
    assert len(certificate) == 5
    assert bool((certificate.radius > 0).all())


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
