"""APGD: projected gradient ascent with momentum, whose step size halves where it no longer helps.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks" (ICML 2020),
algorithm 1 and section 4. What it adds to `pgd` is a step size that needs no choice and the DLR objective, whose gradient does
not vanish where the cross-entropy saturates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lipnext.auditing.ascent import (
    AttackResult,
    Best,
    Logits,
    Objective,
    ascend,
    away_from,
    check_inputs,
    column,
    direction,
    inner_radii,
    nearest_rivals,
    project,
    put,
    radii_of,
    random_like,
    rescale,
    rival_margin,
    towards,
)
from lipnext.core.bound import norm_label
from lipnext.core.errors import ConfigError, nearest
from lipnext.core.seed import generator

ObjectiveName = Literal["ce", "dlr", "margin"]

MOMENTUM = 0.75
# A stretch between two checkpoints was good where at least this share of its steps raised the objective.
GOOD_SHARE = 0.75


def apgd(
    logits: Logits,
    images: Tensor,
    labels_predicted: Tensor,
    radius: float | Tensor,
    *,
    objective: ObjectiveName = "ce",
    steps: int = 100,
    restarts: int = 1,
    seed: int = 0,
    norm: float = 2.0,
    box: bool = False,
    progress: Callable[[int], None] | None = None,
) -> AttackResult:
    """Search for a changed label in the closed ball around each image by APGD.

    The first restart starts at the image, the others at random points of the sphere. An image is left alone once
    its label has changed.

    Args:
        logits: the network.
        images: (n, ...) float32 or float64; the attack runs in this precision.
        labels_predicted: int64 (n,), the labels that should change.
        radius: one for all or (n,), in pixel units of images in [0, 1], at least 0.
        objective: "ce" raises the cross-entropy, "dlr" the difference of logits ratio (3 classes or more), "margin"
            one rival's logit against the label's, another rival in each restart, the nearest by linearisation first.
        steps: gradient steps per restart.
        restarts: at least 1.
        seed: of the random starts.
        norm: 2.0 or inf.
        box: keep the images in [0, 1].
        progress: called with numbers of steps that sum to `steps * restarts`.

    Returns:
        The first success for each image, at a measured distance of at most `radius`.

    Raises:
        DataError: where images, labels or radii do not fit.
        ConfigError: where steps or restarts are below 1, the objective is unknown or needs more classes, or the
            network has no gradient in the image.
        UnsoundError: for another norm.
    """
    norm_label(norm)
    if objective not in get_args(ObjectiveName):
        raise ConfigError(f"unknown objective {objective!r}; {nearest(objective, get_args(ObjectiveName))}")
    check_inputs(images, labels_predicted, steps, restarts)
    best = Best(images, labels_predicted, norm, radii_of(radius, images))
    reach = inner_radii(best.limit, images)
    rivals = nearest_rivals(logits, best) if objective == "margin" else None
    for restart in range(restarts):
        if objective == "ce":
            goal = away_from(labels_predicted)
        elif objective == "dlr":
            goal = _logits_ratio(labels_predicted)
        else:
            assert rivals is not None
            goal = towards(rivals[:, restart % rivals.shape[1]], labels_predicted)
        noise = generator("apgd", objective, seed, restart)
        start = torch.zeros_like(images)
        if restart:
            start = rescale(random_like(images, noise), column(reach, images), norm)
        _climb(logits, best, start, reach, goal, steps, noise, box, progress)
    return best.result()


def checkpoints(steps: int) -> list[int]:
    """Return the steps w_1 < w_2 < ... after which the step size may halve (section 4.1 of the paper).

    `w_j = ceil(p_j steps)` with p_1 = 0.22 and stretches that shorten by 0.03 down to 0.06.
    """
    # In hundredths, because 0.22 + 0.19 is not 0.41 in floating point and ceil would notice.
    found, point, stretch = [], 22, 22
    while point < 100:
        found.append(-(-point * steps // 100))
        stretch = max(stretch - 3, 6)
        point += stretch
    return sorted(set(found))


@dataclass
class _Climbers:
    """The images that still hold out, row by row."""

    index: Tensor
    originals: Tensor
    reach: Tensor
    points: Tensor
    previous: Tensor
    value: Tensor
    gradient: Tensor
    best_points: Tensor
    best_value: Tensor
    best_gradient: Tensor
    step_size: Tensor
    rises: Tensor
    halved: Tensor
    value_at_checkpoint: Tensor

    def keep(self, rows: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


def _climb(
    logits: Logits,
    best: Best,
    delta: Tensor,
    reach: Tensor,
    goal: Objective,
    steps: int,
    noise: torch.Generator,
    box: bool,
    progress: Callable[[int], None] | None,
) -> None:
    """One restart: ascend inside the balls from `delta`, each image until it has a success."""
    index = torch.nonzero(best.distance.isinf()).flatten()
    points = put(best.originals[index], delta[index], box)
    values, gradient = ascend(logits, points, index, goal)
    value = goal(values, index)
    state = _Climbers(
        index=index,
        originals=best.originals[index],
        reach=column(reach[index], points),
        points=points,
        previous=points,
        value=value,
        gradient=gradient,
        best_points=points,
        best_value=value,
        best_gradient=gradient,
        step_size=2 * column(reach[index], points),
        rises=torch.zeros_like(index),
        # The first checkpoint must not halve by the second condition: nothing was tried before it.
        halved=torch.ones_like(index, dtype=torch.bool),
        value_at_checkpoint=value,
    )
    state.keep(~best.offer(index, points, values))
    marks, last = set(checkpoints(steps)), 0
    for step in range(1, steps + 1):
        if len(state.index) == 0:
            break
        _step(logits, best, state, goal, noise, box, momentum=MOMENTUM if step > 1 else 1.0)
        if step in marks:
            _halve_where_stuck(state, step - last)
            last = step
        if progress is not None:
            progress(1)
    else:
        return
    if progress is not None:
        progress(steps - step + 1)


def _step(
    logits: Logits,
    best: Best,
    state: _Climbers,
    goal: Objective,
    noise: torch.Generator,
    box: bool,
    momentum: float,
) -> None:
    """Take one step with momentum, both the step and the sum projected, and drop the images that gave in."""
    ahead = state.points + state.step_size * direction(state.gradient, noise, best.norm)
    ahead = _into_ball(ahead, state, best.norm, box)
    mixed = state.points + momentum * (ahead - state.points)
    mixed = mixed + (1 - momentum) * (state.points - state.previous)
    points = _into_ball(mixed, state, best.norm, box)
    values, gradient = ascend(logits, points, state.index, goal)
    value = goal(values, state.index)
    state.rises = state.rises + (value > state.value)
    state.previous, state.points, state.value, state.gradient = state.points, points, value, gradient
    higher = value > state.best_value
    wide = column(higher, points)
    state.best_points = torch.where(wide, points, state.best_points)
    state.best_gradient = torch.where(wide, gradient, state.best_gradient)
    state.best_value = torch.where(higher, value, state.best_value)
    state.keep(~best.offer(state.index, points, values))


def _halve_where_stuck(state: _Climbers, stretch: int) -> None:
    """Halve the step and go back to the best point where one of the two conditions of the paper holds."""
    few_rises = state.rises < GOOD_SHARE * stretch
    same_step_no_gain = ~state.halved & (state.best_value <= state.value_at_checkpoint)
    stuck = few_rises | same_step_no_gain
    wide = column(stuck, state.points)
    state.step_size = torch.where(wide, state.step_size / 2, state.step_size)
    state.points = torch.where(wide, state.best_points, state.points)
    state.gradient = torch.where(wide, state.best_gradient, state.gradient)
    state.value = torch.where(stuck, state.best_value, state.value)
    state.rises = torch.zeros_like(state.rises)
    state.halved, state.value_at_checkpoint = stuck, state.best_value


def _into_ball(points: Tensor, state: _Climbers, norm: float, box: bool) -> Tensor:
    return put(state.originals, project(points - state.originals, state.reach, norm), box)


def _logits_ratio(labels: Tensor) -> Objective:
    """The difference of logits ratio: the largest rival less the label over the first less the third logit."""

    def objective(values: Tensor, index: Tensor) -> Tensor:
        if values.shape[1] < 3:
            raise ConfigError(
                f"objective 'dlr' needs at least 3 classes, got {values.shape[1]}; use objective='ce'"
            )
        largest = values.topk(3, dim=1).values
        # The published guard against three equal logits.
        return rival_margin(values, labels[index]) / (largest[:, 0] - largest[:, 2] + 1e-12)

    return objective
