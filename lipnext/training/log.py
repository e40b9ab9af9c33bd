"""The log of a run: one JSON object a line, flushed as it happens; optionally mirrored to TensorBoard."""

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from lipnext.core.errors import TrainingError
from lipnext.core.files import atomic_write

LOG = "log.jsonl"


class RunLog:
    """Appends events to `log.jsonl`; a context manager that closes it.

    Args:
        path: the file; its folder must exist. None writes nothing: of several processes one keeps the log.
        resume_step: keep only events up to this optimiser step, so that a resumed run reads as if it had
            never stopped.
        tensorboard: folder for TensorBoard's files, or None; needs the extra `lipnext[log]`.
    """

    def __init__(self, path: Path | None, resume_step: int, tensorboard: Path | None = None) -> None:
        self._writer = _tensorboard_writer(tensorboard, resume_step) if tensorboard else None
        self._file: IO[str] | None = None
        if path is None:
            return
        kept = []
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if (step := _step(line)) is not None and step <= resume_step]
        with atomic_write(path) as file:
            file.writelines(line + "\n" for line in kept)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, event: str, **fields: Any) -> None:
        """Append one event."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, "event": event, **fields}) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"cannot write {self._file.name}: {error.strerror or error}") from error
        if self._writer is not None:
            for name, value in _scalars(fields):
                self._writer.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take was told when it was written
                self._file.close()
        if self._writer is not None:
            self._writer.close()


def epochs(path: Path) -> list[dict[str, Any]]:
    """Return the finished epochs of a log in order; a line cut off by a crash is left out.

    Raises:
        OSError: where the file cannot be read.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    events = [json.loads(line) for line in lines if _step(line) is not None]
    return [event for event in events if event.get("event") == "epoch"]


def _step(line: str) -> int | None:
    """The step of a log line; None for a line cut off by a crash."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _scalars(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in fields.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((prefix + name, float(value)))
    return found


def _tensorboard_writer(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("TensorBoard is not installed; run: pip install 'lipnext[log]'") from error
    return SummaryWriter(str(folder), purge_step=resume_step + 1)
