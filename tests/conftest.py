"""Every test: float64 by default, one thread, a fixed seed, and no global state left changed."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import Call
from hypothesis import HealthCheck, settings

from lipnext import cli

torch.set_num_threads(1)
# A busy machine is no failure, and the same code passes or fails the same way everywhere.
# New examples are searched with `--hypothesis-profile explore`.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", PATIENT)
settings.register_profile("repeatable", PATIENT, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _numerics() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    precision = torch.get_float32_matmul_precision()
    cwd = os.getcwd()
    yield
    torch.set_default_dtype(torch.float32)
    assert torch.get_float32_matmul_precision() == precision, "a test left the matmul precision changed"
    assert os.getcwd() == cwd, "a test left the working directory changed"
    assert torch.is_grad_enabled(), "a test left gradients switched off"


SHARED_CIFAR10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def cifar10() -> Path:
    if not SHARED_CIFAR10.is_dir():
        pytest.skip("CIFAR-10 in the parquet layout is not on this machine")
    return SHARED_CIFAR10


@pytest.fixture
def fashion_mnist() -> Path:
    if not FASHION_MNIST.is_dir():
        pytest.skip("Fashion-MNIST is not on this machine (Debian: apt install dataset-fashion-mnist)")
    return FASHION_MNIST


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process and return exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lipnext", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call
