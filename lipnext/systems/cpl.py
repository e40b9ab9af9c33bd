"""CPL: residual layers that are gradient steps of convex potentials (Meunier et al., ICML 2022).

Each layer is 1-Lipschitz if its step is no longer than two over the smoothness of its potential, the squared norm of its
weight. The published code takes that norm from a power iteration, which comes from below; here it is proved before a network is
stored, and what is certified is the stored step.
"""

from torch import nn

from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import Estimate
from lipnext.core.experiment import AugmentSpec, DataSpec, Experiment, LossSpec, OptimSpec, TrainSpec
from lipnext.core.laptop import laptop_run
from lipnext.core.system import System
from lipnext.nn.convex_potential import ConvexPotential
from lipnext.nn.residual_network import residual_network

MARGIN = 0.7
"""Of the published hinge loss."""


build = residual_network(ConvexPotential)


def published(network: nn.Module) -> Estimate:
    """1, as the published code takes for granted with steps from a power iteration."""
    return Estimate(value=1.0, method="1-Lipschitz layers, with norms from 100 power iterations")


def tiny() -> Experiment:
    """Two convolutional layers and a dense one on the digits: seconds on a CPU. It shows that everything works, no accuracy."""
    return laptop_run(
        "cpl",
        "tiny",
        PRESETS["tiny"],
        "3 layers on the digits; seconds on a CPU",
        epochs=3,
        optim=OptimSpec(euclidean="adam", euclidean_lr=1e-2),
        loss=LossSpec(name="hinge", offset=MARGIN),
    )


def digits() -> Experiment:
    """Scikit-learn's digits, 8x8: under a minute on two CPU cores."""
    return laptop_run(
        "cpl",
        "digits",
        PRESETS["digits"],
        "scikit-learn's digits; under a minute on 2 CPU cores",
        epochs=40,
        optim=OptimSpec(euclidean="adam", euclidean_lr=1e-2),
        loss=LossSpec(name="hinge", offset=MARGIN),
    )


def fashion_mnist_cpu() -> Experiment:
    """Fashion-MNIST (IDX files): about 5 minutes on two CPU cores."""
    return laptop_run(
        "cpl",
        "fashion-mnist-cpu",
        PRESETS["fashion-mnist-cpu"],
        "Fashion-MNIST; about 5 minutes on 2 CPU cores",
        epochs=10,
        optim=OptimSpec(euclidean="adam", euclidean_lr=3e-3),
        loss=LossSpec(name="hinge", offset=MARGIN),
    )


def cifar10_cpu() -> Experiment:
    """CIFAR-10: about 5 minutes on two CPU cores."""
    return laptop_run(
        "cpl",
        "cifar10-cpu",
        PRESETS["cifar10-cpu"],
        "CIFAR-10; about 5 minutes on 2 CPU cores",
        epochs=8,
        optim=OptimSpec(euclidean="adam", euclidean_lr=3e-3),
        loss=LossSpec(name="hinge", offset=MARGIN),
    )


def _recipe(name: str, model: str) -> Experiment:
    """The published recipe, with our warm-up and cosine for its triangular schedule, and crops from zeros for reflections."""
    return Experiment(
        system="cpl",
        preset=name,
        summary="one or more data-centre GPUs; the published numbers are not reproduced here",
        model=dict(PRESETS[model]),
        data=DataSpec(name="parquet", validation=0.02),
        augment=AugmentSpec(flip=True, crop=4),
        train=TrainSpec(epochs=200, batch_size=256, device="cuda", evaluate_every=5),
        optim=OptimSpec(euclidean="adam", euclidean_lr=1e-3, warmup=0.4),
        loss=LossSpec(name="hinge", offset=MARGIN),
    )


def cifar10_small() -> Experiment:
    """CIFAR-10, CPL-S, 41M: hours on one GPU. No number of the paper was at hand to quote."""
    return _recipe("cifar10-small", "small")


def cifar10_medium() -> Experiment:
    """CIFAR-10, CPL-M, 78M: hours on one GPU. No number of the paper was at hand to quote."""
    return _recipe("cifar10-medium", "medium")


def cifar10_large() -> Experiment:
    """CIFAR-10, CPL-L, 118M: hours on one GPU. No number of the paper was at hand to quote."""
    return _recipe("cifar10-large", "large")


def cifar10_xlarge() -> Experiment:
    """CIFAR-10, CPL-XL, 236M: a day on one GPU. Reported, not reproduced here: 78.5 / 64.4 / 48.0 / 33.0.

    The numbers are those of Prach et al. (CVPR 2024), table 4: clean and certified at 36, 72 and 108 / 255.
    """
    return _recipe("cifar10-xlarge", "xlarge")


def cifar100_xlarge() -> Experiment:
    """CIFAR-100, CPL-XL, 236M: a day on one GPU. No number of the paper was at hand to quote."""
    return _recipe("cifar100-xlarge", "xlarge")


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
    "cifar100-xlarge": cifar100_xlarge,
}

SYSTEM = System(
    summary="residual layers that are gradient steps of convex potentials",
    reference="Scalable Lipschitz Residual Networks with Convex Potential Flows, ICML 2022",
    norm=2.0,
    build=build,
    certify=MarginCertifier,
    published=published,
    presets=PRESETS,
    experiments=EXPERIMENTS,
)
