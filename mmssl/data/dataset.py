"""From file names to batches: a deterministic stream of samples, read in worker processes.

What a sample looks like depends on (seed, epoch, index, repeat) alone; which samples a rank reads at a step depends on
the step, the batch size and the world size alone. So any worker count, world size or resume sees the same.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmssl.contracts import Batch, Draw
from mmssl.data.guard import BrokenFile, guarded
from mmssl.distributed import World

TRIES = 16
"""How many files in a row may be broken before a sample is given up."""


class Key(NamedTuple):
    """One sample of the stream: the pass over the data, the file, and which of several looks at it."""

    epoch: int
    sample: int
    repeat: int = 0


@lru_cache(maxsize=2)
def permutation(samples: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def key_at(position: int, samples: int, seed: int) -> Key:
    """Return the sample at a position of the endless stream: epoch after epoch, each file once per epoch.

    Batches may straddle an epoch's end, so no tail is dropped or padded, however small the data.
    """
    epoch, offset = divmod(position, samples)
    return Key(epoch, int(permutation(samples, seed, epoch)[offset]))


class Plan(Sampler[list[Key]]):
    """The micro-batches of one rank from step ``start`` to ``stop``, in order.

    A step's global batch is cut into accumulate x world equal runs; micro-step m of rank r reads run m * world + r.
    """

    def __init__(
        self, samples: int, batch_size: int, accumulate: int, world: World, seed: int, start: int, stop: int
    ) -> None:
        self.samples, self.batch_size, self.accumulate = samples, batch_size, accumulate
        self.world, self.seed, self.start, self.stop = world, seed, start, stop
        self.micro = batch_size // (accumulate * world.size)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.stop):
            for m in range(self.accumulate):
                first = step * self.batch_size + (m * self.world.size + self.world.rank) * self.micro
                yield [key_at(first + i, self.samples, self.seed) for i in range(self.micro)]


class Sample(NamedTuple):
    """What a worker makes of one key: arrays for collate (none if it gave up), and the broken files it met."""

    tensors: dict[str, Any]
    broken: list[tuple[int, str]]


class Samples(Dataset[Sample]):
    """Reads, transforms and draws one sample at a time. Knows no modality: it is handed the functions."""

    def __init__(
        self,
        paths: Sequence[str],
        decode: Callable[[str], Any],
        transform: Callable[[Any, np.random.Generator], Tensor],
        draw: Draw | None,
        seed: int,
        timeout: float,
        targets: Sequence[int] | None = None,
    ) -> None:
        self.paths, self.decode, self.transform, self.draw = paths, decode, transform, draw
        self.seed, self.timeout, self.targets = seed, timeout, targets

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample at ``key``; a broken file is recorded and another, drawn from the key, is read instead."""
        broken: list[tuple[int, str]] = []
        index = key.sample
        for attempt in range(TRIES):
            rng = np.random.default_rng([self.seed, *key, attempt])
            if attempt:
                index = int(rng.integers(len(self.paths)))
            try:
                return Sample(self._read(index, rng), broken)
            except BrokenFile as error:
                broken.append((index, error.reason))
        # Not an exception: one that crosses a process boundary arrives with a traceback for a message.
        return Sample({}, broken)

    def _read(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        path = self.paths[index]
        decoded = guarded(self.decode, path, self.timeout)
        sample: dict[str, Any] = {"index": index, "seed": int(rng.integers(2**63))}
        if self.targets is not None:
            sample["target"] = self.targets[index]
        if self.draw is not None:
            sample |= self.draw(rng)
        return {"signal": self.transform(decoded, rng), **sample}


def collate(samples: Sequence[Sample]) -> tuple[Batch, list[tuple[int, str]]]:
    """Stack samples into a batch, an empty one if a sample was given up; broken files travel beside it."""
    if not all(sample.tensors for sample in samples):
        return {}, [entry for sample in samples for entry in sample.broken]
    batch: Batch = {}
    for name, first in samples[0].tensors.items():
        values = [sample.tensors[name] for sample in samples]
        if isinstance(first, Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = torch.from_numpy(np.stack([np.asarray(value) for value in values]))
    return batch, [entry for sample in samples for entry in sample.broken]


def prepare_worker(_id: int) -> None:
    """Make a fresh data worker ignore signals and use one thread."""
    # The launcher signals every descendant; the rank decides when to stop, its workers must not die under it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def worker_count(asked: int | str, world: World) -> int:
    """Return the data workers of this rank: what was asked, or one less than its share of cores, at most 8."""
    if isinstance(asked, int):
        return asked
    return max(0, min(8, len(os.sched_getaffinity(0)) // world.local_size - 1))


def loader(samples: Samples, plan: Plan, workers: int, pin: bool) -> "DataLoader[Any]":
    """Return a loader of (batch, broken) pairs in the plan's order; an empty batch means that too much is broken."""
    return DataLoader(
        samples,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=prepare_worker,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
