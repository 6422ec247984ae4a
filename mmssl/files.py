"""Writing so that a reader sees the old content or the new, never half of it."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write; on success it replaces ``path``, on failure it is removed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
    finally:
        with suppress(FileNotFoundError):
            aside.unlink()


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` to fill; on success it replaces ``path``, on failure it is removed."""
    aside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        commit_folder(aside, path, old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def commit_folder(aside: Path, path: Path, old: Path | None = None) -> None:
    """Sync a finished folder and rename it to ``path``, moving what is there to ``old`` first."""
    for file in [*aside.iterdir(), aside]:
        sync(file)
    if old is not None and path.exists():
        path.rename(old)
    aside.rename(path)
    sync(path.parent)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON, atomically."""
    with replacing_file(path) as aside:
        aside.write_text(to_json(data, indent=2) + "\n", encoding="utf-8")


def to_json(data: Any, indent: int | None = None) -> str:
    """Return data as JSON that every reader takes: null for NaN and infinities, which JSON does not know."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, on the CPU and contiguous."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    # safetensors makes files that only their owner can read; these are as open as any other.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def digest(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """Return a SHA-256, in hexadecimal digits, over ``more`` and the names and values of tensors, by name."""
    found = hashlib.sha256(more.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
