from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import apart, together, values

from lipnext.core import world as module
from lipnext.core.errors import ConfigError, DataError
from lipnext.core.world import World, batch_mean, join, local_device


@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 4))
def test_parts_are_disjoint_in_order_and_cover_everything(count: int, size: int, pieces: int) -> None:
    items = list(range(count))
    parts = [part for rank in range(size) for part in World(rank, size).parts(count, pieces)]
    assert [item for part in parts for item in items[part]] == items
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [item for share in shares for item in items[share]] == items
    lengths = [len(items[part]) for part in parts]
    assert max(lengths) - min(lengths) <= 1 + (pieces > 1)
    if count >= size * pieces:
        assert min(lengths) > 0


def test_alone_nothing_is_sent_and_everything_comes_back() -> None:
    world, tensor = World(), torch.ones(2)
    assert world.is_first
    assert world.add(1.5) == world.largest(1.5) == 1.5
    assert world.add_(tensor) is world.length(tensor) is tensor
    assert world.first(lambda: "done") == world.each(lambda: "done") == "done"
    assert world.aside() is None
    world.leave(None)
    with join("cpu") as found:
        assert found == world
    assert not torch.distributed.is_initialized()


def exchange(world: World) -> dict[str, Any]:
    rank, size = world.rank, world.size
    tensor = torch.tensor([float(rank), 1.0], dtype=torch.float64)
    reduced, sent = torch.full((2,), float(rank + 1)), torch.full((2,), float(rank))
    world.wait(world.reduce(reduced, 1))
    world.wait(world.broadcast(sent, 1))
    try:
        world.first(lambda: (_ for _ in ()).throw(DataError("one line")))
        raised = ""
    except DataError as error:
        raised = str(error)
    if rank == 1:
        world.send({"x": torch.ones(2)}, 0)
    received = world.receive(1) if rank == 0 else None
    return {
        "sum": world.add(rank + 0.5),
        "nan": world.add(float("nan") if rank == 0 else 1.0),
        "largest": world.largest(-float(rank)),
        "tensor": world.add_(tensor).tolist(),
        "length": world.length(torch.tensor(2.0)).item(),
        "first": world.first(lambda: rank),
        "raised": raised,
        "reduced": reduced.tolist() if rank == 1 else None,
        "broadcast": sent.tolist(),
        "received": received["x"].tolist() if received else None,
        "size": size,
    }


@pytest.mark.dist
def test_three_processes_exchange_what_they_should() -> None:
    for rank, found in enumerate(values(together(3, exchange))):
        assert found["sum"] == 4.5
        assert found["nan"] != found["nan"]
        assert found["largest"] == 0.0
        assert found["tensor"] == [3.0, 3.0]
        assert found["length"] == pytest.approx(12**0.5, rel=1e-7)
        assert found["first"] == 0
        assert found["raised"] == "one line"
        assert found["reduced"] == ([6.0, 6.0] if rank == 1 else None)
        assert found["broadcast"] == [1.0, 1.0]
        assert found["received"] == ([1.0, 1.0] if rank == 0 else None)


def three_groups() -> list[float]:
    """One after the other, as in a program that trains several times."""
    found = []
    for _ in range(3):
        with join("cpu") as world:
            found.append(world.add(1.0))
    return found


@pytest.mark.dist
def test_processes_meet_again_and_again() -> None:
    assert values(apart(2, three_groups)) == [[2.0, 2.0, 2.0]] * 2


def mean_and_gradient(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a function of a batch of which this process has a share, weighted as the training loop does."""
    everything = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = everything[world.share(5)].requires_grad_()
    mean = batch_mean(x, (0, 2), torch.float64)
    centred = x - mean[:, None]
    loss = centred.square().mean() * len(x) / 5 + centred.exp().mean() * len(x) / 5
    loss.backward()
    assert x.grad is not None
    return mean.detach(), x.grad


@pytest.mark.dist
def test_the_mean_over_a_spread_batch_has_the_gradient_of_the_whole() -> None:
    mean, gradient = mean_and_gradient(World())
    outcomes = values(together(2, mean_and_gradient))
    for found, _ in outcomes:
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(torch.cat([g for _, g in outcomes]), gradient, rtol=0, atol=1e-15)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but RANK or MASTER_ADDR is missing; .*torchrun"),
        join("cpu"),
    ):
        pass


def test_processes_on_gpus_take_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("cuda") == torch.device("cuda", 3)
    assert local_device("cuda:1") == torch.device("cuda", 1)
    assert local_device("cpu") == torch.device("cpu")
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module.dist, "init_process_group", lambda backend: pytest.fail("too late"))
    with (
        pytest.raises(ConfigError, match="'cuda:1' would be shared by 2 processes; take 'cuda'"),
        join("cuda:1"),
    ):
        pass


def each(world: World) -> tuple[int, str]:
    def fail() -> None:
        if world.rank > 0:
            raise DataError(f"of {world.rank}")

    number = world.each(lambda: world.rank)
    try:
        world.each(fail)
    except DataError as error:
        return number, str(error)
    return number, ""


@pytest.mark.dist
def test_each_works_for_itself_and_all_raise_the_first_error() -> None:
    assert values(together(3, each)) == [(0, "of 1"), (1, "of 1"), (2, "of 1")]


def two_at_a_time(world: World) -> tuple[list[float], list[float]]:
    """A thread adds over the second connection while this one adds over the first, each in its own time."""
    group = world.aside()

    def talk() -> list[float]:
        found = []
        for number in range(20):
            tensor = torch.tensor(float(number))
            torch.distributed.all_reduce(tensor, group=group)
            found.append(tensor.item())
        return found

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(talk)
        mine = [world.add(float(-number)) for number in range(20)]
        theirs = world.result(future)
    world.leave(group)
    return mine, theirs


@pytest.mark.dist
def test_a_thread_talks_over_a_connection_of_its_own() -> None:
    wanted = [2.0 * number for number in range(20)]
    for mine, theirs in values(together(2, two_at_a_time)):
        assert theirs == wanted
        assert mine == [-number for number in wanted]
