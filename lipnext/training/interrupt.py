"""SIGTERM and Ctrl-C end a run at the next step, after a checkpoint; a second Ctrl-C ends it at once."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context manager that turns signals into a flag. `exit_code` is 143 for SIGTERM, 130 for Ctrl-C, 0 for neither.

    Outside the main thread signals cannot be caught; then nothing is and `requested` stays False.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """The shell's convention, 128 + signal; 0 where none has come."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
