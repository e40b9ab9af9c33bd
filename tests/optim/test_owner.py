"""Where gradients and parameters go, seen by a world that only writes down what is sent; real processes: test_distributed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import experiment, network
from torch import Tensor, nn

from lipnext.core.world import World
from lipnext.optim import owner
from lipnext.optim.owner import Owners


class Recorded(World):
    """One of `size` processes, alone: a sum is its own part, a broadcast brings nothing."""

    def __init__(self, rank: int, size: int, on_send: Callable[[Tensor, int], None]) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "on_send", on_send)

    def reduce(self, tensor: Tensor, to: int) -> Any:
        self.on_send(tensor, to)  # type: ignore[attr-defined]

    def broadcast(self, tensor: Tensor, source: int) -> Any:
        self.on_send(tensor, source)  # type: ignore[attr-defined]

    def wait(self, work: Any) -> None:
        pass


class Plain(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 5))
def test_every_parameter_has_one_owner_and_the_loads_are_even(sizes: list[int], count: int) -> None:
    found = [Owners(Plain(*sizes), World(rank, count)) for rank in range(count)]
    names = list(found[0].parameters)
    assert sorted(name for owners in found for name in owners.mine(names)) == sorted(names)
    loads = [sum(owners.parameters[name].numel() for name in owners.mine(names)) for owners in found]
    assert max(loads) <= min(loads) + max(sizes)


def test_equal_matrices_are_dealt_evenly() -> None:
    what = experiment("model.depth=4")
    found = [Owners(network(what), World(rank, 4)) for rank in range(4)]
    matrices = [name for name, p in found[0].parameters.items() if p.shape == (8, 8)]
    assert [len(owners.mine(matrices)) for owners in found] == [2, 2, 2, 2]


@given(st.permutations(range(5)), st.integers(0, 4))
def test_gradients_are_sent_in_one_order_however_they_come(order: list[int], cut: int) -> None:
    """`cut` parameters get no gradient, as on every other process."""
    net, sent = Plain(*[owner.SMALL] * 4, 3), list[tuple[int, int]]()
    owners = Owners(net, Recorded(0, 2, lambda tensor, to: sent.append((tensor.numel(), to))))
    for used in (range(5), order[cut:]):
        sent.clear()
        owners.expect()
        sum((net.rows[i].sum() * (i + 1) for i in used), torch.zeros(())).backward()
        owners.reduce()
        expected = [i for i in (3, 2, 1, 0, 4) if i in used]
        assert [size for size, _ in sent] == [net.rows[i].numel() for i in expected]
        assert [to for _, to in sent] == [owners.owner[f"rows.{i}"] for i in expected]
        for i, row in enumerate(net.rows):
            if i in used and owners.owner[f"rows.{i}"] == 0:
                assert torch.equal(row.grad, torch.full_like(row, i + 1))
            else:
                assert row.grad is None
        net.zero_grad()


def test_sending_begins_while_the_backward_pass_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "SMALL", 64)  # 8 x 8 matrices are large then
    net = network(experiment("model.depth=3"))
    first = net.body[2].rotation
    seen: list[bool] = []
    owners = Owners(net, Recorded(0, 2, lambda tensor, to: seen.append(first.grad is None)))
    owners.expect()
    net(torch.rand(4, 1, 4, 4)).square().sum().backward()
    assert len(seen) >= 6
    assert sum(seen) >= 4  # those of the later blocks are on their way before the first block's is there
    owners.reduce()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == set(
        owners.mine(owners.parameters)
    )


def test_nothing_is_sent_before_the_last_of_several_passes() -> None:
    net, sent = Plain(owner.SMALL, 2), list[Tensor]()
    owners = Owners(net, Recorded(0, 2, lambda tensor, to: sent.append(tensor.clone())))
    for last in (False, True):
        if last:
            owners.expect()
        sum(row.sum() for row in net.rows).backward()
        assert bool(sent) == last
    owners.reduce()
    assert all(torch.equal(tensor, torch.full_like(tensor, 2.0)) for tensor in sent)


def test_the_hooks_are_taken_off_and_copies_have_none() -> None:
    net, sent = Plain(owner.SMALL, 2), list[int]()
    with Owners(net, Recorded(0, 2, lambda tensor, to: sent.append(to))) as owners:
        owners.expect()
        sum(row.sum() for row in copy.deepcopy(net).rows).backward()
        assert sent == []
        sum(row.sum() for row in net.rows).backward()
        assert len(sent) == 2
        owners.reduce()
    owners.expect()
    sum(row.sum() for row in net.rows).backward()
    assert len(sent) == 2


@pytest.mark.parametrize("largest", [0.1, 1e9])
def test_one_process_clips_as_torch_does(largest: float) -> None:
    net = network(experiment())
    owners = Owners(net, World())
    clipped = []
    for clip in (owners.clip, lambda value: nn.utils.clip_grad_norm_(net.parameters(), value)):
        net.zero_grad()
        net(torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))).sum().backward()
        clip(largest)
        clipped.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*clipped, strict=True))
