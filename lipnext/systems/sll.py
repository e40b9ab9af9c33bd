"""SLL: residual layers whose scale makes them 1-Lipschitz by a diagonal matrix inequality (Araujo et al., ICLR 2023).

The layer is the one of CPL with a scale of its own for every row, from sums of the rows of `W W^T` in place of a spectral norm:
nothing is iterated, and the bound is a theorem up to rounding, which is counted here. It is the version of the erratum; the
first one let the scale of a row grow without limit as its weight `q` went to zero.
"""

import math

from torch import nn

from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import Estimate
from lipnext.core.experiment import AugmentSpec, DataSpec, Experiment, LossSpec, OptimSpec, TrainSpec
from lipnext.core.laptop import laptop_run
from lipnext.core.system import System
from lipnext.nn.residual_network import residual_network
from lipnext.nn.sdp_residual import SdpResidual

OFFSET = 1.5 * math.sqrt(2)
"""Of the published loss, at the temperature 1 / 4."""


build = residual_network(SdpResidual)


def published(network: nn.Module) -> Estimate:
    """1, as the published code states: a theorem in real arithmetic, which is not the arithmetic of its float32 scales."""
    return Estimate(value=1.0, method="1-Lipschitz layers in real arithmetic, scales formed in float32")


def tiny() -> Experiment:
    """Two convolutional layers and a dense one on the digits: seconds on a CPU. It shows that everything works, no accuracy."""
    return laptop_run(
        "sll",
        "tiny",
        PRESETS["tiny"],
        "3 layers on the digits; seconds on a CPU",
        epochs=3,
        optim=OptimSpec(euclidean="adam", euclidean_lr=1e-2),
        loss=LossSpec(name="cross-entropy", temperature=0.25, offset=OFFSET),
    )


def digits() -> Experiment:
    """Scikit-learn's digits, 8x8: under a minute on two CPU cores."""
    return laptop_run(
        "sll",
        "digits",
        PRESETS["digits"],
        "scikit-learn's digits; under a minute on 2 CPU cores",
        epochs=40,
        optim=OptimSpec(euclidean="adam", euclidean_lr=1e-2),
        loss=LossSpec(name="cross-entropy", temperature=0.25, offset=OFFSET),
    )


def fashion_mnist_cpu() -> Experiment:
    """Fashion-MNIST (IDX files): about 5 minutes on two CPU cores."""
    return laptop_run(
        "sll",
        "fashion-mnist-cpu",
        PRESETS["fashion-mnist-cpu"],
        "Fashion-MNIST; about 5 minutes on 2 CPU cores",
        epochs=7,
        optim=OptimSpec(euclidean="adam", euclidean_lr=1e-2),
        loss=LossSpec(name="cross-entropy", temperature=0.25, offset=OFFSET),
    )


def cifar10_cpu() -> Experiment:
    """CIFAR-10: about 5 minutes on two CPU cores."""
    return laptop_run(
        "sll",
        "cifar10-cpu",
        PRESETS["cifar10-cpu"],
        "CIFAR-10; about 5 minutes on 2 CPU cores",
        epochs=6,
        optim=OptimSpec(euclidean="adam", euclidean_lr=1e-2),
        loss=LossSpec(name="cross-entropy", temperature=0.25, offset=OFFSET),
    )


def _recipe(name: str, model: str, data: DataSpec, crop: int) -> Experiment:
    """The published recipe, with our warm-up and cosine for its triangular schedule, crops from zeros, no change of colours."""
    return Experiment(
        system="sll",
        preset=name,
        summary="one or more data-centre GPUs; the published numbers are not reproduced here",
        model=dict(PRESETS[model]),
        data=data,
        augment=AugmentSpec(flip=True, crop=crop),
        train=TrainSpec(epochs=1000, batch_size=256, device="cuda", evaluate_every=5),
        optim=OptimSpec(euclidean="adam", euclidean_lr=1e-2, betas=(0.5, 0.9), warmup=0.4),
        loss=LossSpec(name="cross-entropy", temperature=0.25, offset=OFFSET),
    )


