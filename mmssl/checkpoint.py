"""Portable checkpoints: safetensors shards and one JSON, the same for every engine, ZeRO stage and world size.

A checkpoint is a folder ``step-00000500``. Ranks share the writing, tensor by tensor; the folder gets its name only
when everything in it is on the disk, so what has the name is whole. Reading verifies each shard's checksum.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmssl.distributed import Council, World
from mmssl.engine import Engine
from mmssl.errors import MmsslError, UserError
from mmssl.files import commit_folder, save_tensors, write_json

FORMAT = 1


def save(folder: Path, engine: Engine, facts: dict[str, Any], world: World, council: Council, keep: int) -> Path:
    """Write ``folder/step-N`` with N from ``facts["step"]``, remove all but the newest ``keep``, return its path.

    A collective. Raises MmsslError on every rank where any rank could not write (a full disk); the older checkpoints
    are then untouched.
    """
    path = folder / f"step-{facts['step']:08d}"
    aside = folder / f".{path.name}.tmp"
    problem = None
    shard: dict[str, Any] = {}
    # Each tensor is whole on every rank for a moment only (ZeRO gathers it); a rank holds on to its share.
    mine = {name: tensor.detach().cpu().clone() for name, tensor in _share(engine, world)}
    try:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        council.gather(None)
        shard = _write_shard(aside / f"shard-{world.rank:05d}-of-{world.size:05d}.safetensors", mine)
    except (OSError, SafetensorError) as error:
        problem = f"{getattr(error, 'strerror', None) or error}"
    del mine
    reports = council.gather((problem, shard))
    problems = [text for text, _ in reports if text]
    if not problems and world.is_main:
        try:
            write_json(aside / "checkpoint.json", {"format": FORMAT, **facts, "shards": [s for _, s in reports]})
            shutil.rmtree(path, ignore_errors=True)
            commit_folder(aside, path)
        except OSError as error:
            problems = [str(error.strerror)]
    problems = council.gather(problems)[0]
    if problems:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise MmsslError(f"{path}: the checkpoint could not be written ({problems[0]}); earlier ones are untouched")
    if world.is_main:
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return path


def _share(engine: Engine, world: World) -> Iterator[tuple[str, Tensor]]:
    for i, (name, tensor) in enumerate(engine.state()):
        if i % world.size == world.rank:
            yield name, tensor


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_tensors(path, tensors)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "sha256": digest, "tensors": list(tensors)}


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


class Checkpoint:
    """A checkpoint opened for reading; tensors are read one at a time."""

    def __init__(self, path: Path) -> None:
        """Verify and open; raises UserError naming what is missing or damaged."""
        self.path = path
        try:
            self.facts: dict[str, Any] = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
            self._where = {name: shard["file"] for shard in self.facts["shards"] for name in shard["tensors"]}
            for shard in self.facts["shards"]:
                with (path / shard["file"]).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                        raise UserError(f"{path / shard['file']}: damaged (its checksum differs)")
            self._files = {
                shard["file"]: safe_open(path / shard["file"], framework="pt") for shard in self.facts["shards"]
            }
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: not a readable checkpoint ({error})") from None
        if self.facts["format"] != FORMAT:
            raise UserError(f"{path}: written in format {self.facts['format']}, this mmssl reads {FORMAT}")

    @property
    def step(self) -> int:
        """Optimiser steps taken when it was written."""
        return int(self.facts["step"])

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._where)

    def read(self, name: str) -> Tensor:
        """Return one tensor; raises UserError for a name it does not hold."""
        if name not in self._where:
            raise UserError(f"{self.path}: holds no '{name}'; it belongs to another model")
        return self._files[self._where[name]].get_tensor(name)  # type: ignore[no-any-return, no-untyped-call]

    def weights(self, averaged: bool) -> dict[str, Tensor]:
        """Return parameters (their averages if ``averaged`` and there are any) and buffers by name in the objective."""
        source = "ema/" if averaged and any(name.startswith("ema/") for name in self._where) else "param/"
        return {n.split("/", 1)[1]: self.read(n) for n in self._where if n.startswith((source, "buffer/"))}


def newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """Open the newest readable checkpoint and say in sentences what was passed over; UserError if there is none."""
    notes = [
        f"{left} was not finished when its run stopped; it is ignored" for left in sorted(folder.glob(".step-*.tmp"))
    ]
    for path in checkpoints(folder):
        try:
            return Checkpoint(path), notes
        except UserError as error:
            notes.append(f"{error}; trying the one before")
    raise UserError("; ".join([f"{folder}: there is no checkpoint to resume from", *notes]))
