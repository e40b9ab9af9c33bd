import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_runs import experiment, network, pictures
from torch import Tensor, nn

from lipnext.optim.groups import split_parameters
from lipnext.optim.lookahead import Lookahead
from lipnext.training.loop import train


def walk(params: list[nn.Parameter], ahead: Lookahead, count: int, seed: int) -> None:
    """Steps of SGD with random gradients."""
    rng = torch.Generator().manual_seed(seed)
    rule = torch.optim.SGD(params, lr=0.1)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=rng)
        rule.step()
        ahead.update()


@pytest.mark.parametrize("every", [1, 2, 3, 6])
def test_the_slow_weights_go_half_way_every_few_steps(every: int) -> None:
    start = [torch.randn(3, 2), torch.randn(4)]
    params = [nn.Parameter(p.clone()) for p in start]
    walk(params, Lookahead(params, every), 13, seed=1)
    rng = torch.Generator().manual_seed(1)
    slow, fast = [p.clone() for p in start], [p.clone() for p in start]
    for step in range(1, 14):
        for index in range(2):
            fast[index] = fast[index] - 0.1 * torch.randn(fast[index].shape, generator=rng)
            if step % every == 0:
                slow[index] = (slow[index] + fast[index]) / 2
                fast[index] = slow[index]
    for p, wanted in zip(params, fast, strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_a_state_that_went_through_a_file_goes_on_bit_for_bit(cut: int) -> None:
    params = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    ahead = Lookahead(params, 4)
    walk(params, ahead, cut, seed=0)
    state = ahead.state_dict()
    saved = safetensors.torch.save({str(i): p for i, p in enumerate(state["slow"])})
    others = copy.deepcopy(params)
    resumed = Lookahead(others, 4)
    tensors = safetensors.torch.load(saved)
    resumed.load_state_dict({"steps": state["steps"], "slow": [tensors["0"], tensors["1"]]})
    walk(params, ahead, 6, seed=1)
    walk(others, resumed, 6, seed=1)
    for one, other in zip(params, others, strict=True):
        assert torch.equal(one, other)


def test_nothing_to_look_ahead_for_is_fine() -> None:
    Lookahead([], 1).update()


def test_the_slow_weights_are_no_views() -> None:
    params = [nn.Parameter(torch.zeros(2))]
    ahead = Lookahead(params, 2)
    before = ahead.slow[0].clone()
    with torch.no_grad():
        params[0].add_(1.0)
    assert torch.equal(ahead.slow[0], before)


def test_in_training_it_acts_on_every_parameter(tmp_path: Path) -> None:
    """With a merge after the only step, every parameter ends half way of where it would have gone."""
    one = ["train.epochs=1", "train.batch_size=24", "train.ema=0", "optim.warmup=0"]
    ends: list[dict[str, Tensor]] = []
    start = network(experiment(*one)).float()
    for every in (0, 1):
        folder = tmp_path / str(every)
        folder.mkdir()
        what = experiment(*one, f"optim.lookahead={every}")
        net, _ = train(network(what), what, pictures(), pictures(12, seed=1), folder)
        ends.append(dict(net.named_parameters()))
    orthogonal, euclidean = split_parameters(start)
    assert len(euclidean) > 2
    for name, begin in euclidean.items():
        plain, ahead = (end[name] - begin for end in ends)
        assert plain.abs().max() > 0
        torch.testing.assert_close(ahead, plain / 2, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in orthogonal)
