"""Doing something with every file of a listing at once, whatever the files do to their decoders."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated

T = TypeVar("T")

AHEAD = 8
"""Files per worker that are handed out before results are awaited, which bounds memory for a million files."""


class Outcome(NamedTuple, Generic[T]):
    """What came of one file: a value, or the reason why it is broken."""

    value: T | None
    reason: str | None = None


def each_file(
    function: Callable[[str], T], paths: Sequence[str], workers: int | None = None, timeout: float | None = None
) -> Iterator[Outcome[T]]:
    """Yield ``function`` of every path, in order; so many at a time, by default one per core.

    Each runs in a child process, so that one that hangs for ``timeout`` seconds or crashes costs its own file alone
    (see ``mmssl.data.isolate``). Errors other than BrokenFile are raised here.
    """

    def attempt(path: str) -> Outcome[T]:
        try:
            return Outcome(isolated(function, path, timeout))
        except BrokenFile as error:
            return Outcome(None, error.reason)

    workers = min(workers or cores(), max(1, len(paths)))
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[Outcome[T]]] = deque()
    try:
        for path in paths:
            pending.append(pool.submit(attempt, path))
            if len(pending) >= AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
