"""Checkpoints: one safetensors file each, or its bytes in several files; atomic, and exact; no pickle anywhere.

Those that several processes write together are folders, see `distributed_checkpoint`; they are listed and deleted here as well.

All randomness of a run is a function of (seed, epoch, batch), so a checkpoint needs no generator state:
weights, optimiser states, averages and counters are the whole of it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lipnext.core.errors import BundleError, TrainingError
from lipnext.core.files import atomic_write, sha256_tensors

FORMAT = "lipnext-checkpoint-2"
WHOLE, LIST, PART = ".safetensors", ".parts.json", ".part-"
"""Ends of names: a checkpoint in one file, or the list of its parts, which follow it by number."""
DRAFT = ".draft"
"""End of the name of a folder that is being written or deleted; it does not count."""
MEGABYTE = 10**6


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], digest: str, keep: int, part: int | None = None
) -> Path:
    """Write `step-NNNNNNNNN.safetensors` and delete all but the newest `keep`.

    In parts, `step-NNNNNNNNN.part-0000` and so on hold its bytes, and `step-NNNNNNNNN.parts.json` lists them. The list is
    written last and deleted first, so a checkpoint whose list is there is whole.

    Args:
        folder: created if missing.
        step: optimiser steps done.
        state: nested dictionaries and lists of tensors and plain values.
        digest: of the experiment; a checkpoint resumes only its own.
        keep: how many to keep, at least 1.
        part: largest file in MB (10^6 bytes); None writes one file.

    Returns:
        The file, or the list of its parts.

    Raises:
        TrainingError: if the file cannot be written (disk full, no permission); older ones stay as they were.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = take_apart(state, "", tensors)
    tensors = {name: copied(tensor) for name, tensor in tensors.items()}
    meta = {"format": FORMAT, "digest": digest, "step": str(step), "skeleton": json.dumps(skeleton)}
    meta["sha256"] = _hash(meta, tensors)
    path = folder / f"step-{step:09d}{WHOLE if part is None else LIST}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data = save(tensors, metadata=meta)
        if part is None:
            _write(path, data)
        else:
            _write_parts(path, data, part * MEGABYTE)
        for old in list_checkpoints(folder)[:-keep]:
            delete_checkpoint(old)
        _delete_parts_without_list(folder)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first: files, lists of parts, folders."""
    if not folder.is_dir():
        return []
    return sorted(
        p for p in folder.iterdir() if re.fullmatch(r"step-\d{9}(\.safetensors|\.parts\.json)?", p.name)
    )


def delete_checkpoint(path: Path) -> None:
    """Delete one of `list_checkpoints`; a folder stops to count before its files go.

    Raises:
        OSError: if it cannot be deleted.
    """
    if path.is_dir():
        draft = path.with_name(f"{path.name}.old{DRAFT}")
        shutil.rmtree(draft, ignore_errors=True)
        os.rename(path, draft)
        shutil.rmtree(draft)
    else:
        path.unlink(missing_ok=True)


def load_checkpoint(path: Path, digest: str) -> dict[str, Any]:
    """Read the state back.

    Args:
        path: one of `list_checkpoints`.
        digest: of the experiment that goes on.

    Raises:
        BundleError: if the file is damaged, of another format, or of another experiment.
    """
    try:
        data = b"".join(file.read_bytes() for file in _files(path))
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise BundleError(damaged(path, str(error))) from error
    meta = header.get("__metadata__", {})
    check_origin(path, meta, FORMAT, digest)
    if meta.pop("sha256", None) != _hash(meta, tensors):
        raise BundleError(damaged(path, "its sha256 differs"))
    state: dict[str, Any] = put_together(json.loads(meta["skeleton"]), tensors)
    return state


def check_origin(path: Path, meta: Mapping[str, Any], form: str, digest: str) -> None:
    """Refuse a checkpoint of another format or another experiment.

    Raises:
        BundleError: naming what was found and what is asked for.
    """
    if meta.get("format") != form:
        raise BundleError(f"{path} has format {meta.get('format')!r}, this version reads {form!r}")
    if meta.get("digest") != digest:
        raise BundleError(
            f"{path} belongs to another experiment (digest {str(meta.get('digest'))[:12]}, asked for "
            f"{digest[:12]}); choose another --out, or run the experiment.yaml that stands there"
        )


def _write(path: Path, data: bytes | memoryview) -> None:
    with atomic_write(path, "wb") as file:
        file.write(data)


def _write_parts(path: Path, data: bytes, size: int) -> None:
    stem = path.name.removesuffix(LIST)
    pieces = [memoryview(data)[start : start + size] for start in range(0, len(data), size)]
    names = [f"{stem}{PART}{number:04d}" for number in range(len(pieces))]
    for name, piece in zip(names, pieces, strict=True):
        _write(path.with_name(name), piece)
    _write(path, json.dumps({"parts": names}).encode())


def _files(path: Path) -> list[Path]:
    """The files whose bytes, one after the other, are the checkpoint."""
    if not path.name.endswith(LIST):
        return [path]
    names = json.loads(path.read_bytes())["parts"]
    return [path.with_name(Path(name).name) for name in names]


def _delete_parts_without_list(folder: Path) -> None:
    """Of checkpoints that are no longer kept, or were never finished."""
    kept = {path.name.removesuffix(LIST) for path in list_checkpoints(folder)}
    for path in folder.glob(f"step-*{PART}*"):
        if path.name.partition(PART)[0] not in kept:
            path.unlink(missing_ok=True)


def _hash(meta: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """One sha256 over everything else in the file: a damaged disk must not pass for an exact resume."""
    text = json.dumps(meta, sort_keys=True) + sha256_tensors(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def cannot_write(path: Path, error: OSError) -> TrainingError:
    """The error of a checkpoint that the disk did not take."""
    return TrainingError(
        f"cannot write checkpoint {path}: {error.strerror or error}; free some space or choose another "
        "--out, then run the same command again (older checkpoints are intact)"
    )


def damaged(path: Path, reason: str) -> str:
    """The sentence for a checkpoint that does not read back."""
    return f"{path} is damaged or no checkpoint ({reason}); delete it to resume from an older one"


def take_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors of a nested state into `tensors`, by their place in it, and return its skeleton, fit for JSON."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, dict):
        # Keys keep their type: optimiser states are keyed by integers.
        return {"dict": [[key, take_apart(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [take_apart(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__} at {path}")


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def put_together(skeleton: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of `take_apart`; `tensors` may hold something that stands for them."""
    kind, content = next(iter(skeleton.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: put_together(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [put_together(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content


def weights_are_finite(state: dict[str, Tensor]) -> bool:
    """Whether every floating tensor of a state dict is finite."""
    return all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())