def cifar10_small() -> Experiment:
    """CIFAR-10, SLL-S, 41M: hours on one GPU. Reported before the erratum, not reproduced here: 62.6 at 36 / 255."""
    return _recipe("cifar10-small", "small", _PARQUET, 4)


def cifar10_medium() -> Experiment:
    """CIFAR-10, SLL-M, 78M: hours on one GPU. No number of the paper was at hand to quote."""
    return _recipe("cifar10-medium", "medium", _PARQUET, 4)


def cifar10_large() -> Experiment:
    """CIFAR-10, SLL-L, 118M: hours on one GPU. No number of the paper was at hand to quote."""
    return _recipe("cifar10-large", "large", _PARQUET, 4)


def cifar10_xlarge() -> Experiment:
    """CIFAR-10, SLL-XL, 236M: a day on one GPU. Reported, not reproduced here: 64.8 at 36 / 255 (corrected).

    Before the erratum: 73.3 / 65.8 / 58.4 / 51.3, clean and certified at 36, 72 and 108 / 255.
    """
    return _recipe("cifar10-xlarge", "xlarge", _PARQUET, 4)


def cifar100_small() -> Experiment:
    """CIFAR-100, SLL-S, 41M: hours on one GPU. Reported before the erratum, not reproduced here: 44.9 / 34.7 at 36 / 255."""
    return _recipe("cifar100-small", "small", _PARQUET, 4)


def cifar100_xlarge() -> Experiment:
    """CIFAR-100, SLL-XL, 236M: a day on one GPU. Reported before the erratum, not reproduced here: 46.5 / 36.5 at 36 / 255."""
    return _recipe("cifar100-xlarge", "xlarge", _PARQUET, 4)


def tiny_imagenet_small() -> Experiment:
    """Tiny-ImageNet, SLL-S, 165M: days on a GPU. Reported before the erratum, not reproduced here: 26.6 / 19.5 at 36/255."""
    data = DataSpec(name="folder", size=64, channels=3, validation=0.02)
    return _recipe("tiny-imagenet-small", "small", data, 8)


_PARQUET = DataSpec(name="parquet", validation=0.02)

PRESETS: dict[str, dict[str, bool | int | float | str]] = {
    "tiny": {"width": 8, "depth": 2, "dense_depth": 1, "dense_inner": 32},
    "digits": {"width": 32, "depth": 4, "dense_depth": 3, "dense_inner": 256},
    "fashion-mnist-cpu": {
        "width": 32,
        "depth": 6,
        "dense_depth": 4,
        "inner": 16,
        "dense_inner": 512,
        "patch": 2,
    },
    "cifar10-cpu": {"width": 32, "depth": 6, "dense_depth": 4, "inner": 16, "dense_inner": 512, "patch": 2},
    "small": {"width": 45, "depth": 20, "dense_depth": 7},
    "medium": {"width": 60, "depth": 30, "dense_depth": 10},
    "large": {"width": 90, "depth": 50, "dense_depth": 10},
    "xlarge": {"width": 120, "depth": 70, "dense_depth": 15},
}

EXPERIMENTS = {
    "tiny": tiny,
    "digits": digits,
    "fashion-mnist-cpu": fashion_mnist_cpu,
    "cifar10-cpu": cifar10_cpu,
    "cifar10-small": cifar10_small,
    "cifar10-medium": cifar10_medium,
    "cifar10-large": cifar10_large,
    "cifar10-xlarge": cifar10_xlarge,
    "cifar100-small": cifar100_small,
    "cifar100-xlarge": cifar100_xlarge,
    "tiny-imagenet-small": tiny_imagenet_small,
}

SYSTEM = System(
    summary="residual layers scaled by row sums of W W^T, the corrected version",
    reference="A Unified Algebraic Perspective on Lipschitz Neural Networks, ICLR 2023",
    norm=2.0,
    build=build,
    certify=MarginCertifier,
    published=published,
    presets=PRESETS,
    experiments=EXPERIMENTS,
)
