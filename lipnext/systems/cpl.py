"""CPL: residual layers that are gradient steps of convex potentials (Meunier et al., ICML 2022).

Each layer is 1-Lipschitz if its step is no longer than two over the smoothness of its potential, the squared norm of its
weight. The published code takes that norm from a power iteration, which comes from below; here it is proved before a network is
stored, and what is certified is the stored step.
"""

from torch import nn

from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import Estimate
from lipnext.core.experiment import AugmentSpec, DataSpec, Experiment, LossSpec, OptimSpec, TrainSpec
from lipnext.core.network import LipschitzNetwork
from lipnext.core.system import System
from lipnext.nn.convex_potential import ConvexPotential
from lipnext.nn.residual_network import residual_network

MARGIN = 0.7
"""Of the published hinge loss."""


def build(
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    width: int = 45,
    depth: int = 20,
    dense_depth: int = 7,
    inner: int = 5,
    dense_inner: int = 2048,
    patch: int = 1,
    unit_rows: bool = True,
    seed: int = 0,
) -> LipschitzNetwork:
    """Build the published network: convolutional layers, sums of 4 x 4 pixels, dense layers, head.

    Args:
        input_shape: `(c, H, W)` of the images.
        classes: number of classes K.
        width: channels, the missing ones zero; at least `c * patch^2`.
        depth: convolutional layers.
        dense_depth: dense layers, on `width * (H / 4) * (W / 4)` features.
        inner: channels inside a convolutional layer.
        dense_inner: features inside a dense layer.
        patch: side of the patches that become channels first, 1 (as published), 2 or 4.
        unit_rows: learn a head with rows of unit length; False takes the first K features for logits, the published default.
        seed: of the initial weights.

    Raises:
        ConfigError: if a value is out of range.
    """
    return residual_network(
        ConvexPotential,
        input_shape,
        classes,
        width=width,
        depth=depth,
        dense_depth=dense_depth,
        inner=inner,
        dense_inner=dense_inner,
        patch=patch,
        unit_rows=unit_rows,
        seed=seed,
    )


def published_estimate(network: nn.Module) -> Estimate:
    """1, as the published code takes for granted with steps from a power iteration."""
    return Estimate(value=1.0, method="1-Lipschitz layers, with norms from 100 power iterations")


def tiny() -> Experiment:
    """Two convolutional layers and a dense one on the digits: seconds on a CPU. It shows that everything works, no accuracy."""
    return Experiment(
        system="cpl",
        preset="tiny",
        summary="3 layers on the digits; seconds on a CPU",
        model=dict(PRESETS["tiny"]),
        data=DataSpec(name="digits"),
        train=TrainSpec(epochs=3, batch_size=64),
        optim=OptimSpec(euclidean="adam", euclidean_lr=1e-2),
        loss=LossSpec(name="hinge", offset=MARGIN),
    )


def digits() -> Experiment:
    """Scikit-learn's digits, 8x8: under a minute on two CPU cores."""
    return Experiment(
        system="cpl",
        preset="digits",
        summary="scikit-learn's digits; under a minute on 2 CPU cores",
        model=dict(PRESETS["digits"]),
        data=DataSpec(name="digits"),
        train=TrainSpec(epochs=40, batch_size=64),
        optim=OptimSpec(euclidean="adam", euclidean_lr=1e-2),
        loss=LossSpec(name="hinge", offset=MARGIN),
    )


def fashion_mnist_cpu() -> Experiment:
    """Fashion-MNIST (IDX files): about 5 minutes on two CPU cores."""
    return Experiment(
        system="cpl",
        preset="fashion-mnist-cpu",
        summary="Fashion-MNIST; about 5 minutes on 2 CPU cores",
        model=dict(PRESETS["fashion-mnist-cpu"]),
        data=DataSpec(name="idx"),
        augment=AugmentSpec(flip=True),
        train=TrainSpec(epochs=10, batch_size=256, precision="auto"),
        optim=OptimSpec(euclidean="adam", euclidean_lr=3e-3),
        loss=LossSpec(name="hinge", offset=MARGIN),
    )


def cifar10_cpu() -> Experiment:
    """CIFAR-10: about 5 minutes on two CPU cores."""
    return Experiment(
        system="cpl",
        preset="cifar10-cpu",
        summary="CIFAR-10; about 5 minutes on 2 CPU cores",
        model=dict(PRESETS["cifar10-cpu"]),
        data=DataSpec(name="parquet"),
        augment=AugmentSpec(flip=True, crop=2),
        train=TrainSpec(epochs=8, batch_size=256, precision="auto"),
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
    published=published_estimate,
    presets=PRESETS,
    experiments=EXPERIMENTS,
)
