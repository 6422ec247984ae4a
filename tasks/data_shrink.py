"""``mmssl data shrink``: a copy of a folder of videos that is small on disk and cheap to read at random."""

import csv
import json
import os
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmssl.data.fragment import file_of
from mmssl.data.guard import BrokenFile
from mmssl.data.isolate import isolated
from mmssl.data.ledger import Ledger
from mmssl.data.listing import MANIFESTS, Listing, list_files
from mmssl.data.parts import container
from mmssl.data.paths import url
from mmssl.errors import UserError
from mmssl.files import replacing_file, write_json
from modalities.encoder import MODALITIES
from tasks.reencode import DiskFull, How, reencode

SETTINGS = "shrink.json"
LEDGER = "ledger.jsonl"
SHOWN = 20
"""Broken files that the table names; the ledger and --json name them all."""
VERSION = 2
"""Of how files are encoded: copies of another one are not gone on with."""
LEAST = 16
"""Pixels of the shortest side that is allowed: one macroblock of H.264."""


class _Job(NamedTuple):
    """One file and what becomes of it."""

    source: str
    target: Path
    name: str
    """The source, as people know it."""


class _Broken(NamedTuple):
    reason: str


@dataclass(frozen=True)
class ShrinkResult:
    """The report on one folder."""

    path: str
    out: str
    short_side: int
    encoded: int
    copied: int
    """Files that were small and cheap to read already; they keep their sound, all others lose it."""
    skipped: int
    """Files that an earlier run has finished."""
    broken: list[dict[str, str]]
    """``path`` and ``reason`` of every broken file, in the order of the data."""
    ignored: dict[str, int]
    """Suffix -> how many files are no video."""
    bytes_before: int
    """Of the files that have a copy now."""
    bytes_after: int
    seconds: float

    @property
    def files(self) -> int:
        """How many videos there are."""
        return self.encoded + self.copied + self.skipped + len(self.broken)

    @property
    def all_broken(self) -> bool:
        """Whether nothing could be shrunk."""
        return len(self.broken) == self.files

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"files": self.files, **vars(self)}

    def render(self, console: Console) -> None:
        """Print the report for people."""
        console.print(f"{escape(self.path)} -> {escape(self.out)}: {self.files} videos", soft_wrap=True)
        table = Table()
        table.add_column("what")
        table.add_column("files", justify="right")
        table.add_row(
            f"re-encoded, at most {self.short_side} pixels on the short side, without sound", str(self.encoded)
        )
        table.add_row("copied as they are, small and cheap to read already", str(self.copied))
        table.add_row("there already", str(self.skipped))
        table.add_row("[red]broken[/red]" if self.broken else "broken", str(len(self.broken)))
        for suffix, count in self.ignored.items():
            table.add_row(f"ignored: {escape(suffix) or 'no suffix'}", str(count))
        console.print(table)
        before, after = (f"{size / 1e6:,.1f} MB" for size in (self.bytes_before, self.bytes_after))
        console.print(f"{before} -> {after} in {self.seconds:.1f} s", highlight=False)
        for entry in self.broken[:SHOWN]:
            console.print(f"[red]broken[/red] {escape(entry['path'])}: {escape(entry['reason'])}", soft_wrap=True)
        if len(self.broken) > SHOWN:
            console.print(f"... and {len(self.broken) - SHOWN} more; {escape(self.out)}/{LEDGER} names them all")


