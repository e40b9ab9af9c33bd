"""Bounds on the gradient of a difference of logits over a box of images: interval, RecurJac and joint.

For `h_i = sigma(W_i h_(i-1) + b_i)` and logits `z = W_n h_(n-1) + b_n`, every element of the Clarke Jacobian of `c z` is a J_1,

    J_n = c W_n,    J_i = (J_(i+1) o d_i) W_i,    d_i in the interval of slopes of sigma on the box of layer i.

A difference of values at two points of the box is at most the largest `||J_1||_1` times their l-infinity distance (mean value
theorem of Lebourg). The three methods differ in what they know of `J_(i+1) o d_i`:

    interval   its interval, component by component, through every layer
    recurjac   straight lines where the sign of J is known, constants elsewhere (Zhang, Zhang, Hsieh, AAAI 2019)
    joint      the best line there, too, and the sum of sizes bounded as one linear function (Shi et al., NeurIPS 2022)

Each intersects its intervals with interval arithmetic on the layer before, so that none is worse than the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lipnext.certificates.clarke.layers import Layer
from lipnext.certificates.clarke.relaxation import (
    Box,
    activated,
    activation_lines,
    lines_above_size,
    product_box,
    product_lines,
    slopes,
)
from lipnext.certificates.clarke.substitution import (
    TINY,
    Link,
    entry_bounds,
    intersection,
    interval,
    upper_bounds,
)
from lipnext.core.rounding import UNIT_ROUNDOFF, gamma, mul_up

Method = Literal["interval", "recurjac", "joint"]
Forward = Literal["interval", "crown"]


@dataclass(frozen=True)
class JacobianBounds:
    """What is proved about J_1 for n pairs of a box and a difference c.

    Attributes:
        box: of the components of J_1, (n, inputs) each.
        norm: bound on `||J_1||_1`, (n,).
        unstable: by hidden layer, how much its components loosen `norm`, (n, width); empty unless the method is joint.
    """

    box: Box
    norm: Tensor
    unstable: list[Tensor]


def forward_chain(layers: Sequence[Layer], start: Box, forward: Forward = "crown") -> list[Link]:
    """Bound what every layer computes before its activation, for all images in the boxes `start`, (n, inputs) each.

    Args:
        layers: the network; the box of the last one is by interval arithmetic alone.
        start: boxes of the images.
        forward: "interval" arithmetic, or also "crown", substitution back to the image.
    """
    links: list[Link] = []
    box = start
    for k, layer in enumerate(layers):
        found = interval(box, layer.weight, layer.bias, layer.size, layer.terms)
        link = Link(layer.weight, layer.bias, layer.size, layer.terms, _largest(box), found)
        if forward == "crown" and 0 < k < len(layers) - 1:
            link = replace(link, box=intersection(found, entry_bounds([*links, link], start)))
        links.append(replace(link, lines=activation_lines(layer.activation, link.box)))
        box = activated(layer.activation, link.box)
    return links


def slope_boxes(layers: Sequence[Layer], links: Sequence[Link]) -> list[Box]:
    """The intervals of the slopes of every hidden layer's activation, (n, width) each."""
    return [slopes(layer.activation, link.box) for layer, link in zip(layers[:-1], links[:-1], strict=True)]


def jacobian_bounds(
    layers: Sequence[Layer], known_slopes: Sequence[Box], difference: Tensor, method: Method
) -> JacobianBounds:
    """Bound the Clarke Jacobian of `difference z` from the last layer down.

    Args:
        layers: the network.
        known_slopes: of its hidden layers, (n, width) each.
        difference: c, (n, classes).
        method: see above.
    """
    start = (difference, difference)
    links: list[Link] = []
    box = start
    for layer, slope in zip(reversed(layers), [*reversed(known_slopes), None], strict=True):
        weight = layer.transposed
        link = Link(
            weight, None, None, layer.terms, _largest(box), interval(box, weight, None, None, layer.terms)
        )
        # The first two are intervals of numbers that vary on their own: there interval arithmetic is sharp.
        if method != "interval" and len(links) >= 2:
            link = replace(link, box=intersection(link.box, entry_bounds([*links, link], start)))
        if slope is None:
            links.append(link)
            break
        links.append(replace(link, lines=product_lines(link.box, slope, joint=method == "joint")))
        box = product_box(link.box, slope)
    entries = links[-1].box
    norm = _sum_up(_largest(entries))
    unstable: list[Tensor] = []
    if method == "joint":
        chord, constant = lines_above_size(entries)
        joint, coefficients = upper_bounds(links, start, chord[:, None], _sum_up(constant)[:, None])
        norm = torch.minimum(norm, joint.squeeze(1))
        boxes = [link.box for link in links[:-1]]
        unstable = [_looseness(box, rows.squeeze(1)) for box, rows in zip(boxes, coefficients, strict=True)][
            ::-1
        ]
    return JacobianBounds(entries, norm, unstable)


def _looseness(box: Box, coefficients: Tensor) -> Tensor:
    """The score by which Shi et al. choose where to branch: the area between the lines times the coefficient's size."""
    lower, upper = box
    return (upper * upper.abs() - lower * lower.abs()) * coefficients.abs()


def _largest(box: Box) -> Tensor:
    return torch.maximum(box[0].abs(), box[1].abs())


def _sum_up(sizes: Tensor) -> Tensor:
    relative = mul_up(2.0, gamma(sizes.shape[1] + 8, UNIT_ROUNDOFF[torch.float64]))
    return sizes.sum(dim=1) * (1 + relative) + TINY
