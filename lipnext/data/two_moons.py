"""Two interleaved half circles in the plane: a data set whose decision boundary can be looked at."""

import numpy as np
import torch

from lipnext.core.experiment import DataSpec
from lipnext.core.seed import generator
from lipnext.data.dataset import Dataset, hold_out

SCALE = 3.6
"""Length of the plane that [0, 1] stands for; a radius r here is `SCALE r` in scikit-learn's coordinates."""
POINTS, NOISE = 4000, 0.06


def read(spec: DataSpec) -> tuple[Dataset, Dataset]:
    """Return (training part, test part) of 4,000 points as images of 1 x 1 x 2 bytes, chosen by `spec.seed`.

    The points come from `sklearn.datasets.make_moons` with noise 0.06 and are mapped to [0, 1] by one scale for both axes.
    """
    from sklearn.datasets import make_moons

    points, labels = make_moons(POINTS, noise=NOISE, random_state=spec.seed)
    unit = (points - points.mean(0)) / SCALE + 0.5
    pixels = np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
    dataset = Dataset(
        images=torch.from_numpy(pixels).reshape(-1, 1, 1, 2),
        labels=torch.from_numpy(labels.astype(np.int64)),
        classes=("upper", "lower"),
    )
    return hold_out(dataset, spec.test, generator(spec.seed, "test"))
