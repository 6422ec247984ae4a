"""``mmssl data check``: decode every file once, in parallel, and say which are broken and why."""

import math
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmssl.contracts import Modality
from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.ledger import Ledger
from mmssl.data.listing import list_files
from mmssl.errors import MmsslError, UserError, nearest
from modalities.encoder import DECODE_TIMEOUT, MODALITIES

CHUNK = 16
"""Files per task of a worker: small enough that little is repeated when one of them kills its process."""
WAVE = 32
"""Tasks per worker that are handed out before results are awaited, which bounds memory for a million files."""
SHOWN = 20
"""Broken files that the table names; the ledger and --json name them all."""
CRASHED = "crashes its decoder"


class Outcome(NamedTuple):
    """What came of one file: why it is broken, or how large it is."""

    reason: str | None
    extent: tuple[int, ...]


@dataclass(frozen=True)
class CheckResult:
    """The report on one path."""

    path: str
    modality: str
    ok: int
    broken: list[dict[str, str]]
    """``path`` and ``reason`` of every broken file, in the order of the data."""
    ignored: dict[str, int]
    """Suffix -> how many files are not of this modality."""
    extents: dict[str, list[int]]
    """The smallest, median and largest file that decodes, for an image as [height, width]; {} if none does."""

    @property
    def files(self) -> int:
        """How many files there are of this modality."""
        return self.ok + len(self.broken)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "path": self.path,
            "modality": self.modality,
            "files": self.files,
            "ok": self.ok,
            "broken": self.broken,
            "ignored": self.ignored,
            "size": self.extents,
        }

    def render(self, console: Console) -> None:
        """Print the report for people."""
        table = Table(title=f"{escape(self.path)}: {self.files} {self.modality} files", title_justify="left")
        table.add_column("what")
        table.add_column("files", justify="right")
        table.add_row("decode", str(self.ok))
        for reason, count in Counter(entry["reason"] for entry in self.broken).most_common():
            table.add_row(f"[red]broken[/red]: {escape(reason)}", str(count))
        for suffix, count in self.ignored.items():
            table.add_row(f"ignored: {escape(suffix) or 'no suffix'}", str(count))
        console.print(table)
        for which, extent in self.extents.items():
            console.print(f"{which:>8}: {' x '.join(map(str, extent))}", highlight=False)
        for entry in self.broken[:SHOWN]:
            console.print(f"[red]broken[/red] {escape(entry['path'])}: {escape(entry['reason'])}", soft_wrap=True)
        if len(self.broken) > SHOWN:
            console.print(f"... and {len(self.broken) - SHOWN} more broken files")


def check(
    path: str | Path,
    modality: str,
    workers: int | None = None,
    ledger_out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckResult:
    """Decode every file of ``modality`` under ``path`` and return what is broken.

    ``workers`` processes decode, one per core if None. ``ledger_out`` is written anew, a JSON line per broken file.
    ``progress`` is called with (files done, files in all). Raises UserError for a path that holds no such file.
    """
    if modality not in MODALITIES:
        raise UserError(f"'{modality}' is not a modality{nearest(modality, MODALITIES)}")
    listing = list_files(path, MODALITIES[modality].suffixes, modality)
    if ledger_out is not None:
        ledger_out.parent.mkdir(parents=True, exist_ok=True)
        ledger_out.unlink(missing_ok=True)
    ledger = Ledger(ledger_out)
    broken: list[dict[str, str]] = []
    extents: Counter[tuple[int, ...]] = Counter()
    for i, outcome in enumerate(_outcomes(listing.paths, MODALITIES[modality], workers or _cores())):
        if outcome.reason is None:
            extents[outcome.extent] += 1
        else:
            broken.append({"path": listing.name(i), "reason": outcome.reason})
            ledger.add(**broken[-1])
        if progress is not None:
            progress(i + 1, len(listing))
    return CheckResult(str(path), modality, extents.total(), broken, listing.ignored, _summary(extents))


def _summary(extents: Counter[tuple[int, ...]]) -> dict[str, list[int]]:
    if not extents:
        return {}
    by_size = sorted(extents, key=lambda extent: (math.prod(extent), extent))
    middle, passed = (extents.total() + 1) // 2, 0
    for median in by_size:
        passed += extents[median]
        if passed >= middle:
            break
    return {"smallest": list(by_size[0]), "median": list(median), "largest": list(by_size[-1])}


def _outcomes(paths: list[str], kind: Modality, workers: int) -> Iterator[Outcome]:
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    workers = min(workers, len(chunks))
    wave = WAVE * workers
    for start in range(0, len(chunks), wave):
        pool = _pool(workers)
        try:
            futures = [_submit(pool, kind, chunk) for chunk in chunks[start : start + wave]]
            for chunk, future in zip(chunks[start : start + wave], futures, strict=True):
                try:
                    yield from future.result()
                except BrokenProcessPool:
                    yield from _one_by_one(kind, chunk)
        finally:
            pool.shutdown(cancel_futures=True)


def _one_by_one(kind: Modality, paths: list[str]) -> Iterator[Outcome]:
    # A file killed its process and the pool with it, but nobody says which: each that was under way gets its own try.
    pool = _pool(1)
    try:
        for path in paths:
            try:
                yield from _submit(pool, kind, [path]).result()
            except BrokenProcessPool:
                yield Outcome(CRASHED, ())
                pool.shutdown()
                pool = _pool(1)
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forking this process would copy whatever threads hold; the fork server imports torch once for all workers.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["modalities.encoder"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts)
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool:
        raise MmsslError(
            "the processes that decode cannot start; a script that calls this needs `if __name__ == '__main__':`"
        ) from None
    return pool


def _submit(pool: ProcessPoolExecutor, kind: Modality, paths: list[str]) -> "Future[list[Outcome]]":
    try:
        return pool.submit(_scan, kind, paths)
    except BrokenProcessPool as error:  # it broke while the wave was still being handed out
        future: Future[list[Outcome]] = Future()
        future.set_exception(error)
        return future


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _scan(kind: Modality, paths: list[str]) -> list[Outcome]:
    return [_look(kind, path) for path in paths]


def _look(kind: Modality, path: str) -> Outcome:
    try:
        return Outcome(None, kind.extent(guarded(kind.decode, path, DECODE_TIMEOUT)))
    except BrokenFile as error:
        return Outcome(error.reason, ())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
