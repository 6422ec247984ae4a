"""``mmssl data check``: decode every file once, in parallel, and say which are broken and why; shards too."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmssl.data import paths
from mmssl.data.ledger import Ledger
from mmssl.data.listing import list_files
from mmssl.data.shards import read_facts, verify
from mmssl.errors import UserError, nearest
from modalities.encoder import MODALITIES
from tasks.parallel import each_file

SHOWN = 20
"""Broken files that the table names; the ledger and --json name them all."""


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
    extents: dict[str, list[float]]
    """The smallest, median and largest file that decodes, as numbers of what ``extent_words`` say; {} if none does."""
    shards: int = 0
    """How many there are that ``data pack`` has written."""
    damaged: list[dict[str, str]] = field(default_factory=list)
    """``path`` and ``reason`` of every shard that is not what it was."""

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
            "size_words": list(MODALITIES[self.modality].extent_words),
            **({"shards": self.shards, "damaged_shards": self.damaged} if self.shards else {}),
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
            words = MODALITIES[self.modality].extent_words
            numbers = ", ".join(f"{word} {value:g}" for word, value in zip(words, extent, strict=True))
            console.print(f"{which:>8}: {numbers}", highlight=False)
        if self.shards:
            console.print(f"{self.shards - len(self.damaged)} of {self.shards} shards are as they were written")
        for entry in self.damaged[:SHOWN]:
            console.print(f"[red]damaged[/red] {escape(entry['path'])}: {escape(entry['reason'])}", soft_wrap=True)
        for entry in self.broken[:SHOWN]:
            console.print(f"[red]broken[/red] {escape(entry['path'])}: {escape(entry['reason'])}", soft_wrap=True)
        if len(self.broken) > SHOWN:
            console.print(f"... and {len(self.broken) - SHOWN} more broken files")


def check(
    path: str | Path,
    modality: str | None = None,
    workers: int | None = None,
    ledger_out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    timeout: float = 600.0,
) -> CheckResult:
    """Decode every file of ``modality`` under ``path`` and return what is broken.

    Without a modality it is the first of those that ``data pack`` has put into the shards there, else image.
    ``workers`` processes decode, one per core if None. ``ledger_out`` is written anew, a JSON line per broken file.
    ``progress`` is called with (files done, files in all). A file that takes longer than ``timeout`` seconds, all of
    it decoded, counts as broken. Shards of ``data pack`` are compared with their checksums besides. Raises UserError
    for a path that holds no such file.
    """
    place = paths.given(path)
    folder = place.parent if isinstance(place, Path) and place.is_file() else Path(place)
    facts = read_facts(folder)
    modality = modality or (facts or {}).get("modalities", ["image"])[0]
    if modality not in MODALITIES:
        raise UserError(f"'{modality}' is not a modality{nearest(modality, MODALITIES)}")
    listing = list_files(path, MODALITIES[modality])
    if ledger_out is not None:
        ledger_out.parent.mkdir(parents=True, exist_ok=True)
        ledger_out.unlink(missing_ok=True)
    ledger = Ledger(ledger_out)
    broken: list[dict[str, str]] = []
    extents: Counter[tuple[float, ...]] = Counter()
    outcomes = each_file(MODALITIES[modality].inspect, listing.paths, workers, timeout)
    for i, outcome in enumerate(outcomes):
        if outcome.value is not None:
            extents[outcome.value] += 1
        else:
            assert outcome.reason is not None
            broken.append({"path": listing.name(i), "reason": outcome.reason})
            ledger.add(**broken[-1])
        if progress is not None:
            progress(i + 1, len(listing))
    shards = [] if facts is None else list(verify(folder, facts))
    damaged = [{"path": name, "reason": reason} for name, reason in shards if reason is not None]
    for entry in damaged:
        ledger.add(**entry)
    summary = _summary(extents)
    return CheckResult(str(place), modality, extents.total(), broken, listing.ignored, summary, len(shards), damaged)


def _summary(extents: Counter[tuple[float, ...]]) -> dict[str, list[float]]:
    if not extents:
        return {}
    by_size = sorted(extents, key=lambda extent: (math.prod(extent), extent))
    middle, passed = (extents.total() + 1) // 2, 0
    for median in by_size:
        passed += extents[median]
        if passed >= middle:
            break
    return {"smallest": list(by_size[0]), "median": list(median), "largest": list(by_size[-1])}
