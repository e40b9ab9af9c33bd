"""Whether a Triton kernel may take the place of torch's operations, without importing Triton to find out."""

import functools
import importlib.util

import torch
from torch import Tensor, nn


def usable(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether `x` lies on a GPU in one of the dtypes, is not empty, and Triton is installed.

    Subclasses, such as the tensors without content that `lipnext plan` counts with, need not have any memory.
    """
    plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cuda"
    return plain and x.dtype in dtypes and x.numel() > 0 and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
