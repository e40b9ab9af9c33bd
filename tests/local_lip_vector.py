"""The network of the reference vector of Local-Lip (ReLU-theta, two hidden layers of three units)."""

import torch
from torch import Tensor

from lipnext.core.network import LipschitzNetwork
from lipnext.nn.clipped import ClippedReLU
from lipnext.nn.dense import Dense
from lipnext.nn.head import PlainHead
from lipnext.nn.reshape import Flatten

EPS = 0.15
SHIFT = 0.5
W1, B1, T1 = [[1, -0.5], [0.25, 0.8], [-0.6, 0.3]], [0.1, -0.9, 0.5], [0.5, 1, 1]
W2, B2, T2 = [[0.7, -0.4, 0.2], [0.5, 0.9, -0.3], [-0.8, 0.1, 0.6]], [-0.1, 0.6, 0.2], [1, 0.5, 1]
W3 = [[1, -0.7, 0.3], [-0.2, 0.6, -0.5]]


def image(shift: float = 0.0) -> Tensor:
    return torch.tensor([0.6, -0.2 + shift]).view(1, 1, 1, 2)


def network(shift: float = 0.0) -> LipschitzNetwork:
    """The network, or one that does at `image(shift)` what the network does at `image()`, which leaves [0, 1]."""
    layers, head = [Dense(2, 3), ClippedReLU((3,)), Dense(3, 3), ClippedReLU((3,))], PlainHead(3, 2)
    w1 = torch.tensor(W1)
    b1 = torch.tensor(B1) - w1 @ torch.tensor([0.0, shift])
    parameters = [*(p for layer in layers for p in layer.parameters()), head.weight]
    with torch.no_grad():
        for parameter, value in zip(parameters, [w1, b1, T1, W2, B2, T2, W3], strict=True):
            parameter.copy_(torch.as_tensor(value))
    return LipschitzNetwork([Flatten(), *layers], head, (1, 1, 2)).double()
