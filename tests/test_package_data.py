"""What an installed package contains."""

import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_every_file_that_is_no_module_is_declared_as_package_data() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "lipnext"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [PurePosixPath(line) for line in listed.stdout.splitlines() if not line.endswith(".py")]
    assert files
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["lipnext"]
    missing = [str(file) for file in files if not any(file.match(f"lipnext/{p}") for p in patterns)]
    assert not missing
