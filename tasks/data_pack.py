"""``mmssl data pack``: files into WebDataset tar shards, and a manifest that finds each of them by its place.

Beside ``shard-000000.tar`` ... there are ``manifest.parquet``, in which all rows of the source are and all its columns
of plain values, as texts, those of the paths made anew, and
``shards.json`` with a checksum per shard. In a shard, a sample is what WebDataset takes for
one: members of one name. Besides the media there may be ``.txt`` (its captions, a line each), ``.cls`` (the index of
its label among the sorted ones) and ``.json`` (the columns of its row; of several rows, a list under ``rows``).
"""

import fcntl
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmssl.data import paths
from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.ledger import Ledger
from mmssl.data.shards import FACTS, checksum, fault, read_facts, right
from mmssl.data.tables import UNFINISHED
from mmssl.data.tars import TarMember, scan
from mmssl.errors import UserError
from mmssl.files import replacing_file, to_json, write_json
from modalities.encoder import MODALITIES
from tasks.pack_plan import PackSample, Plan, make_plan
from tasks.parallel import Outcome, each_file
from tasks.stopping import stopping
from tasks.writer import say

LEDGER = "ledger.jsonl"
MANIFEST = "manifest.parquet"
DONE = "packed.jsonl"
"""A line for each shard that is finished, as long as not all are."""
SHOWN = 20
"""Broken files that the table names; the ledger and --json name them all."""
VERSION = 1
"""Of how shards are written: those of another one are not gone on with."""


@dataclass(frozen=True)
class PackResult:
    """The report on one folder of shards."""

    path: str
    out: str
    modalities: list[str]
    samples: int
    """Those that are in the shards."""
    rows: int
    """Of the manifest: a sample may have several."""
    shards: int
    kept: int
    """Shards that an earlier run has finished."""
    broken: list[dict[str, str]]
    """``path`` and ``reason`` of every file that could not be packed, in the order of the data."""
    ignored: dict[str, int]
    """Suffix -> how many files of a folder are not of this modality."""
    bytes: int
    """Of all shards."""
    seconds: float

    @property
    def all_broken(self) -> bool:
        """Whether nothing could be packed."""
        return self.samples == 0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dict(vars(self))

    def render(self, console: Console) -> None:
        """Print the report for people."""
        console.print(f"{escape(self.path)} -> {escape(self.out)}: {', '.join(self.modalities)}", soft_wrap=True)
        table = Table()
        table.add_column("what")
        table.add_column("count", justify="right")
        table.add_row("samples", str(self.samples))
        table.add_row("rows of the manifest", str(self.rows))
        table.add_row("shards", str(self.shards))
        table.add_row("shards that were there already", str(self.kept))
        table.add_row("[red]broken files[/red]" if self.broken else "broken files", str(len(self.broken)))
        for suffix, count in self.ignored.items():
            table.add_row(f"ignored: {escape(suffix) or 'no suffix'}", str(count))
        console.print(table)
        console.print(f"{self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s", highlight=False)
        for entry in self.broken[:SHOWN]:
            console.print(f"[red]broken[/red] {escape(entry['path'])}: {escape(entry['reason'])}", soft_wrap=True)
        if len(self.broken) > SHOWN:
            console.print(f"... and {len(self.broken) - SHOWN} more; {escape(self.out)}/{LEDGER} names them all")


def pack(
    path: str | Path,
    out: str | Path,
    modality: str | None = None,
    recipe: str | None = None,
    per_shard: int = 1000,
    max_shard_mb: int = 512,
    workers: int | None = None,
    timeout: float = 600.0,
) -> PackResult:
    """Pack what ``path`` holds into ``out``: shards of at most ``per_shard`` samples and ``max_shard_mb`` megabytes.

    What is packed are the files of ``modality`` (image, if nothing is said) and of others that have columns of their
    own in the manifest, or those of ``recipe``. Every file is decoded first, ``workers`` at a time (one per core if
    None) and in at most ``timeout`` seconds; those that are broken or gone are listed in ``out``/ledger.jsonl. A run
    that was cut off is gone on with: finished shards whose checksums are right stay. The same source gives the same
    bytes. Raises UserError where there is nothing to pack, and for a folder ``out`` that holds something else, lies in
    the source, is being packed or was begun with another one; Stopped for SIGINT and SIGTERM; OSError for a full disk.
    """
    if min(per_shard, max_shard_mb) < 1:
        raise UserError(f"a shard of {per_shard} samples and {max_shard_mb} MB is none: give 1 or more")
    where = paths.given(out)
    if not isinstance(where, Path):
        raise UserError(f"{where}: shards are written on this machine; copy the folder there afterwards")
    started = time.monotonic()
    destination = where.absolute()
    _check_outside(path, destination)
    plan = make_plan(path, modality, recipe, per_shard, max_shard_mb)
    settings = {"per_shard": per_shard, "max_shard_mb": max_shard_mb, "modalities": list(plan.media)}
    facts = {"version": VERSION, **settings, "sources": [plan.source(shard) for shard in plan.shards]}
    with _held(destination):
        finished = _prepare(path, destination, facts, plan)
        kept = len(finished)
        with stopping(lambda: f"stopped after {len(finished)} shards; run the same command again to go on"):
            _write(plan, destination, finished, workers, timeout)
        shards = [finished[i] for i in range(len(plan.shards))]
        rows = _finish(plan, destination, facts, shards)
    return PackResult(
        path=str(paths.given(path)),
        out=str(where),
        modalities=list(plan.media),
        samples=sum(shard["samples"] for shard in shards),
        rows=rows,
        shards=len(shards),
        kept=kept,
        broken=_broken(destination / LEDGER),
        ignored=plan.listing.ignored,
        bytes=sum(shard["bytes"] for shard in shards),
        seconds=time.monotonic() - started,
    )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes from packing into it; raises UserError where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder} is being packed by another process; wait for it or stop it") from None
    finally:
        os.close(handle)


