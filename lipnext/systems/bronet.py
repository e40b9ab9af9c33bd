"""BRONet: block-reflector convolutions on LiResNet's skeleton, EMMA with logit annealing (Lai et al., ICML 2025).

Neck and dense layers are block reflectors too, as in the published Tiny-ImageNet model; the published CIFAR models have
Cholesky-orthogonal ones there.
"""

import torch
from torch import nn

from lipnext.certificates.margin import MarginCertifier
from lipnext.core.bound import Estimate
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import AugmentSpec, DataSpec, Experiment, LossSpec, OptimSpec, TrainSpec
from lipnext.core.laptop import laptop_run
from lipnext.core.module import LipschitzModule
from lipnext.core.network import LipschitzNetwork
from lipnext.core.system import System
from lipnext.nn.activation import MaxMin
from lipnext.nn.block_reflector import BlockReflectorConvolution, BlockReflectorMixing
from lipnext.nn.convolution import Convolution
from lipnext.nn.head import UnitRowHead
from lipnext.nn.position import Centre
from lipnext.nn.power_iteration import estimate_convolution_norm
from lipnext.nn.reshape import Flatten, Unshuffle

STEPS = 500
"""Power iterations by which the published code states the norm of the stem."""


def build(
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    width: int = 64,
    depth: int = 4,
    rank: float = 0.5,
    features: int = 256,
    dense: int = 2,
    kernel: int = 5,
    stride: int = 4,
    neck: int = 4,
    seed: int = 0,
) -> LipschitzNetwork:
    """Build the network `stem -> depth BRO convolutions -> neck -> dense BRO layers -> unit-row head`, MaxMin after each.

    Args:
        input_shape: `(c, H, W)` of the images.
        classes: number of classes K.
        width: channels of the convolutions, even.
        depth: number of BRO convolutions.
        rank: of the reflectors, as a share of the channels, in (0, 1); 1/2 and 1/8 are published.
        features: of the dense layers, even.
        dense: number of dense layers after the neck.
        kernel: side of the stem's kernel; the stem is an unconstrained convolution.
        stride: of the stem.
        neck: side of the patches that the neck makes one position of, 4 as published.
        seed: of the initial weights.

    Raises:
        ConfigError: if a value is out of range.
    """
    channels, height, breadth = input_shape
    if min(width, depth, features, dense, kernel, stride, neck) < 1 or width % 2 or features % 2:
        raise ConfigError(
            "model: width, depth, features, dense, kernel, stride and neck must be at least 1, width and features "
            f"even, got {width}, {depth}, {features}, {dense}, {kernel}, {stride} and {neck}"
        )
    if not 0 < rank < 1 or kernel < stride:
        raise ConfigError(
            f"model: rank must lie in (0, 1) and kernel be at least stride, got {rank}, {kernel} and {stride}"
        )
    generator = torch.Generator().manual_seed(seed)
    stem = Convolution(
        channels,
        width,
        kernel,
        (height, breadth),
        stride=stride,
        padding=(kernel - stride + 1) // 2,
        generator=generator,
    )
    layers: list[LipschitzModule] = [Centre(input_shape), stem, MaxMin()]
    for _ in range(depth):
        reflector = BlockReflectorConvolution(
            width, _rank(rank, width), 3, stem.output_size, generator=generator
        )
        layers += [reflector, MaxMin()]

    def mixing(given: int, wanted: int, size: tuple[int, int]) -> BlockReflectorMixing:
        n = min(_rank(rank, max(given, wanted)), wanted)
        return BlockReflectorMixing(given, wanted, n, size, generator=generator)

    rows, columns = (-(-side // neck) for side in stem.output_size)
    layers += [Unshuffle(neck), mixing(width * neck**2, width, (rows, columns)), MaxMin()]
    # With one position left, the mixing of its channels is a dense layer.
    side = max(rows, columns)
    layers += [Unshuffle(side), mixing(width * side**2, features, (1, 1)), MaxMin()]
    for _ in range(dense):
        layers += [mixing(features, features, (1, 1)), MaxMin()]
    return LipschitzNetwork(
        [*layers, Flatten()], UnitRowHead(features, classes, generator=generator), input_shape
    )


def _rank(share: float, channels: int) -> int:
    return max(1, int(share * channels))


def published(network: nn.Module) -> Estimate:
    """State what the published code does: 500 power iterations for the stem, from all ones, and 1 for every reflector."""
    assert isinstance(network, LipschitzNetwork)
    stem = network.body[1]
    assert isinstance(stem, Convolution)
    start = stem.weight.new_ones(1, stem.weight.shape[1], *stem.input_size)
    norm, _ = estimate_convolution_norm(
        stem.weight.detach(), start, STEPS, stride=stem.stride, padding=stem.padding
    )
    return Estimate(
        value=norm.item(), method=f"power iteration on the stem, {STEPS} steps, and 1 for the rest"
    )


def tiny() -> Experiment:
    """Two reflectors of 16 channels on the digits: seconds on a CPU. It shows that everything works, no accuracy."""
    return laptop_run(
        "bronet",
        "tiny",
        PRESETS["tiny"],
        "2 convolutions of width 16 on the digits; seconds on a CPU",
        epochs=3,
        optim=OptimSpec(euclidean_lr=1e-2),
        loss=ANNEALED,
    )


def digits() -> Experiment:
    """Scikit-learn's digits, 8x8: under a minute on two CPU cores."""
    return laptop_run(
        "bronet",
        "digits",
        PRESETS["digits"],
        "scikit-learn's digits; under a minute on 2 CPU cores",
        epochs=30,
        optim=OptimSpec(euclidean_lr=3e-3),
        loss=ANNEALED,
    )


def fashion_mnist_cpu() -> Experiment:
    """Fashion-MNIST (IDX files): minutes on two CPU cores."""
    return laptop_run(
        "bronet",
        "fashion-mnist-cpu",
        PRESETS["fashion-mnist-cpu"],
        "Fashion-MNIST; minutes on 2 CPU cores",
        epochs=10,
        optim=OptimSpec(euclidean_lr=1e-2, clip=3.0),
        loss=ANNEALED,
    )


def cifar10_cpu() -> Experiment:
    """CIFAR-10: minutes on two CPU cores."""
    return laptop_run(
        "bronet",
        "cifar10-cpu",
        PRESETS["cifar10-cpu"],
        "CIFAR-10; minutes on 2 CPU cores",
        epochs=10,
        optim=OptimSpec(euclidean_lr=1e-2, clip=3.0),
        loss=ANNEALED,
    )


def _recipe(name: str, data: DataSpec, crop: int) -> Experiment:
    """The published recipe: NAdam within Lookahead, 800 epochs, 20 of them warm-up, gradients of norm at most 3."""
    return Experiment(
        system="bronet",
        preset=name,
        summary="a day or more on one or two data-centre GPUs; the published numbers are not reproduced here",
        model=dict(PRESETS[name]),
        data=data,
        augment=AugmentSpec(flip=True, crop=crop, randaugment=0.5),
        train=TrainSpec(epochs=800, batch_size=256, device="cuda", evaluate_every=5, checkpoint_every=5),
        optim=OptimSpec(euclidean_lr=1e-3, weight_decay=4e-5, warmup=0.025, clip=3.0, lookahead=6),
        loss=ANNEALED,
    )


def cifar10() -> Experiment:
    """CIFAR-10, 12 x 512, 52M (published 68M). Reported with annealing, not reproduced here: 81.6 / 70.6 / 57.2 / 42.5."""
    return _recipe("cifar10", DataSpec(name="parquet"), crop=4)


def cifar100() -> Experiment:
    """CIFAR-100, 12 x 512, 52M (published 68M). Reported with annealing, not reproduced here: 54.3 / 40.2 / 29.1 / 20.3."""
    return _recipe("cifar100", DataSpec(name="parquet"), crop=4)


def tiny_imagenet() -> Experiment:
    """Tiny-ImageNet, 6 x 512, 75M. Reported with annealing, not reproduced here: 41.2 / 29.0 / 19.0 / 12.1."""
    return _recipe("tiny-imagenet", DataSpec(name="folder", size=64, channels=3), crop=8)


ANNEALED = LossSpec(name="emma", temperature=0.75, offset=2.0, annealing=5.0, ramp_to=3.0)
"""The published loss: EMMA's shifted logits with an offset, annealed where they are right already."""

PRESETS: dict[str, dict[str, int | float]] = {
    "tiny": {
        "width": 16,
        "depth": 2,
        "rank": 0.5,
        "features": 32,
        "dense": 1,
        "kernel": 2,
        "stride": 2,
        "neck": 2,
    },
    "digits": {
        "width": 32,
        "depth": 3,
        "rank": 0.5,
        "features": 128,
        "dense": 1,
        "kernel": 3,
        "stride": 2,
        "neck": 2,
    },
    "fashion-mnist-cpu": {
        "width": 64,
        "depth": 6,
        "rank": 0.5,
        "features": 256,
        "dense": 2,
        "kernel": 5,
        "stride": 4,
    },
    "cifar10-cpu": {
        "width": 64,
        "depth": 6,
        "rank": 0.5,
        "features": 256,
        "dense": 2,
        "kernel": 5,
        "stride": 4,
    },
    "cifar10": {
        "width": 512,
        "depth": 12,
        "rank": 0.5,
        "features": 2048,
        "dense": 8,
        "kernel": 5,
        "stride": 2,
    },
    "cifar100": {
        "width": 512,
        "depth": 12,
        "rank": 0.5,
        "features": 2048,
        "dense": 8,
        "kernel": 5,
        "stride": 2,
    },
    "tiny-imagenet": {
        "width": 512,
        "depth": 6,
        "rank": 0.125,
        "features": 2048,
        "dense": 4,
        "kernel": 5,
        "stride": 2,
    },
}

EXPERIMENTS = {
    "tiny": tiny,
    "digits": digits,
    "fashion-mnist-cpu": fashion_mnist_cpu,
    "cifar10-cpu": cifar10_cpu,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny-imagenet": tiny_imagenet,
}

SYSTEM = System(
    summary="block-reflector convolutions by frequency, unconstrained stem, EMMA with logit annealing",
    reference="BRONet, ICML 2025",
    norm=2.0,
    build=build,
    certify=MarginCertifier,
    published=published,
    presets=PRESETS,
    experiments=EXPERIMENTS,
)
