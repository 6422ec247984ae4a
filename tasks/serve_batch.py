"""Micro-batches: signals of several requests go through a model together, in the one thread that models run in."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from modalities.views import in_groups

T = TypeVar("T")


class Features(Protocol):
    """What signals go through."""

    def features(self, signal: Tensor) -> Tensor:
        """Map signals [B, ...] to vectors [B, d]."""
        ...


@dataclass
class _Job:
    """One signal for a model, or one call of a function."""

    future: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop
    model: Features | None = None
    signal: Tensor | None = None
    function: Callable[[], Any] | None = None
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs models in one thread; what arrives within ``window`` seconds goes through together, at most ``most``.

    Nobody waits for nobody: the window ends early where no signal is on its way (``coming``). ``batched`` is called
    with the size of every batch.
    """

    def __init__(self, window: float, most: int, batched: Callable[[int], None] = lambda size: None) -> None:
        self._window, self._most, self._batched = window, most, batched
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._coming = 0
        self._thread = threading.Thread(target=self._work, name="models", daemon=True)
        self._thread.start()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Announce a signal while it is read, so that others wait for it (for the event loop's thread alone)."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    async def features(self, model: Features, signal: Tensor) -> Tensor:
        """Return the vector float32 [d] of one signal, on the CPU."""
        found: Tensor = await self._put(model=model, signal=signal)
        return found

    async def call(self, function: Callable[[], T]) -> T:
        """Return ``function()``, called where nothing else uses the models."""
        found: T = await self._put(function=function)
        return found

    async def _put(self, **what: Any) -> Any:
        loop = asyncio.get_running_loop()
        job = _Job(loop.create_future(), loop, **what)
        self._jobs.put(job)
        return await job.future

    def close(self) -> None:
        """Finish what is there and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    # The thread's side.

    def _work(self) -> None:
        while True:
            first = self._jobs.get()
            if first is None:
                return
            batch, calls, last = self._gathered(first)
            _run(batch, self._batched)
            for job in calls:
                _deliver([(job, *_called(job))])
            if last:
                return

    def _gathered(self, first: _Job) -> tuple[list[_Job], list[_Job], bool]:
        """Return the signals that go together, the calls that came between them, and whether that is all."""
        if first.function is not None:
            return [], [first], False
        batch, calls, end = [first], list[_Job](), first.arrived + self._window
        while len(batch) < self._most:
            try:
                # What is there already costs no waiting.
                job = self._jobs.get_nowait()
            except queue.Empty:
                left = end - time.monotonic()
                if left <= 0 or self._coming == 0:
                    break
                try:
                    job = self._jobs.get(timeout=left)
                except queue.Empty:
                    break
            if job is None:
                return batch, calls, True
            (batch if job.function is None else calls).append(job)
        return batch, calls, False


_Outcome = tuple[Any, BaseException | None]


def _run(batch: Sequence[_Job], batched: Callable[[int], None]) -> None:
    models: dict[int, list[_Job]] = {}
    for job in batch:
        if not job.future.cancelled():  # whoever waited has gone
            models.setdefault(id(job.model), []).append(job)
    for jobs in models.values():
        batched(len(jobs))
        _deliver([(job, *outcome) for job, outcome in zip(jobs, _vectors(jobs), strict=True)])


def _vectors(jobs: Sequence[_Job]) -> list[_Outcome]:
    model, signals = jobs[0].model, [job.signal for job in jobs if job.signal is not None]
    assert model is not None
    try:
        rows = in_groups(signals, lambda x: model.features(x).detach().float().cpu())
        return [(row, None) for row in rows]
    except Exception as error:
        # One signal must not fail the others: whose it is shows when each goes by itself.
        return [(None, error)] if len(jobs) == 1 else [_vectors([job])[0] for job in jobs]


def _called(job: _Job) -> _Outcome:
    assert job.function is not None
    if job.future.cancelled():
        return None, None
    try:
        with torch.no_grad():
            return job.function(), None
    except Exception as error:
        return None, error


def _deliver(outcomes: Sequence[tuple[_Job, Any, BaseException | None]]) -> None:
    """Hand results to their event loop, all at once: every call wakes it."""
    loops: dict[int, list[tuple[_Job, Any, BaseException | None]]] = {}
    for outcome in outcomes:
        loops.setdefault(id(outcome[0].loop), []).append(outcome)
    for some in loops.values():
        try:
            some[0][0].loop.call_soon_threadsafe(_settle, some)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            continue


def _settle(outcomes: Sequence[tuple[_Job, Any, BaseException | None]]) -> None:
    for job, value, error in outcomes:
        if job.future.done():
            continue
        if error is None:
            job.future.set_result(value)
        else:
            job.future.set_exception(error)
