"""Portable checkpoints: safetensors shards and one JSON, the same for every engine, ZeRO stage and world size.

A checkpoint is a folder ``step-00000500``. Ranks share the writing, tensor by tensor; the folder gets its name only
when everything in it is on the disk, so what has the name is whole. Reading verifies each shard's checksum.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmssl.distributed import Council, World
from mmssl.engine import Engine
from mmssl.errors import MmsslError, UserError
from mmssl.files import LazyTensors, TensorFile, commit_folder, write_json
from mmssl.pulse import beat

FORMAT = 1
ALONE = World()


def save(folder: Path, engine: Engine, facts: dict[str, Any], world: World, council: Council, keep: int) -> Path:
    """Write ``folder/step-N`` with N from ``facts["step"]``, remove all but the newest ``keep``, return its path.

    A collective. Raises MmsslError on every rank where any rank could not write (a full disk); the older checkpoints
    are then untouched.
    """
    path = folder / f"step-{facts['step']:08d}"
    aside, old = (folder / f".{path.name}.{suffix}" for suffix in ("tmp", "old"))

    def prepare() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def finish() -> None:
        write_json(aside / "checkpoint.json", {"format": FORMAT, **facts, "shards": [shard for _, shard in reports]})
        commit_folder(aside, path, old)
        for late in [old, *checkpoints(folder)[keep:]]:
            shutil.rmtree(late, ignore_errors=True)

    try:
        council.lead(world, prepare)
        reports = council.gather(_write_share(aside, engine, world))
        if problem := next((text for text, _ in reports if text), None):
            raise OSError(None, problem)
        council.lead(world, finish)
    except OSError as error:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise MmsslError(
            f"{path}: the checkpoint could not be written ({error.strerror or error}); earlier ones are untouched"
        ) from None
    return path


def _write_share(aside: Path, engine: Engine, world: World) -> tuple[str | None, dict[str, Any]]:
    # Each tensor is whole on every rank for a moment only (ZeRO gathers it); whose it is writes it at once. Where that
    # fails, the others still have to be gathered.
    path = aside / f"shard-{world.rank:05d}-of-{world.size:05d}.safetensors"
    layout = engine.layout()
    mine = {name: layout[name] for name in list(layout)[world.rank :: world.size]}
    state = engine.state()
    try:
        with TensorFile(path, mine) as file:
            for name, tensor in state:
                if name in mine:
                    file.write(name, tensor)
        with path.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        return None, {"file": path.name, "sha256": digest, "tensors": list(mine)}
    except OSError as error:
        for _ in state:
            pass
        return error.strerror or str(error), {}


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


class Checkpoint:
    """A checkpoint opened for reading; tensors are read one at a time."""

    def __init__(self, path: Path, verify: slice = slice(None)) -> None:
        """Open, and compare the checksums of some of the shards; raises UserError naming what is missing or damaged."""
        self.path = path
        try:
            self.facts: dict[str, Any] = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
            for shard in self.facts["shards"][verify]:
                with (path / shard["file"]).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                        raise UserError(f"{path / shard['file']}: damaged (its checksum differs)")
                beat()
            files = {shard["file"]: safe_open(path / shard["file"], framework="pt") for shard in self.facts["shards"]}
            places = {name: (files[shard["file"]], name) for shard in self.facts["shards"] for name in shard["tensors"]}
            self.tensors = LazyTensors(places)
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
        return list(self.tensors)

    def read(self, name: str) -> Tensor:
        """Return one tensor; raises UserError for a name it does not hold."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: holds no '{name}'; it belongs to another model")
        return self.tensors[name]

    def weights(self, averaged: bool) -> LazyTensors:
        """Return parameters (their averages if ``averaged`` and there are any) and buffers by name in the objective."""
        source = "ema/" if averaged and any(name.startswith("ema/") for name in self.tensors) else "param/"
        return self.tensors.renamed(
            {name.split("/", 1)[1]: name for name in self.tensors if name.startswith((source, "buffer/"))}
        )


def newest(folder: Path, me: World = ALONE, council: Council | None = None) -> tuple[Checkpoint, list[str]]:
    """Open the newest readable checkpoint and say in sentences what was passed over; UserError if there is none.

    A collective: the ranks share the reading of the checksums, and what is damaged for one is so for all.
    """
    council = council or Council(1)
    left, paths = council.gather((sorted(folder.glob(".step-*.tmp")), checkpoints(folder)))[0]
    notes = [f"{path} was not finished when its run stopped; it is ignored" for path in left]
    for path in paths:
        found, problem = None, None
        try:
            found = Checkpoint(path, slice(me.rank, None, me.size))
        except UserError as error:
            problem = str(error)
        problem = next(filter(None, council.gather(problem)), None)
        if found is not None and problem is None:
            return found, notes
        notes.append(f"{problem}; trying the one before")
    raise UserError("; ".join([f"{folder}: there is no checkpoint to resume from", *notes]))
