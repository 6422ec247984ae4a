"""Orders for what is cheap to read only in blocks: shards on slow disks, row groups of parquet tables."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mmssl.data.cells import CACHE_BYTES, Cell
from mmssl.data.fragment import file_of
from mmssl.data.parts import block, part


class Blocks(NamedTuple):
    """Files that are cheap to read one after the other, and from how many such blocks samples are drawn."""

    of: Sequence[int]
    """The block of each file, numbered from 0."""
    window: int

    def order(self, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the files in random order: so many blocks after each other, and their files shuffled."""
        found = np.asarray(self.of)
        files, ends = np.argsort(found, kind="stable"), np.cumsum(np.bincount(found))
        parts = np.split(files, ends[:-1])
        blocks = rng.permutation(len(parts))
        windows = [blocks[i : i + self.window] for i in range(0, len(blocks), self.window)]
        return np.concatenate([rng.permutation(np.concatenate([parts[b] for b in window])) for window in windows])


def blocks_of(paths: Sequence[str], window: int | Literal["auto"] | None) -> Blocks | None:
    """Return in which order files are to be read, as ``data.window`` says; None where all may simply be shuffled.

    With "auto" they may unless they are in row groups of which a process cannot keep all.
    """
    files = [file_of(path) for path in paths]
    if window == "auto":
        window = _kept(files)
    if window is None:
        return None
    numbers: dict[Any, int] = {}
    of = [numbers.setdefault(block(file), len(numbers)) for file in files]
    return None if len(numbers) <= window or len(numbers) == len(files) else Blocks(of, window)


def _kept(files: Sequence[str]) -> int | None:
    """Return how many row groups a process keeps in memory, at least 1; None where no file is in one."""
    parts = (part(file) for file in files)
    largest = max((one.group_bytes() for one in parts if isinstance(one, Cell)), default=None)
    return None if largest is None else max(1, CACHE_BYTES // max(1, largest))