def _write(
    plan: Plan, destination: Path, finished: dict[int, dict[str, Any]], workers: int | None, timeout: float
) -> None:
    """Write the shards that are not ``finished``, and note each there and in the folder."""
    packer = _Packer(plan, destination, Ledger(destination / LEDGER))
    todo = [i for i in range(len(plan.shards)) if i not in finished]
    for i, shard in packer.write(todo, workers, timeout):
        finished[i] = shard
        with (destination / DONE).open("a", encoding="utf-8") as lines:
            lines.write(_line(i, shard))
        count = sum(one["samples"] for one in finished.values())
        say(f"{len(finished)} of {len(plan.shards)} shards, {count:,} samples")


def _finish(plan: Plan, destination: Path, facts: Mapping[str, Any], shards: Sequence[dict[str, Any]]) -> int:
    """Write what says that all is there, and return the rows of the manifest; of nothing, leave the ledger alone."""
    rows = 0
    if any(shard["samples"] for shard in shards):
        rows = _write_manifest(plan, destination)
        write_json(destination / FACTS, {**facts, "classes": plan.classes, "shards": shards})
    else:
        for shard in shards:
            (destination / shard["file"]).unlink()
    for name in (UNFINISHED, DONE):
        (destination / name).unlink(missing_ok=True)
    return rows


def _name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def _broken(ledger: Path) -> list[dict[str, str]]:
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger.exists() else []
    return [json.loads(line) for line in lines]


# What is there already


def _check_outside(source: str | Path, destination: Path) -> None:
    root = paths.given(source)
    if isinstance(root, Path) and root.is_dir() and destination.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{destination} is, or lies in, the folder that is read; give another one for the shards")


def _prepare(source: str | Path, destination: Path, facts: Mapping[str, Any], plan: Plan) -> dict[int, dict[str, Any]]:
    """See what an earlier run has finished in a folder, and return the shards that are right by number.

    The folder counts as unfinished from here on if any is to be written.
    """
    finished: dict[int, dict[str, Any]] = {}
    there = {file.name for file in destination.iterdir()}
    if there == {LEDGER}:  # of a source of which nothing could be packed
        (destination / LEDGER).unlink()
    elif there:
        before, finished = _begun(destination)
        _check_same(source, destination, before, facts, plan)
        shards = {i: (destination / _name(i), shard) for i, shard in finished.items()}
        wrong = {i: words for i, (file, shard) in shards.items() if (words := fault(file, shard)) is not None}
        for i, words in wrong.items():
            say(f"{_name(i)}: {words}; it is packed anew")
        finished = {i: shard for i, shard in finished.items() if i not in wrong}
        for left in destination.glob(".*.tmp"):  # of a run that was killed
            left.unlink()
    if len(finished) == len(plan.shards) and FACTS in there:
        return finished
    write_json(destination / UNFINISHED, facts)
    with replacing_file(destination / DONE) as aside:
        aside.write_text("".join(starmap(_line, finished.items())), encoding="utf-8")
    return finished


def _line(shard: int, facts: Mapping[str, Any]) -> str:
    return to_json({"shard": shard, **facts}) + "\n"


