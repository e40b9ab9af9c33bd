from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import experiment, network, pictures

from lipnext.core.errors import ConfigError
from lipnext.core.network import in_turn
from lipnext.training import compiled
from lipnext.training.compiled import check_compile, compiled_layers
from lipnext.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of the compiler: the functions that were to be compiled, and the layers that they were applied to."""
    seen: list[Any] = []

    def compiler(function: Any) -> Any:
        def called(*args: Any) -> Any:
            seen.append(args[0])
            return function(*args)

        return called

    monkeypatch.setattr(torch, "compile", compiler)
    return seen


def test_layers_are_compiled_while_they_are_trained_and_nowhere_else(
    counted: list[Any], tmp_path: Path
) -> None:
    nets = []
    for name, changes in (("plain", []), ("compiled", ["train.compile=true"])):
        what = experiment("train.epochs=1", "train.ema=0", *changes)
        (tmp_path / name).mkdir()
        net = network(what)
        nets.append(train(net, what, pictures(), pictures(12, seed=1), tmp_path / name)[0])
        assert nets[-1].walk is in_turn
    layers = len(nets[1].body)
    assert (
        len(counted) == 1 + 3 * layers
    )  # the check, and three steps; validation and the end are not compiled
    for first, second in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(first, second)


def test_an_evaluation_inside_is_not_compiled(counted: list[Any]) -> None:
    what = experiment("train.compile=true")
    net = network(what)
    with compiled_layers(net, what.train), torch.no_grad():
        net(torch.rand(2, 1, 4, 4))
    assert counted == []


def test_compile_is_refused_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = experiment("train.compile=true", "train.activations=reverse").train
    with pytest.raises(ConfigError, match=r"keep their activations, got train.activations=reverse; set one"):
        check_compile(spec, CPU)

    def broken(function: Any) -> Any:
        raise RuntimeError("no compiler\nis here")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"does not work here \(no compiler\); .* set train.compile=false$"):
        check_compile(experiment("train.compile=true").train, CPU)
    check_compile(experiment().train, CPU)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_compiled_blocks_compute_what_the_plain_ones_do() -> None:
    torch.set_default_dtype(torch.float32)
    what = experiment("train.compile=true", "model.depth=3", "model.width=16")
    try:
        check_compile(what.train, CPU)
    except ConfigError as error:
        pytest.skip(str(error))
    net, images = network(what).train(), torch.rand(6, 1, 4, 4)
    gradients = []
    for compile_ in (False, True):
        with compiled_layers(net, what.train.model_copy(update={"compile": compile_})):
            net.zero_grad(set_to_none=True)
            net(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)
    assert compiled.in_turn is net.walk
