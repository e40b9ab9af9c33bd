"""Cayley: circular convolutions that are orthogonal at every frequency (Trockman & Kolter, ICLR 2021).

The network is the trunk of "1-Lipschitz Layers Compared" (CVPR 2024), with unit rows in place of its last layer, a square
matrix of which K rows are used: both have rows of norm at most 1, and the certificate asks for their distances alone.
"""

import torch
from torch import nn

from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import Estimate
from lipnext.core.experiment import AugmentSpec, DataSpec, Experiment, LossSpec, OptimSpec, TrainSpec
from lipnext.core.laptop import laptop_run
from lipnext.core.system import System
from lipnext.nn.cayley import CayleyConvolution
from lipnext.nn.trunk import trunk_network


def _convolution(
    channels: int, kernel: int, size: tuple[int, int], generator: torch.Generator
) -> CayleyConvolution:
    return CayleyConvolution(channels, channels, kernel, size, generator=generator)


build = trunk_network(_convolution)


def published(network: nn.Module) -> Estimate:
    """State 1, as the published code does: the Cayley map is orthogonal in exact arithmetic."""
    return Estimate(value=1.0, method="the constant 1 of exact arithmetic")


def tiny() -> Experiment:
    """Two blocks of one convolution on the digits: seconds on a CPU. It shows that everything works, no accuracy."""
    return laptop_run(
        "cayley",
        "tiny",
        PRESETS["tiny"],
        "2 blocks of width 16 on the digits; seconds on a CPU",
        epochs=3,
        optim=OptimSpec(euclidean_lr=1e-2),
        loss=OFFSET,
    )


def digits() -> Experiment:
    """Scikit-learn's digits, 8x8: under a minute on two CPU cores."""
    return laptop_run(
        "cayley",
        "digits",
        PRESETS["digits"],
        "scikit-learn's digits; under a minute on 2 CPU cores",
        epochs=30,
        optim=OptimSpec(euclidean_lr=3e-3),
        loss=OFFSET,
    )


def fashion_mnist_cpu() -> Experiment:
    """Fashion-MNIST (IDX files): minutes on two CPU cores, with NAdam in place of the published SGD."""
    return laptop_run(
        "cayley",
        "fashion-mnist-cpu",
        PRESETS["fashion-mnist-cpu"],
        "Fashion-MNIST; minutes on 2 CPU cores",
        epochs=10,
        optim=OptimSpec(euclidean_lr=3e-3),
        loss=OFFSET,
    )


def cifar10_cpu() -> Experiment:
    """CIFAR-10: minutes on two CPU cores, with NAdam in place of the published SGD."""
    return laptop_run(
        "cayley",
        "cifar10-cpu",
        PRESETS["cifar10-cpu"],
        "CIFAR-10; minutes on 2 CPU cores",
        epochs=10,
        optim=OptimSpec(euclidean_lr=3e-3),
        loss=OFFSET,
    )


def cifar10() -> Experiment:
    """CIFAR-10, size M (w = 64): 24 h on one A100. Reported (CVPR 2024), not reproduced here: clean 74.4, 61.1 at 36/255."""
    return Experiment(
        system="cayley",
        preset="cifar10",
        summary="a day on one data-centre GPU; the published numbers are not reproduced here",
        model=dict(PRESETS["cifar10"]),
        data=DataSpec(name="parquet"),
        augment=AugmentSpec(flip=True, crop=4),
        train=TrainSpec(epochs=840, batch_size=256, device="cuda", evaluate_every=20, checkpoint_every=20),
        optim=OptimSpec(euclidean="sgd", euclidean_lr=0.0130, weight_decay=5.6e-6, momentum=0.9, warmup=0.3),
        loss=OFFSET,
    )


OFFSET = LossSpec(name="cross-entropy", temperature=0.25, offset=2 * 2**0.5 * 36 / 255)
"""The published loss: a margin of sqrt(2) times twice the radius 36/255 is asked for in advance."""

PRESETS: dict[str, dict[str, int | float]] = {
    "tiny": {"width": 16, "blocks": 2, "convolutions": 1, "patch": 2},
    "digits": {"width": 64, "blocks": 2, "convolutions": 2, "patch": 2},
    "fashion-mnist-cpu": {"width": 64, "blocks": 3, "convolutions": 2, "patch": 4},
    "cifar10-cpu": {"width": 64, "blocks": 3, "convolutions": 2, "patch": 4},
    "cifar10": {"width": 64, "blocks": 5, "convolutions": 5, "patch": 1},
}

EXPERIMENTS = {
    "tiny": tiny,
    "digits": digits,
    "fashion-mnist-cpu": fashion_mnist_cpu,
    "cifar10-cpu": cifar10_cpu,
    "cifar10": cifar10,
}

SYSTEM = System(
    summary="circular convolutions, orthogonal by the Cayley map of every frequency, MaxMin",
    reference="Cayley layers, ICLR 2021",
    norm=2.0,
    build=build,
    certify=MarginCertifier,
    published=published,
    presets=PRESETS,
    experiments=EXPERIMENTS,
)
