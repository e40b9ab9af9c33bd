"""Losses: pure functions of logits, labels and head distances. A loss is never a certificate.

Shapes: `logits (B, K)`, `labels (B,)` int64, `distances (K, K)` with `||w_i - w_j||` times the Lipschitz bound of the body.
`cross_entropy` and `cll` return a scalar, the mean over the batch; `emma` shifted logits for `cross_entropy`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from lipnext.core.errors import ConfigError


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    offset: float = 0.0,
    annealing: float = 0.0,
    smoothing: float = 0.0,
    power: float = 0.0,
    share: float = 1.0,
) -> Tensor:
    """Cross-entropy with temperature, margin offset and logit annealing, or one power of the error in its place.

    With `p = softmax((z - offset * onehot_y) / T)` the loss of a sample is `-T (1 - p_y)^annealing log p_y`:
    offset cross-entropy (Prach & Lampert 2022) for `annealing = 0`, the logit-annealing loss of BRONet (ICML 2025) otherwise.
    The factor T keeps the size of gradients.

    Cross-entropy is the sum of `(1 - p_y)^k / k` over k = 1, 2, ...; `power = k` turns it into that one term, by weights that
    are not differentiated: `p_y (1 - p_y)^(k - 1)`, times a constant that makes 1 of its largest value, to the power `share`.
    The term is bounded: a sample that is hopelessly wrong pulls as little as one that is safely right, so that a network of
    limited capacity spends it on those near the boundary. Feng et al. (2020) keep the first terms of the series instead.

    Args:
        logits: `(B, K)`.
        labels: `(B,)`.
        temperature: T > 0. With a network whose constant is exactly 1 it decides what is learned: the smaller,
            the more the hard samples count.
        offset: the margin that the right logit is asked to have in advance.
        annealing: exponent that fades out samples which are already right.
        smoothing: label smoothing; needs `annealing = 0`.
        power: k >= 1 of the term that takes the place of cross-entropy; 0 keeps cross-entropy. Not with annealing or smoothing.
        share: how far it has, in [0, 1]. From random weights the term alone hardly moves, so training begins without it.

    Raises:
        ConfigError: if two of annealing, smoothing and power are asked for, or a power between 0 and 1.
    """
    if 0 < power < 1:
        raise ConfigError(f"loss.power: must be 0 or at least 1, got {power:g}")
    if power and (annealing or smoothing):
        raise ConfigError(
            f"loss: power ({power:g}) cannot be combined with annealing ({annealing:g}) or smoothing ({smoothing:g}); "
            "set it or both of them to 0"
        )
    if annealing and smoothing:
        raise ConfigError(
            f"loss: smoothing ({smoothing:g}) and annealing ({annealing:g}) cannot be combined; "
            "set one of them to 0"
        )
    if offset:
        logits = logits - offset * _is_label(labels, logits).to(logits.dtype)
    scaled = logits / temperature
    if power and share:
        log_p = _log_p(scaled, labels)
        rest = power - 1
        largest = rest**rest / power**power  # of p (1 - p)^rest, at p = 1 / power
        with torch.no_grad():
            weight = (log_p.exp() * _wrong(log_p) ** rest / largest) ** share
        return -temperature * (weight * log_p).mean()
    if not annealing:
        return temperature * functional.cross_entropy(scaled, labels, label_smoothing=smoothing)
    log_p = _log_p(scaled, labels)
    return -temperature * (_wrong(log_p) ** annealing * log_p).mean()


def emma(logits: Tensor, labels: Tensor, distances: Tensor, radius: float) -> Tensor:
    """Shift the logits as EMMA does (LiResNet, NeurIPS 2023): each rival is raised by what a perturbation can do.

    With `u_i = z_i - z_y` and `m_i = distances_yi`, rival `i` becomes `u_i + a_i radius m_i`, where
    `a_i = clip(-u_i / (radius m_i), 0.01, 1)` is not differentiated: the full shift for a rival that `radius` cannot bring to
    the boundary, less for one that it can. The result goes into `cross_entropy`.

    Args:
        logits: `(B, K)`.
        labels: `(B,)`.
        distances: `(K, K)`, differentiable.
        radius: l2 training radius, at least 0.

    Returns:
        Shifted logits `(B, K)`; the label's is 0.
    """
    u = logits - logits.gather(1, labels[:, None])
    reach = radius * distances[labels]
    with torch.no_grad():
        share = (-u / reach.clamp_min(1e-8)).clamp(0.01, 1.0)
    onehot = _is_label(labels, logits)
    return torch.where(onehot, torch.zeros_like(u), u + share * reach)


def cll(
    logits: Tensor,
    labels: Tensor,
    distances: Tensor,
    radius: float,
    *,
    slack: float,
    penalty: float = 0.0,
    two_sided: bool = True,
) -> Tensor:
    """The calibrated Lipschitz-margin loss (CLL, Losch et al. 2023), mean over the batch.

    Logits become signed distances to the pairwise boundaries in the input, `a_i = (z_i - z_y) / distances_yi`, and pass a
    logistic link whose width is calibrated to the radius: `sigma = 2 radius / Q`, `Q = 2 ln((2 - p) / p)`, which leaves the
    share p of the logistic mass, half of it in each tail, outside the band of +- radius. Rivals get `(a_i + radius) / sigma`,
    the label `-radius / sigma`. The distances are not differentiated; `penalty` times the square of the largest one is what
    keeps the constant small.

    Args:
        logits: `(B, K)`.
        labels: `(B,)`.
        distances: `(K, K)`, times the body's constant.
        radius: l2 margin eps in the input, above 0.
        slack: p, in (0, 1).
        penalty: lambda.
        two_sided: False leaves the label's logit at 0.

    Raises:
        ConfigError: if the radius or the slack is out of range.
    """
    if not radius > 0 or not 0 < slack < 1:
        raise ConfigError(
            f"loss: cll needs a radius above 0 and a slack in (0, 1), got {radius:g} and {slack:g}"
        )
    sigma = radius / math.log((2 - slack) / slack)
    onehot = _is_label(labels, logits)
    reach = distances.detach()[labels].masked_fill(onehot, 1.0).clamp_min(1e-12)
    signed = (logits - logits.gather(1, labels[:, None])) / reach
    calibrated = torch.where(onehot, -radius if two_sided else 0.0, signed + radius) / sigma
    loss = functional.cross_entropy(calibrated, labels)
    return loss + penalty * distances.max() ** 2 if penalty else loss


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """`z_y - max_{j != y} z_j` for each sample, shape `(B,)`; negative where the label is not the largest."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    rivals = logits.scatter(1, labels[:, None], float("-inf"))
    return right - rivals.max(dim=1).values


def _log_p(scaled: Tensor, labels: Tensor) -> Tensor:
    """`log p_y`, shape `(B,)`."""
    return functional.log_softmax(scaled, dim=1).gather(1, labels[:, None]).squeeze(1)


def _wrong(log_p: Tensor) -> Tensor:
    """`1 - p` without cancellation; the floor keeps the slope of a power below 1 finite where p is 1."""
    return (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)


def _is_label(labels: Tensor, logits: Tensor) -> Tensor:
    """Whether an entry `(B, K)` is the label's; unlike `functional.one_hot`, without looking at the values first."""
    return labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
