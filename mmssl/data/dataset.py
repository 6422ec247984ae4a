"""From file names to batches: a deterministic stream of samples, read in worker processes.

What a sample looks like depends on (seed, epoch, index, repeat) alone; which samples a rank reads at a step depends on
the step, the batch size, the world size and the buckets alone. So any worker count, world size or resume sees the same.
"""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from mmssl.contracts import Batch, Draw, Grid, Size, Views
from mmssl.data.blocks import Blocks
from mmssl.data.guard import BrokenFile, guarded
from mmssl.distributed import World

TRIES = 16
"""How many files in a row may be broken before a sample is given up."""


class Key(NamedTuple):
    """One sample of the stream: the pass over the data, the file, which of several looks at it, and its bucket."""

    epoch: int
    sample: int
    repeat: int = 0
    bucket: int = 0


class Bucket(NamedTuple):
    """Files whose signals have one size: a batch is filled from one bucket, so nothing is padded."""

    size: Size
    grid: Grid
    members: Sequence[int]
    """Indices of its files."""
    substitutes: Sequence[int] | None = None
    """Indices of files that may take a broken one's place; None is all."""
    blocks: Blocks | None = None
    """Which of its files are read together; None: any is read as cheaply after any other."""


class Stream:
    """The endless stream of a bucket's samples: epoch after epoch, each file once per epoch.

    Batches may straddle an epoch's end, so no tail is dropped or padded, however small the data. With ``repeats``, so
    many looks at a file follow each other; with ``blocks``, the files of a few of them.
    """

    def __init__(
        self, members: Sequence[int], seed: int, bucket: int = 0, repeats: int = 1, blocks: Blocks | None = None
    ) -> None:
        self.members, self.seed, self.bucket, self.repeats, self.blocks = members, seed, bucket, repeats, blocks
        # A rank walks forward only: the order of one epoch at a time is enough.
        self._order = lru_cache(maxsize=1)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        rng = np.random.default_rng([self.seed, epoch, *[self.bucket] * bool(self.bucket)])
        return rng.permutation(len(self.members)) if self.blocks is None else self.blocks.order(rng)

    def __getitem__(self, position: int) -> Key:
        """Return the sample at a position, counted from 0 without end."""
        place, repeat = divmod(position, self.repeats)
        epoch, offset = divmod(place, len(self.members))
        return Key(epoch, int(self.members[int(self._order(epoch)[offset])]), repeat, self.bucket)


def turns(sizes: Sequence[int], steps: int) -> Iterator[tuple[int, int]]:
    """Yield for each step the bucket whose turn it is, and how often it had been before.

    The bucket that is furthest behind its share of the files is next: after any number of steps, each has had its
    share to within one turn, and what a step reads depends on the step alone.
    """
    total, given = sum(sizes), [0] * len(sizes)
    for step in range(1, steps + 1):
        bucket = max(range(len(sizes)), key=lambda b: (step * sizes[b] - total * given[b], -b))
        yield bucket, given[bucket]
        given[bucket] += 1


