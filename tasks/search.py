"""Search in one's own files, by words where an encoder has learned them and by example in any case."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmssl.data import inline
from mmssl.errors import UserError
from mmssl.files import legible
from tasks.features import ReportProgress
from tasks.search_index import Hit, Refreshed, SearchIndex, check_asked, check_top

NAMED = 5
"""So many broken files are named where people read; JSON has all of them."""


@dataclass(frozen=True)
class SearchResult:
    """What was found, and in what."""

    query: dict[str, str]
    """{"text": words} or {"like": path}."""
    modality: str
    """That of the files."""
    hits: list[Hit]
    """Best first; paths as the person would write them."""
    files: int
    """How many could be found."""
    refreshed: Refreshed | None
    skipped: list[tuple[str, str]]
    """(path, reason) of the files that cannot be read."""
    out: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        done = self.refreshed
        return {
            "task": "search",
            "query": self.query,
            "modality": self.modality,
            "results": [dict(hit) for hit in self.hits],
            "files": self.files,
            "refreshed": done
            and {
                "embedded": done.embedded,
                "kept": done.kept,
                "dropped": done.dropped,
                "broken": len(done.broken),
            },
            "skipped": [{"path": path, "reason": reason} for path, reason in self.skipped],
            "out": None if self.out is None else str(self.out),
        }

    def render(self, console: Console) -> None:
        """Print a row per file that was found, and what a reader must know."""
        table = Table(box=SIMPLE_HEAD)
        table.add_column("", justify="right")
        table.add_column("score", justify="right")
        table.add_column("file", overflow="fold")
        for rank, hit in enumerate(self.hits, 1):
            table.add_row(str(rank), f"{hit['score']:.3f}", escape(legible(hit["path"])))
        console.print(table)
        for line in self.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def lines(self) -> list[str]:
        """Return what a reader must know, in words."""
        found = [f"the best {len(self.hits):,} of {self.files:,} files"]
        if self.out is not None:
            found[0] += f"; contact sheet in {self.out}"
        found += [
            f"left out, since it cannot be read: {legible(path)} ({reason})" for path, reason in self.skipped[:NAMED]
        ]
        if len(self.skipped) > NAMED:
            found.append(f"{len(self.skipped) - NAMED:,} more files are left out")
        return found


def search(
    encoder: str | Path | SearchIndex,
    folder: str | Path | None = None,
    query: str | None = None,
    *,
    like: str | Path | None = None,
    top: int = 20,
    out: str | Path | None = None,
    index: str | Path | None = None,
    modality: str | None = None,
    split: str | None = None,
    refresh: bool = True,
    rebuild: bool = False,
    progress: ReportProgress | None = None,
) -> SearchResult:
    """Find the ``top`` files of a folder by words or by an example, and write them as a contact sheet to ``out``.

    Arguments and errors are those of ``SearchIndex``, which may stand in the place of encoder and folder, of its
    ``refresh``, which can be left out, and of its ``search``; ``rebuild`` is its ``anew``. ``out`` is a PNG or an HTML
    page by its suffix. Mistakes are found before any file is read.
    """
    check_asked(query, like)
    check_top(top)
    if rebuild and not refresh:
        raise UserError("an index is rebuilt by a refresh; leave out --rebuild or --no-refresh")
    sheet = None if out is None else _sheet(Path(out), like)
    if isinstance(encoder, SearchIndex):
        found = encoder
    elif folder is None:
        raise UserError("a search needs a folder or a manifest to search in")
    else:
        found = SearchIndex(encoder, folder, index, modality=modality, split=split)
    vector = found.vector(query, like)
    done = found.refresh(progress=progress, anew=rebuild) if refresh else None
    hits = found.nearest(vector, top)
    asked = {"text": query} if query is not None else {"like": str(like)}
    result = SearchResult(
        asked,
        found.modality,
        [{"path": written_name(found, hit["path"]), "score": hit["score"]} for hit in hits],
        len(found),
        done,
        [(written_name(found, path), reason) for path, reason in found.broken],
        sheet,
    )
    if sheet is not None:
        _write(result, sheet, found, hits)
    return result


def _sheet(out: Path, like: str | Path | None) -> Path:
    from tasks.search_sheet import checked  # what draws takes a second to load

    return checked(out, like)


def _write(result: SearchResult, out: Path, index: SearchIndex, hits: list[Hit]) -> None:
    from tasks.search_sheet import shown, write_sheet

    words, like = result.query.get("text"), result.query.get("like", "")
    title = f"Like {Path(like).name}" if words is None else f"“{words.strip()}”"
    example = (Path(like).name, shown(like, index.reader(like).modality)) if words is None else None
    note = f"{result.lines()[0].partition(';')[0]} in {index.folder}."
    named = [(hit, index.name(hit["path"])) for hit in hits]
    write_sheet(out, title, note[0].upper() + note[1:], example, named, index.modality)


def written_name(index: SearchIndex, path: str) -> str:
    """Return a file's path as the person who named the folder would write it; of a text what it says."""
    name, folder = index.name(path), index.folder
    if inline.text(path) is not None:
        return name
    # A folder of frames is a file too, and a manifest's are beside it.
    inside = path.startswith(f"{index.facts.folder}{os.sep}")
    return str((folder if inside else folder.parent) / name)
