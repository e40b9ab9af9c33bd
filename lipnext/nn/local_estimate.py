"""The local Lipschitz constant as a loss needs it: per sample, differentiable, and estimated (Local-Lip, NeurIPS 2021).

As `lipnext.certificates.local` proves it, but with norms from power iteration and nothing rounded, so it approaches from
below. Masked norms are iterated per sample. The published code keeps a vector for each layer and training image, 27 GB for
CIFAR-10; here the leading direction of the unmasked layer, one vector a layer, is masked and then iterated `STEPS` times.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lipnext.bounds.ball_box import ball_box_maximum
from lipnext.core.local import AffineModule, Stage, stages
from lipnext.core.network import LipschitzNetwork

STEPS = 2
"""Power iterations per sample and layer; published: 2 for CIFAR-10, 5 for MNIST."""
_FLOOR = 1e-12


@dataclass(frozen=True)
class LocalStage:
    """What is estimated behind one affine layer.

    Attributes:
        stage: the layers.
        lower: of the box of its outputs, `(B, ...)`.
        upper: the same.
        varying: bool, the outputs behind the activations that can change.
        radius: `(B,)` of the ball around its outputs, from the layers' unmasked norms.
        norm: `(B,)`, of the masked layer.
    """

    stage: Stage
    lower: Tensor
    upper: Tensor
    varying: Tensor
    radius: Tensor
    norm: Tensor


@dataclass(frozen=True)
class LocalEstimate:
    """What is estimated about a network in the balls around a batch of images.

    Attributes:
        logits: `(B, K)`.
        constant: `(B,)`, of the body on the ball.
        worst: `(B, K)`, logits of every class raised by the most that its lead over the label can grow.
        stages: layer by layer.
    """

    logits: Tensor
    constant: Tensor
    worst: Tensor
    stages: tuple[LocalStage, ...]


def estimate_local(
    network: LipschitzNetwork, images: Tensor, labels: Tensor, radius: float | Tensor, steps: int = STEPS
) -> LocalEstimate:
    """Estimate logits, constants and worst logits on l2 balls.

    Args:
        network: in training form, not materialised; its layers are affine or monotone.
        images: `(B, c, H, W)`.
        labels: `(B,)`.
        radius: of the balls, one number or `(B,)`.
        steps: power iterations for the masked norms.

    Raises:
        UnsoundError: for a layer of another kind.
    """
    first, chain = stages(network)
    eps = torch.as_tensor(radius, dtype=images.dtype, device=images.device).expand(len(images))
    with torch.autocast(images.device.type, enabled=False):
        centre = images
        for layer in first:
            centre = layer(centre)
        box, varying = None, torch.ones_like(centre, dtype=torch.bool)
        ball, constant, found = eps, torch.ones_like(eps), []
        for stage in chain:
            centre, lower, upper = _box(stage.affine, centre, box, ball)
            ball = ball * stage.affine.estimate_lipschitz()
            box = (stage.activate(lower), stage.activate(upper))
            before, varying = varying, box[0] < box[1]
            norm = _masked_norm(stage.affine, stage.feeds(varying, centre), before, steps)
            constant = constant * norm
            found.append(LocalStage(stage, lower, upper, varying, ball, norm))
            centre = stage.activate(centre)
        logits = network.head(centre)
        rows = network.head.weight
        assert box is not None
        raised = ball_box_maximum(
            rows - rows[labels][:, None],
            (eps * constant)[:, None].expand_as(logits),
            (box[0] - centre).clamp_max(0)[:, None],
            (box[1] - centre).clamp_min(0)[:, None],
        )
    return LocalEstimate(logits=logits, constant=constant, worst=logits + raised, stages=tuple(found))


def _box(
    layer: AffineModule, centre: Tensor, box: tuple[Tensor, Tensor] | None, ball: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of the centre, and the box that follows from the ball and, unless it is the image's, the box."""
    if box is None:
        centre = layer(centre)
    else:
        # one call for both, which costs less than two
        centre, middle = layer(torch.cat([centre, (box[0] + box[1]) / 2])).chunk(2)
        half = layer.product((box[1] - box[0]) / 2, layer.weight.abs())
    lengths = layer.weight.flatten(1).norm(dim=1).view(-1, *[1] * (centre.dim() - 2))
    width = _wide(ball, centre) * lengths
    lower, upper = centre - width, centre + width
    if box is None:
        return centre, lower, upper
    return centre, _larger(middle - half, lower), _smaller(middle + half, upper)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    """`torch.maximum`, whose gradient takes several passes more."""
    return torch.where(a > b, a, b)


def _smaller(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a < b, a, b)


def _masked_norm(layer: AffineModule, rows: Tensor, columns: Tensor, steps: int) -> Tensor:
    """Estimate `||diag(rows) W diag(columns)||` per sample; the gradient flows through the last product alone."""
    weight, keep, seen = layer.weight.detach(), columns.to(layer.weight), rows.to(layer.weight)
    with torch.no_grad():
        u = layer.direction * keep
        for step in range(steps):
            u = layer.adjoint(layer.product(u, weight) * seen, weight) * keep
            if step % 8 == 7:  # often enough for the range of float32
                u = u / _wide(_length(u).clamp_min(_FLOOR), u)
    return _length(layer.product(u, layer.weight) * seen) / _length(u).clamp_min(_FLOOR)


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """`(B,)` with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))
