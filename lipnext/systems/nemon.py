"""NEMON: implicit networks, well-posed in the l-infinity norm (Jafarpour et al., NeurIPS 2021). Their radii are in l-infinity.

An affine map, one equation `z = relu(A z + v)`, and a linear head. The matrix A is contracting by construction, dense or as a
convolution (`lipnext.nn.implicit`); the solver takes a number of steps that follows from A. Beyond the paper: the
convolution is corrected, the sensitivity is bounded unit by unit (`lipnext.bounds.matrix_measure`), EMMA trains for radii in
the l-infinity norm, and there is a certificate (`lipnext.certificates.implicit`).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lipnext.bounds.matrix_measure import comparison, diagonal, off_diagonal
from lipnext.certificates.implicit import ImplicitCertifier, sensitivity_up
from lipnext.core.bound import LipschitzBound
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import (
    AugmentSpec,
    CertifySpec,
    DataSpec,
    Experiment,
    LossSpec,
    OptimSpec,
    TrainSpec,
)
from lipnext.core.implicit import implicit_parts
from lipnext.core.network import LipschitzNetwork, signed_radii
from lipnext.core.system import System
from lipnext.nn.convolution import Convolution
from lipnext.nn.dense import Dense
from lipnext.nn.head import PlainHead
from lipnext.nn.implicit import ImplicitConvolution, ImplicitDense
from lipnext.nn.reshape import Flatten

STEPS = 10
"""Refinements of the sensitivities in a loss."""


class NemonNetwork(LipschitzNetwork):
    """An implicit network; constants and distances are in the l-infinity norm."""

    def sensitivity(self) -> Tensor:
        """Estimate h with `|z(x) - z(x')| <= h ||x - x'||`, unit by unit, of the shape of one z; differentiable."""
        before, affine, implicit = implicit_parts(self)
        ones = torch.ones(1, *self.input_shape, dtype=affine.weight.dtype, device=affine.weight.device)
        for layer in before:
            ones = layer(ones)
        with torch.autocast(ones.device.type, enabled=False):
            forcing = affine.product(ones, affine.weight.abs())
            return comparison(implicit.product, implicit.matrix(), forcing, STEPS)

    def published_constant(self) -> Tensor:
        """Return `||C|| ||B|| / (1 - mu_+)` in the l-infinity norm, which the published regulariser makes small."""
        _, affine, implicit = implicit_parts(self)
        a = implicit.matrix()
        measure = (diagonal(a) + off_diagonal(a).abs().flatten(1).sum(1)).max()
        into = affine.weight.abs().flatten(1).sum(1).max()
        return self.head.weight.abs().sum(1).max() * into / (1 - measure.clamp_min(0))

    def lipschitz_bound(self) -> LipschitzBound:
        """Prove the constant of the features, the largest sensitivity of a unit."""
        return LipschitzBound(value=float(sensitivity_up(self).max()), norm=float("inf"), proof="comparison")

    def estimate_lipschitz(self) -> Tensor:
        """The largest sensitivity; for losses alone."""
        return self.sensitivity().max()

    def estimate_distances(self) -> Tensor:
        """Constants of `y_i - y_j`, `|c_i - c_j| h`, shape `(K, K)`, differentiable; for losses alone."""
        h, rows = self.sensitivity().flatten(), self.head.weight
        return torch.stack([(rows - row).abs() @ h for row in rows])

    def radius_estimator(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of images and labels that estimates signed radii in the l-infinity norm."""
        frozen, distances = self.materialise(), self.estimate_distances().detach()

        @torch.no_grad()
        def estimate(images: Tensor, labels: Tensor) -> Tensor:
            return signed_radii(frozen(images), labels, distances)

        return estimate


def build(
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    kind: str = "dense",
    width: int = 100,
    kernel: int = 5,
    stride: int = 1,
    measure: float = 0.0,
    seed: int = 0,
) -> NemonNetwork:
    """Build the affine map, the implicit layer and the head.

    Args:
        input_shape: `(c, H, W)` of the images.
        classes: number of classes K.
        kind: "dense" or "convolution", of both layers.
        width: units, or channels.
        kernel: side of both kernels, odd; not for dense layers.
        stride: of the affine convolution; not for dense layers.
        measure: m, below 1: the smaller, the faster the iteration and the smaller the constant, and the weaker the feedback.
        seed: of the initial weights.

    Raises:
        ConfigError: if the kind is unknown, a size is not usable or the measure not below 1.
    """
    if kind not in ("dense", "convolution"):
        raise ConfigError(f"model.kind: must be dense or convolution, got {kind!r}")
    if min(width, kernel, stride) < 1:
        raise ConfigError(
            f"model: width, kernel and stride must be at least 1, got {width}, {kernel} and {stride}"
        )
    generator = torch.Generator().manual_seed(seed)
    channels, height, side = input_shape
    if kind == "dense":
        affine = Dense(channels * height * side, width, generator=generator)
        solve = ImplicitDense(width, measure=measure, generator=generator)
        return NemonNetwork(
            [Flatten(), affine, solve], PlainHead(width, classes, generator=generator), input_shape
        )
    first = Convolution(
        channels, width, kernel, (height, side), stride=stride, padding=kernel // 2, generator=generator
    )
    implicit = ImplicitConvolution(width, kernel, measure=measure, generator=generator)
    rows, columns = first.output_size
    head = PlainHead(width * rows * columns, classes, generator=generator)
    return NemonNetwork([first, implicit, Flatten()], head, input_shape)


