"""The digits bundled with scikit-learn: 1,797 grey images of 8 x 8 pixels in ten classes."""

import numpy as np
import torch

from lipnext.core.experiment import DataSpec
from lipnext.core.seed import generator
from lipnext.data.dataset import Dataset, hold_out


def read(spec: DataSpec) -> tuple[Dataset, Dataset]:
    """Return (training part, test part); `spec.test` of each class is the test part, chosen by `spec.seed`.

    The stored values 0..16 become the bytes `round(255 v / 16)`.
    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    dataset = Dataset(
        images=torch.from_numpy(pixels).unsqueeze(1),
        labels=torch.from_numpy(digits.target.astype(np.int64)),
        classes=tuple(str(digit) for digit in digits.target_names),
    )
    return hold_out(dataset, spec.test, generator(spec.seed, "test"))
