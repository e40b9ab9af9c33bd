"""The prose holds: its numbers are those of the JSON files, its Python runs, its links lead somewhere, the site builds."""

import importlib
import importlib.util
import inspect
import itertools
import json
import pydoc
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lipnext
from lipnext import systems
from lipnext.core.experiment import DataSpec
from lipnext.data.dataset import load as load_data

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {
    "add-a-system.md": "test_docs.py",
    "export.md": "deployment/test_export.py",
}
"""Pages whose Python is dropped in as a file, or needs another extra, by the test that runs it."""


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


def blocks(page: Path) -> list[str]:
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Names under which the headings of a page can be linked to."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """Local targets of a page that do not exist: files, and headings within pages."""
    dead = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_of_the_prose_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A heading, with `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](gone.md) [c](there.md#a-heading-with-code) [d](there.md#other) [e](https://x.org) [f](#g)"
    )
    assert dead_links(page) == ["gone.md", "there.md#other", "#g"]


def test_every_page_is_linked_from_the_readme_and_in_the_navigation() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"](docs/{page.name})" in readme, page.name
        assert f" {page.name}\n" in site, page.name


def test_every_public_name_is_on_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    directives = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    for name in dir(lipnext):
        assert f"lipnext.{name}" in directives or f"`lipnext.{name}`" in page, name
    for path in directives:
        assert inspect.getdoc(pydoc.locate(path)), f"{path} is not there or says nothing"


@pytest.fixture
def beside_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What pages take for granted: a trained run, a folder of pictures, and `images` with `labels` in memory."""
    shutil.copytree(ROOT / "lipnext" / "zoo" / "digits", tmp_path / "runs" / "digits")
    (tmp_path / "pictures").mkdir()
    rng = torch.Generator().manual_seed(0)
    for k, sides in enumerate([(28, 28), (60, 40), (100, 100)]):
        pixels = torch.randint(256, sides, generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as for a reader; the tests' own is float64
    test = load_data(DataSpec(name="digits")).test
    return {"images": test.float_images(slice(16)), "labels": test.labels[:16]}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page) and page.name not in RUN_ELSEWHERE],
    ids=lambda page: page.name,
)
def test_the_python_of_a_page_runs(
    page: Path, beside_the_reader: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """From top to bottom in one namespace, as a reader would type it."""
    names = dict(beside_the_reader)
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
    if page.name in CHECKS:
        CHECKS[page.name](names, capsys.readouterr().out)


def check_own_images(names: dict[str, Any], printed: str) -> None:
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines] == ["0.png", "1.png", "2.png"]
    told = [float(line.split()[-1]) for line in lines]
    for radius, proved in zip(told, names["cert"].radius.tolist(), strict=True):
        assert proved - 1e-4 <= radius <= proved
    assert len(Path("radii.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    [page] = (page for page in PAGES if page.name == "own-images.md")
    assert len([line for line in blocks(page)[0].splitlines() if line]) == 10  # as its title says


def check_bring_your_own(names: dict[str, Any], printed: str) -> None:
    assert len(names["certificate"]) == 4
    assert len(names["deployed"].certify(names["images"])) == 4


def check_read_a_certificate(names: dict[str, Any], printed: str) -> None:
    """The radius by hand is the certified one, and every field is explained."""
    certified = lipnext.load("digits").certify(names["images"]).radius.numpy()
    assert (certified > 0).any()
    # the library rounds down a dozen operations, and logits of another order of summation differ by 1e-14
    assert np.abs(names["by_hand"] - certified).max() < 1e-12
    [page] = (page for page in PAGES if page.name == "read-a-certificate.md")
    text = page.read_text(encoding="utf-8")
    values = re.search(r"<!-- table certificate -->.*?<!-- /table -->", text, re.DOTALL)
    assert values
    explained = re.findall(
        r"`(\w+)`", " ".join(re.findall(r"^\| ([^|]*) \|", text.replace(values[0], ""), re.MULTILINE))
    )
    document = json.loads(
        (ROOT / "lipnext" / "zoo" / "digits" / "certificate.json").read_text(encoding="utf-8")
    )
    for field in [*document, *names["record"]]:
        assert field in explained, field


CHECKS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "own-images.md": check_own_images,
    "bring-your-own.md": check_bring_your_own,
    "read-a-certificate.md": check_read_a_certificate,
}


def test_python_that_runs_elsewhere_does() -> None:
    for name, file in RUN_ELSEWHERE.items():
        assert name in (ROOT / "tests" / file).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_builds_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra: docs)")
    pytest.importorskip("material", reason="mkdocs-material is not installed (extra: docs)")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (extra: docs)")
    done = run("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in (ROOT / "docs").glob("*.md")}
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(
            r"<(?:script|img|link|iframe)[^>]*?(?:src|href)=\"?(?:https?:)?//[^\">]*", html
        ), page
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in dir(lipnext):
        assert name == "__version__" or f'id="lipnext.{name}"' in api, name


@pytest.fixture
def worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Drop the file of the prose beside the other systems."""
    (code,) = blocks(ROOT / "docs" / "add-a-system.md")
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (
            ["benchmarks/gpu_step.py", "--device", "cpu", "--tiny", "--largest", "--json"],
            ["utilisation", "manifold_share", "matrix_rate", "bytes", "certify"],
        ),
        (
            [
                "benchmarks/input.py",
                "--images",
                "50",
                "--sides",
                "16",
                "--batch",
                "8",
                "--repeats",
                "1",
                "--json",
            ],
            ["images_per_second", "bytes_per_picture", "encoded_bytes_kept"],
        ),
        (
            ["benchmarks/plan.py", "--experiment", "tiny", "--batch", "16", "--cpu-time", "--json"],
            ["error", "predicted_seconds", "measured_seconds", "slowest_to_fastest"],
        ),
    ],
)
def test_benchmarks_print_one_row_for_each_setting(command: list[str], keys: list[str]) -> None:
    done = run(*command)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 2
    for row in rows:
        for key in keys:
            assert row[key], key