def shrink(
    path: str | Path,
    out: str | Path,
    short_side: int = 256,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ShrinkResult:
    """Re-encode every video under ``path`` into the folder ``out``, where each has the same relative name in ``.mp4``.

    A manifest is written anew with the new paths and is else unchanged. The shorter side becomes ``short_side`` pixels,
    even, and never more than it was. Files that are there from an earlier run are left alone unless their source was
    written since, broken ones are listed in ``out``/ledger.jsonl. ``workers`` files are done at a time, one per core if
    None; one run per ``out``. ``progress`` is called with (files done, files in all). Raises UserError for a path that
    holds no video and for a folder ``out`` that is the source, lies in it or holds something else, copies of another
    folder's videos too, and OSError for a full disk.
    """
    if short_side < LEAST or short_side % 2:
        raise UserError(f"short side {short_side}: give an even number of pixels, at least {LEAST}")
    started = time.monotonic()
    source, destination = Path(path), Path(out).absolute()
    listing = list_files(source, MODALITIES["video"])
    inside = [path for path in listing.paths if container(file_of(path)) != file_of(path) or url(path) is not None]
    if inside:
        raise UserError(f"{path}: {inside[0]} is in a shard or behind a URL; shrink the loose files, then pack them")
    base = _base(source, listing)
    jobs = _jobs(listing, base, destination)
    _prepare(source, base, destination, short_side)
    manifest = _manifest(source, listing)
    if manifest is not None:
        # Before the files: a copy that was never finished then misses some, and does not pass for the whole.
        targets = {job.source: job.target.relative_to(destination).as_posix() for job in jobs}
        _copy_manifest(manifest, destination / manifest.name, [targets[_file(path)] for path in listing.paths])
    _discard_outdated(jobs)
    todo = [job for job in jobs if not job.target.exists()]
    done, reasons, ledger = Counter[How](), {}, Ledger(destination / LEDGER)
    for job, outcome in _outcomes(todo, short_side, workers or _cores()):
        if isinstance(outcome, _Broken):
            reasons[job.name] = outcome.reason
            ledger.add(job.name, outcome.reason)
        else:
            done[outcome] += 1
        if progress is not None:
            progress(len(jobs) - len(todo) + done.total() + len(reasons), len(jobs))
    _sweep(destination)
    there = [job for job in jobs if job.name not in reasons]
    return ShrinkResult(
        path=str(path),
        out=str(out),
        short_side=short_side,
        encoded=done["encoded"],
        copied=done["copied"],
        skipped=len(jobs) - len(todo),
        broken=[{"path": job.name, "reason": reasons[job.name]} for job in jobs if job.name in reasons],
        ignored=listing.ignored,
        bytes_before=sum(_bytes(Path(job.source)) for job in there),
        bytes_after=sum(_bytes(job.target) for job in there),
        seconds=time.monotonic() - started,
    )


def _file(path: str) -> str:
    # Pieces of a file are one file, however its path is written.
    return os.path.normpath(file_of(path))


def _base(source: Path, listing: Listing) -> str:
    # What names are relative to: the folder that was given, or what holds all files that a manifest names.
    root = os.path.abspath(source)  # noqa: PTH100 (unlike resolve() it leaves links alone)
    files = [_file(path) for path in listing.paths]
    folder = root if os.path.isdir(root) and files != [root] else os.path.dirname(root)  # noqa: PTH112, PTH120
    inside = all(file.startswith(os.path.join(folder, "")) for file in files)  # noqa: PTH118
    return folder if inside else os.path.commonpath(os.path.dirname(file) for file in files)  # noqa: PTH120


def _jobs(listing: Listing, base: str, destination: Path) -> list[_Job]:
    jobs: dict[Path, _Job] = {}
    for file in dict.fromkeys(_file(path) for path in listing.paths):
        name = os.path.relpath(file, base)
        # A folder of frames keeps its name, and a dot in it.
        target = destination / (name if os.path.isdir(file) else Path(name).with_suffix(".mp4"))  # noqa: PTH112
        if target in jobs:
            raise UserError(f"{jobs[target].name} and {name} would both become {target.name}; rename one of them")
        jobs[target] = _Job(file, target, name)
    return list(jobs.values())


def _prepare(source: Path, base: str, destination: Path, short_side: int) -> None:
    real = destination.resolve()
    if real == Path(base).resolve() or (source.is_dir() and real.is_relative_to(source.resolve())):
        raise UserError(f"{destination} is, or lies in, the folder that is read; give another one for the copies")
    # Names are relative to the base, so those of another one may mean other videos.
    settings = {"short_side": short_side, "version": VERSION, "source": str(Path(base).resolve())}
    if destination.exists() and any(destination.iterdir()):
        if not (destination / SETTINGS).is_file():
            raise UserError(f"{destination} holds other things; give a folder that is new or empty")
        before = json.loads((destination / SETTINGS).read_text(encoding="utf-8"))
        if before | {"source": settings["source"]} != settings:
            raise UserError(
                f"{destination} was begun with other settings (a short side of {before.get('short_side')} pixels); "
                "give another folder"
            )
        if before.get("source") != settings["source"]:
            raise UserError(
                f"{destination} holds copies of the videos in {before.get('source')}; give another folder for those in "
                f"{settings['source']}"
            )
        _sweep(destination)
        # Broken files have no copy, so this run meets them all again.
        (destination / LEDGER).unlink(missing_ok=True)
    destination.mkdir(parents=True, exist_ok=True)
    write_json(destination / SETTINGS, settings)


def _discard_outdated(jobs: Sequence[_Job]) -> None:
    # Before anything is done: where the new source turns out to be broken, the old one's copy must not pass for it.
    # A source that is gone leaves its copy alone.
    for job in jobs:
        if job.target.exists() and _written(Path(job.source)) > _written(job.target):
            shutil.rmtree(job.target) if job.target.is_dir() else job.target.unlink()


def _written(path: Path) -> int:
    # When a file, or the last of a folder's, was written, in nanoseconds.
    return max((part.stat().st_mtime_ns for part in _parts(path)), default=0)


def _parts(path: Path) -> list[Path]:
    # The file itself, or a folder of frames and what is in it; nothing where there is none.
    return [path, *path.iterdir()] if path.is_dir() else [path] if path.exists() else []


def _sweep(destination: Path) -> None:
    # What a run that was killed left half written, or a decoder that crashed.
    for left in list(destination.rglob(".*.tmp")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _outcomes(jobs: Sequence[_Job], short_side: int, workers: int) -> Iterator[tuple[_Job, How | _Broken]]:
    # Threads, each of which has its file done in a child process that may crash. They are daemons, as one that is
    # busy with a long film must not hold up a program that is interrupted; its child ends with it.
    threads = max(1, _cores() // max(1, min(workers, len(jobs))))
    todo, done = iter(jobs), queue.SimpleQueue[tuple[_Job, How | DiskFull | _Broken | Exception]]()
    lock, stopped = threading.Lock(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                job = next(todo, None)
            if job is None:
                return
            done.put((job, _shrink_one(job, short_side, threads)))

    for _ in range(min(workers, len(jobs))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in jobs:
            job, outcome = done.get()
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(outcome, DiskFull):
                raise OSError(outcome.errno, os.strerror(outcome.errno), str(job.target))
            yield job, outcome
    finally:
        stopped.set()


def _shrink_one(job: _Job, short_side: int, threads: int) -> How | DiskFull | _Broken | Exception:
    kind = MODALITIES["video"]
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        make = partial(
            reencode, target=job.target, short_side=short_side, threads=threads, frame_suffixes=kind.frame_suffixes
        )
        return isolated(make, job.source, None)
    except BrokenFile as error:
        return _Broken(error.reason)
    except Exception as error:  # for the thread that waits
        return error


def _manifest(source: Path, listing: Listing) -> Path | None:
    if not listing.rows:
        return None
    return source if source.is_file() else next(p for s in MANIFESTS if (p := source / f"manifest{s}").is_file())


def _copy_manifest(manifest: Path, out: Path, targets: Sequence[str]) -> None:
    # ``targets`` are the new paths, row by row; a piece that an old path named (#t=START,END) stays.
    with replacing_file(out) as aside:
        _WRITERS[manifest.suffix.lower()](manifest, aside, targets)


def _moved(path: str, target: str) -> str:
    return target + path[len(file_of(path)) :]


def _copy_csv(manifest: Path, out: Path, targets: Sequence[str]) -> None:
    with manifest.open(encoding="utf-8-sig", newline="") as old, out.open("w", encoding="utf-8", newline="") as new:
        reader, writer = csv.reader(old, strict=True), csv.writer(new, lineterminator="\n")
        header = next(reader)
        at = header.index("path")
        writer.writerow(header)
        for row, target in zip(filter(None, reader), targets, strict=True):
            writer.writerow([*row[:at], _moved(row[at], target), *row[at + 1 :]])


def _copy_jsonl(manifest: Path, out: Path, targets: Sequence[str]) -> None:
    with manifest.open(encoding="utf-8-sig") as old, out.open("w", encoding="utf-8") as new:
        rows = (json.loads(line) for line in old if line.strip())
        for row, target in zip(rows, targets, strict=True):
            new.write(json.dumps(row | {"path": _moved(row["path"], target)}, ensure_ascii=False) + "\n")


def _copy_parquet(manifest: Path, out: Path, targets: Sequence[str]) -> None:
    table = pq.read_table(manifest)
    at = table.column_names.index("path")
    paths = [_moved(path, target) for path, target in zip(table["path"].to_pylist(), targets, strict=True)]
    pq.write_table(table.set_column(at, "path", pa.array(paths, pa.string())), out)


_WRITERS = {".csv": _copy_csv, ".jsonl": _copy_jsonl, ".parquet": _copy_parquet}


def _bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in _parts(path) if part.is_file())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
