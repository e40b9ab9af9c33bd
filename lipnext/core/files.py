"""Files that are either whole or absent, and hashes of files and weights."""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from lipnext.core.errors import ConfigError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only once it is written completely.

    The data goes to a temporary file in the same folder, is flushed to the disk and renamed. On any error,
    Ctrl-C included, the temporary file is removed and what was at `path` stays as it was.

    Args:
        path: the file to write; its folder must exist.
        mode: "w" for UTF-8 text with newlines as written, "wb" for bytes.

    Yields:
        The open temporary file.

    Raises:
        OSError: where the folder is missing or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    # "x" gives the permissions of an ordinary new file, which tempfile does not.
    text = {} if mode == "wb" else {"encoding": "utf-8", "newline": ""}
    file = open(temporary, mode.replace("w", "x"), **text)  # type: ignore[call-overload]  # noqa: SIM115
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, atomically.

    Raises:
        ValueError: where a number is not finite.
        OSError: as `atomic_write`.
    """
    with atomic_write(path) as file:
        json.dump(document, file, indent=2, allow_nan=False)
        file.write("\n")


def sync_folder(folder: Path) -> None:
    """Make a rename durable; not every system lets a folder be opened, and then there is nothing to do."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file, 64 hexadecimal digits.

    Raises:
        OSError: where the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return one sha256 over names, dtypes, shapes and values, whatever the order and the device.

    Args:
        tensors: such as a `state_dict()`.

    Returns:
        64 hexadecimal digits; equal if and only if every tensor is equal bit for bit (collisions aside).
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        header = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(header).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_output(option: str, path: str | os.PathLike[str] | None, *endings: str) -> None:
    """Refuse, before any work is done, a file that could not be written at its end.

    Args:
        option: of the command line, "--out".
        path: None where the option was not given.
        endings: of which the name must have one.

    Raises:
        ConfigError: for another ending, or a folder that does not exist.
    """
    if path is None:
        return
    if not os.fspath(path).endswith(endings):
        raise ConfigError(f"{option} must end in {' or '.join(endings)}, got '{os.fspath(path)}'")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"{option}: the folder {Path(path).resolve().parent} does not exist")