class Plan(Sampler[list[Key]]):
    """The micro-batches of one rank from step ``start`` to ``stop``, in order.

    A step's global batch is cut into accumulate x world equal runs; micro-step m of rank r reads run m * world + r.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        batch_size: int,
        accumulate: int,
        world: World,
        start: int,
        stop: int,
    ) -> None:
        self.streams, self.batch_size, self.accumulate = streams, batch_size, accumulate
        self.world, self.start, self.stop = world, start, stop
        self.micro = batch_size // (accumulate * world.size)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        for bucket, before in islice(turns([len(s.members) for s in self.streams], self.stop), self.start, None):
            stream = self.streams[bucket]
            for m in range(self.accumulate):
                first = before * self.batch_size + (m * self.world.size + self.world.rank) * self.micro
                yield [stream[first + i] for i in range(self.micro)]


class Sample(NamedTuple):
    """What a worker makes of one key: arrays for collate (none if it gave up), and the broken files it met."""

    tensors: dict[str, Any]
    broken: list[tuple[int, str]]


class Samples(Dataset[Sample]):
    """Reads, transforms and draws samples. Knows no modality: it is handed the functions."""

    def __init__(
        self,
        items: Sequence[Any],
        views: Views,
        buckets: Sequence[Bucket],
        draw: Draw | None,
        seed: int,
        timeout: float | None,
        targets: np.ndarray[Any, Any] | None = None,
    ) -> None:
        """``items`` are what ``views`` reads: paths, or rows of them whose files the views guard one by one, so that
        ``timeout``, in seconds, is None; ``targets``, one per item, are class indices int64 [n] or float32
        [n, classes].
        """
        self.items, self.views, self.draw = items, views, draw
        self.lattices = [(bucket.size, bucket.grid) for bucket in buckets]
        self.substitutes = [bucket.substitutes for bucket in buckets]
        self.seed, self.timeout, self.targets = seed, timeout, targets

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample at ``key``; a broken file is recorded and another, drawn from the key, is read instead."""
        return self._looks([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """Return the samples at ``keys``; neighbours that look at the same file share one reading of it."""
        groups = groupby(keys, key=lambda key: key._replace(repeat=0))
        return [sample for _, group in groups for sample in self._looks(list(group))]

    def _looks(self, keys: Sequence[Key]) -> list[Sample]:
        broken: list[tuple[int, str]] = []
        index = keys[0].sample
        for attempt in range(TRIES):
            if attempt:
                index = self._other(self._rng(keys[0]._replace(repeat=0), attempt), keys[0].bucket, attempt)
            try:
                read = self._read(index, keys, attempt)
            except BrokenFile as error:
                broken.append((index, error.reason))
            else:
                return [Sample(tensors, [] if i else broken) for i, tensors in enumerate(read)]
        # Not an exception: one that crosses a process boundary arrives with a traceback for a message.
        return [Sample({}, [] if i else broken) for i in range(len(keys))]

    def _rng(self, key: Key, attempt: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, key.epoch, key.sample, key.repeat, attempt])

    def _other(self, rng: np.random.Generator, bucket: int, attempt: int) -> int:
        # Where nothing that the bucket would have can be read, any file goes before training ends.
        files = self.substitutes[bucket] if attempt <= TRIES // 2 else None
        place = int(rng.integers(len(self.items) if files is None else len(files)))
        return place if files is None else int(files[place])

    def _read(self, index: int, keys: Sequence[Key], attempt: int) -> list[dict[str, Any]]:
        size, grid = self.lattices[keys[0].bucket]
        samples, rngs = [], [self._rng(key, attempt) for key in keys]
        for key, rng in zip(keys, rngs, strict=True):
            if attempt:
                self._other(rng, keys[0].bucket, attempt)  # what is drawn after the choice of a file does not repeat it
            place = np.array([key.epoch, key.sample, key.repeat])
            sample: dict[str, Any] = {"index": index, "place": place, "seed": int(rng.integers(2**63))}
            if self.targets is not None:
                sample["target"] = self.targets[index]
            samples.append(sample | (self.draw(rng, grid) if self.draw is not None else {}))
        item = self.items[index]
        if isinstance(item, str):
            seen = guarded(lambda file: self.views(file, rngs, size), item, self.timeout)
        else:
            seen = self.views(item, rngs, size)
        return [view | sample for view, sample in zip(seen, samples, strict=True)]


def collate(samples: Sequence[Sample]) -> tuple[Batch, list[tuple[int, str]]]:
    """Stack samples into a batch, an empty one if a sample was given up; broken files travel beside it."""
    if not all(sample.tensors for sample in samples):
        return {}, [entry for sample in samples for entry in sample.broken]
    # In a worker this stacks straight into the shared memory in which the batch travels.
    batch: Batch = default_collate([sample.tensors for sample in samples])
    return batch, [entry for sample in samples for entry in sample.broken]


def batch_of_one(inputs: Mapping[str, Tensor], draw: Draw | None, grid: Grid, rng: np.random.Generator) -> Batch:
    """Return signals [C, *size] of token grid ``grid`` as a batch of one, with what an objective draws from ``rng``."""
    drawn = {name: torch.from_numpy(np.asarray(value)) for name, value in (draw(rng, grid) if draw else {}).items()}
    batch = {**inputs, "index": torch.tensor(0), "seed": torch.tensor(int(rng.integers(2**63))), **drawn}
    return {name: value.unsqueeze(0) for name, value in batch.items()}


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
