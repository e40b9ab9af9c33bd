"""The losses of a training, read from the device every so often: each reading makes the program wait for the device."""

import torch
from torch import Tensor

from lipnext.core.world import World

READ_EVERY = {"cpu": 1}
READ_EVERY_ELSEWHERE = 50
"""Steps from one reading to the next. On a CPU nothing is waited for."""


class RunningLoss:
    """Losses that are known to the device, and from time to time to the program.

    Args:
        device: on which they are computed.
        passes: losses of a step, which add up to that of this process's share.
        world: the processes whose shares add up to a batch; all read at the same steps.
    """

    def __init__(self, device: torch.device, passes: int, world: World) -> None:
        self.every = READ_EVERY.get(device.type, READ_EVERY_ELSEWHERE)
        self.passes, self.world = passes, world
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take the scalar loss of one pass; nothing is waited for."""
        self._unread.append(loss.detach())

    @property
    def is_due(self) -> bool:
        """Whether it is time to read."""
        return len(self._unread) >= self.every * self.passes

    def read(self) -> list[float]:
        """Wait for the device; return the losses of the batches since the last reading, in order, in float64."""
        if not self._unread:
            return []
        losses = torch.stack(self._unread).cpu().double().view(-1, self.passes).sum(1)
        self._unread = []
        return self.world.add_(losses).tolist()
