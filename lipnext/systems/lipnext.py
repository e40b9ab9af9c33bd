"""LipNeXt: orthogonal matrices on their manifold, spatial shifts instead of convolutions, beta-Abs, L2 pooling (ICLR 2026).

Nothing is reparametrised: every weight matrix is square and orthogonal and stays so under the optimiser, so the network is
1-Lipschitz up to the residual of the stored weights, which the certificate measures and accounts for.
"""

import torch

from lipnext.certificates.margin import MarginCertifier
from lipnext.core.errors import ConfigError
from lipnext.core.experiment import (
    AugmentSpec,
    DataSpec,
    Experiment,
    LossSpec,
    OptimSpec,
    TrainSpec,
)
from lipnext.core.network import LipschitzNetwork
from lipnext.core.system import System
from lipnext.nn.block import ShiftBlock
from lipnext.nn.head import UnitRowHead
from lipnext.nn.pool import L2Pool, SpaceToDepth
from lipnext.nn.position import Centre


def build(
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    width: int = 192,
    depth: int = 8,
    patch: int = 4,
    shift: float = 1 / 16,
    beta: float = 0.5,
    seed: int = 0,
) -> LipschitzNetwork:
    """Build the network `centre -> space-to-depth -> depth blocks -> L2 pooling -> unit-row head`.

    Args:
        input_shape: `(c, H, W)` of the images.
        classes: number of classes K.
        width: channels C, at least `c * patch^2`; a block has `2 C^2` parameters in its matrices.
        depth: number of blocks L.
        patch: side of the patches that become channels; sides that it does not divide are padded with zeros.
        shift: fraction alpha of the channels shifted each way, `0 <= alpha <= 1/4`; 1/16 and 1/8 worked best in the paper.
        beta: fraction of the channels that beta-Abs folds, `0 <= beta <= 1`.
        seed: of the initial weights.

    Raises:
        ConfigError: if a value is out of range or the width too small for a patch.
    """
    channels, height, breadth = input_shape
    if patch < 1 or depth < 1 or width < 1:
        raise ConfigError(f"model: width, depth and patch must be at least 1, got {width}, {depth} and {patch}")
    if width < channels * patch**2:
        raise ConfigError(
            f"model.width: {width} channels cannot hold patches of {channels} x {patch} x {patch} = "
            f"{channels * patch**2} pixels; take a width of at least that or a smaller model.patch"
        )
    if not 0 <= shift <= 0.25 or not 0 <= beta <= 1:
        raise ConfigError(f"model: shift must lie in [0, 1/4] and beta in [0, 1], got {shift} and {beta}")
    grid = (-(-height // patch), -(-breadth // patch))
    generator = torch.Generator().manual_seed(seed)
    blocks = [
        ShiftBlock(width, grid, group=int(shift * width), folded=int(beta * width), generator=generator)
        for _ in range(depth)
    ]
    return LipschitzNetwork(
        [Centre(), SpaceToDepth(patch, width), *blocks, L2Pool(grid[0] * grid[1])],
        UnitRowHead(width, classes, generator=generator),
        input_shape,
    )


def digits() -> Experiment:
    """Scikit-learn's digits, 8x8: under a minute on two CPU cores. Expected: see benchmarks/results/digits.json."""
    return Experiment(
        system="lipnext",
        preset="digits",
        model={"width": 64, "depth": 4, "patch": 1, "shift": 0.125},
        data=DataSpec(name="digits"),
        train=TrainSpec(epochs=30, batch_size=64),
        optim=OptimSpec(name="muon", lr=0.06),
        loss=LossSpec(temperature=0.25, ramp_to=3.0),
    )


PRESETS = {"tiny": {"width": 16, "depth": 2, "patch": 2, "shift": 0.125}}
EXPERIMENTS = {"digits": digits}

SYSTEM = System(
    summary="orthogonal matrices on their manifold, spatial shifts, beta-Abs, L2 pooling",
    reference="LipNeXt, ICLR 2026",
    norm=2.0,
    build=build,
    certify=MarginCertifier,
    presets=PRESETS,
    experiments=EXPERIMENTS,
)