def nemon(
    network: NemonNetwork, images: Tensor, labels: Tensor, *, spec: LossSpec, radius: float, progress: float
) -> Tensor:
    """The published loss: cross-entropy and `penalty` times `||C|| ||B|| / (1 - mu)`; radius and progress do not matter."""
    loss = functional.cross_entropy(network(images), labels)
    return loss + spec.penalty * network.published_constant()


def tiny() -> Experiment:
    """A dense network on the digits: seconds on a CPU. It shows that everything works, no accuracy."""
    return _experiment(
        "tiny",
        "a small dense network on the digits; seconds on a CPU",
        DataSpec(name="digits"),
        TrainSpec(epochs=3, batch_size=64),
        radius="2/255",
        lr=5e-3,
    )


def digits() -> Experiment:
    """Scikit-learn's digits, 8x8: a minute on two CPU cores; a larger `loss.radius` trades clean accuracy for radii."""
    return _experiment(
        "digits",
        "scikit-learn's digits; a minute on 2 CPU cores",
        DataSpec(name="digits"),
        TrainSpec(epochs=40, batch_size=64),
        radius="2/255",
        lr=5e-3,
    )


def fashion_mnist_cpu() -> Experiment:
    """Fashion-MNIST (IDX files), dense: some minutes on two CPU cores."""
    return _experiment(
        "fashion-mnist-cpu",
        "Fashion-MNIST; some minutes on 2 CPU cores",
        DataSpec(name="idx"),
        TrainSpec(epochs=10, batch_size=256),
        radius="0.01",
        lr=1e-2,
        augment=AugmentSpec(flip=True),
    )


def mnist() -> Experiment:
    """MNIST, the published dense network of 100 units: minutes on a CPU. No table of the paper is at hand to compare with."""
    return _experiment(
        "mnist", "MNIST; minutes on 2 CPU cores", DataSpec(name="idx"), TrainSpec(epochs=40, batch_size=100)
    )


def mnist_convolution() -> Experiment:
    """MNIST, the published 64 channels, corrected: hours on a CPU. No table of the paper is at hand to compare with."""
    return _experiment(
        "mnist-convolution",
        "MNIST, an implicit convolution; a GPU",
        DataSpec(name="idx"),
        TrainSpec(epochs=40, batch_size=100, device="cuda"),
    )


def cifar10() -> Experiment:
    """CIFAR-10, the published 81 channels, corrected, 40 epochs on a GPU. No table of the paper is at hand to compare with.

    Published: normalised images, average pooling of 4 x 4 before the head, no augmentation, steps of the rate (here a cosine).
    """
    return _experiment(
        "cifar10",
        "CIFAR-10, an implicit convolution; hours on one GPU",
        DataSpec(name="parquet"),
        TrainSpec(epochs=40, batch_size=128, device="cuda"),
    )


def _experiment(
    name: str,
    summary: str,
    data: DataSpec,
    train: TrainSpec,
    *,
    radius: str | None = None,
    lr: float = 1e-3,
    augment: AugmentSpec | None = None,
) -> Experiment:
    """EMMA up to `radius` in the l-infinity norm, or the published loss where there is none."""
    loss = LossSpec(name="nemon", penalty=1e-3)
    if radius is not None:
        loss = LossSpec(radius=radius, ramp_from=0.0, ramp_to=1.0)
    return Experiment(
        system="nemon",
        preset=name,
        summary=summary,
        model=dict(PRESETS[name]),
        data=data,
        augment=augment or AugmentSpec(),
        train=train,
        optim=OptimSpec(euclidean="adam", euclidean_lr=lr),
        loss=loss,
        certify=CertifySpec(eps=("2/255", "0.01", "8/255", "0.1")),
    )


PRESETS: dict[str, dict[str, int | float | str]] = {
    "tiny": {"width": 24},
    "digits": {"width": 100},
    "fashion-mnist-cpu": {"width": 256},
    "mnist": {"width": 100},
    "mnist-convolution": {"kind": "convolution", "width": 64},
    "cifar10": {"kind": "convolution", "width": 81},
}

EXPERIMENTS = {
    "tiny": tiny,
    "digits": digits,
    "fashion-mnist-cpu": fashion_mnist_cpu,
    "mnist": mnist,
    "mnist-convolution": mnist_convolution,
    "cifar10": cifar10,
}

SYSTEM = System(
    summary="implicit networks, well-posed by construction; radii in the l-infinity norm",
    reference="NEMON, NeurIPS 2021",
    norm=float("inf"),
    build=build,
    certify=ImplicitCertifier,
    losses={"nemon": nemon},
    presets=PRESETS,
    experiments=EXPERIMENTS,
)