def _begun(destination: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Return with which facts the shards in a folder were begun, and which of them are finished."""
    facts = read_facts(destination)
    finished = dict(enumerate(facts["shards"])) if facts is not None else {}
    unfinished = destination / UNFINISHED
    if unfinished.exists():
        facts = _json(unfinished.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(facts, dict) or not isinstance(facts.get("sources"), list):
            raise UserError(f"{unfinished} is not what 'data pack' writes; give another folder")
    if facts is None:
        raise UserError(f"{destination} holds other things; give a folder that is new or empty")
    done = destination / DONE
    for line in done.read_text(encoding="utf-8", errors="replace").splitlines() if done.exists() else ():
        entry = _json(line)
        if not right(entry) or entry.get("shard") not in range(len(facts["sources"])):
            break  # half written when the run was killed
        finished[entry.pop("shard")] = entry
    return facts, finished


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _check_same(
    source: str | Path, destination: Path, before: Mapping[str, Any], now: Mapping[str, Any], plan: Plan
) -> None:
    """Raise UserError where shards were begun with other settings, or the source has changed since."""
    for key in now.keys() - {"sources"}:
        if before.get(key) != now[key]:
            raise UserError(
                f"{destination} was begun with {key} {before.get(key)}, and this is {now[key]}; give another folder"
            )
    theirs, ours = before["sources"], now["sources"]
    if theirs != ours:
        pairs = zip(theirs, ours, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(ours)))
        first = next(iter(plan.shards[at][0].files.values()), "") if at < len(plan.shards) else ""
        where = f", from {plan.name(first)} on" if first else ""
        raise UserError(
            f"{paths.given(source)} has changed since {destination} was begun ({_name(at)}{where}); pack it into "
            "another folder"
        )


# Shards


class _Packer:
    """Writes the shards of a plan."""

    def __init__(self, plan: Plan, destination: Path, ledger: Ledger) -> None:
        self.plan, self.destination, self.ledger = plan, destination, ledger
        classes = plan.classes
        numbered = all(label.isdecimal() for label in classes)
        self.classes = {label: label if numbered else str(i) for i, label in enumerate(classes)}

    def write(self, todo: Sequence[int], workers: int | None, timeout: float) -> Iterator[tuple[int, dict[str, Any]]]:
        """Write shards by number, and yield each with what is to be known of it."""
        samples = [sample for i in todo for sample in self.plan.shards[i]]
        with ExitStack() as stack:
            checks: dict[str, Iterator[Outcome[tuple[float, ...]]]] = {}
            for name in self.plan.media:
                files = [sample.files[name] for sample in samples if name in sample.files]
                checks[name] = each_file(MODALITIES[name].inspect, files, workers, timeout)
                stack.enter_context(closing(checks[name]))  # type: ignore[type-var]
            for i in todo:
                target = self.destination / _name(i)
                with replacing_file(target) as aside:
                    count = self._write_one(aside, self.plan.shards[i], checks)
                facts = {"file": target.name, "samples": count, "bytes": target.stat().st_size}
                yield i, {**facts, "sha256": checksum(target)}

    def _write_one(
        self, file: Path, samples: Sequence[PackSample], checks: Mapping[str, Iterator[Outcome[tuple[float, ...]]]]
    ) -> int:
        count = 0
        with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as tar:
            for sample in samples:
                outcomes = {name: next(checks[name]) for name in sample.files}
                media = self._read(sample, {name: one.reason for name, one in outcomes.items()})
                if media is None:
                    continue
                count += 1
                for name, data in {**media, **self._said(sample, media)}.items():
                    info = tarfile.TarInfo(name)  # of no time, owner or right: the same source gives the same bytes
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return count

    def _read(self, sample: PackSample, reasons: Mapping[str, str | None]) -> dict[str, bytes] | None:
        """Return the media of a sample by member; None where one is broken, which the ledger then knows."""
        members, found = sample.members(), {}
        for name, file in sample.files.items():
            reason = reasons[name]
            try:
                if reason is None:
                    found[members[name]] = guarded(lambda path: Path(path).read_bytes(), file, None)
            except BrokenFile as error:
                reason = error.reason
            if reason is not None:
                self.ledger.add(self.plan.name(file), reason)
        return found if len(found) == len(members) else None

    def _said(self, sample: PackSample, media: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return what is said of a sample as members that WebDataset decodes: its class, captions and columns."""
        rows = [self.plan.row(row) for row in sample.rows]
        said = {"json": to_json(rows[0] if len(rows) == 1 else {"rows": rows})} if any(rows) else {}
        labels = {row.get("label") for row in rows}
        if len(labels) == 1 and None not in labels:
            said["cls"] = self.classes[labels.pop() or ""]
        captions = [" ".join(row["caption"].split()) for row in rows if "caption" in row]
        if captions:
            said["txt"] = "\n".join(captions)
        named = {f"{sample.key}.{ext}": text.encode(errors="replace") for ext, text in said.items()}
        return {name: data for name, data in named.items() if name not in media}


# The manifest


def _write_manifest(plan: Plan, destination: Path) -> int:
    """Write where each row's files are now, and the other columns as they were; return the number of rows."""
    places: dict[str, list[str | None]] = {name: [None] * len(plan.listing) for name in plan.media}
    for i, shard in enumerate(plan.shards):
        found = {entry.name: entry for entry in scan(str(destination / _name(i)))}
        for sample in shard:
            members = sample.members()
            if not members.keys() <= {name for name, member in members.items() if member in found}:
                continue
            for name, member in members.items():
                place = TarMember(_name(i), found[member].offset, found[member].size, member)
                for row in sample.rows:
                    places[name][row] = f"{place}{plan.piece(row, name)}"
    kept = [row for row in range(len(plan.listing)) if any(files[row] is not None for files in places.values())]
    names = {name: f"{name}_path" if plan.listing.media else "path" for name in places}
    columns = {names[name]: files for name, files in places.items()} | plan.columns
    table = pa.table({name: pa.array([values[row] for row in kept], pa.string()) for name, values in columns.items()})
    with replacing_file(destination / MANIFEST) as aside:
        pq.write_table(table, aside)
    return len(kept)
