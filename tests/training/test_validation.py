import pytest
import torch
from tiny_runs import experiment, network, pictures

from lipnext.certificates.margin import MarginCertifier
from lipnext.core.eps import parse_eps_list
from lipnext.training.validation import estimate_validation

EPS = ("1/255", "36/255")


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_the_estimate_is_close_to_the_certificate(batch_size: int) -> None:
    net, dataset = network(experiment()).eval(), pictures(24)
    estimate = estimate_validation(net, dataset, EPS, batch_size)
    certificate = MarginCertifier(net)(dataset.float_images())
    summary = certificate.summary(dataset.labels, parse_eps_list(EPS))
    assert estimate["clean"] == summary["clean"]
    assert estimate["cra"] == summary["cra"]
    assert estimate["acr"] == pytest.approx(summary["acr"], rel=1e-9)


def test_it_leaves_the_network_as_it_was() -> None:
    net = network(experiment()).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    estimate_validation(net, pictures(6), EPS, 6)
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
