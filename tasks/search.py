"""Search in one's own files, by words where an encoder has learned them and by example in any case."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmssl.data import inline
from mmssl.errors import UserError
from modalities.encoder import Encoder
from tasks.features import ReportProgress
from tasks.search_index import Hit, Refreshed, SearchIndex, Tower, check_asked, check_top

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
            "refreshed": done and {"embedded": done.embedded, "kept": done.kept, "dropped": done.dropped},
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
            table.add_row(str(rank), f"{hit['score']:.3f}", escape(hit["path"]))
        console.print(table)
        for line in self.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def lines(self) -> list[str]:
        """Return what a reader must know, in words."""
        found = [f"the best {len(self.hits):,} of {self.files:,} files"]
        if self.out is not None:
            found[0] += f"; contact sheet in {self.out}"
        found += [f"{path}: cannot be found ({reason})" for path, reason in self.skipped[:NAMED]]
        if len(self.skipped) > NAMED:
            found.append(f"{len(self.skipped) - NAMED:,} more files cannot be read and so not be found")
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
    progress: ReportProgress | None = None,
) -> SearchResult:
    """Find the ``top`` files of a folder by words or by an example, and write them as a contact sheet to ``out``.

    Arguments and errors are those of ``SearchIndex``, which may stand in the place of encoder and folder, of its
    ``refresh``, which can be left out, and of its ``search``; ``out`` is a PNG or an HTML page by its suffix. Mistakes
    are found before any file is read.
    """
    from tasks.search_sheet import checked

    check_asked(query, like)
    check_top(top)
    sheet = None if out is None else checked(Path(out))
    if isinstance(encoder, SearchIndex):
        found = encoder
    elif folder is None:
        raise UserError("a search needs a folder or a manifest to search in")
    else:
        found = SearchIndex(encoder, folder, index, modality=modality, split=split)
    vector = found.vector(query, like)
    done = found.refresh(progress=progress) if refresh else None
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


def _write(result: SearchResult, out: Path, index: SearchIndex, hits: list[Hit]) -> None:
    from tasks.panels_retrieval import written
    from tasks.search_sheet import thumbnail, write_sheet

    words, like = result.query.get("text"), result.query.get("like", "")
    if words is not None:
        title, asked = f"“{words.strip()}”", (words, written(words))
    else:
        name = Path(like).name
        title, asked = f"Like {name}", (name, thumbnail(encoder_of(index.reader(like)), like))
    note = f"{result.lines()[0].partition(';')[0]} in {index.folder}."
    named = [(hit, index.name(hit["path"])) for hit in hits]
    write_sheet(out, title, note[0].upper() + note[1:], asked, named, encoder_of(index.encoder))


def written_name(index: SearchIndex, path: str) -> str:
    """Return a file's path as the person who named the folder would write it; of a text what it says."""
    name, folder = index.name(path), index.folder
    if inline.text(path) is not None:
        return name
    inside = folder.is_dir() and path != index.facts.folder  # a folder of frames is a file too
    return str((folder if inside else folder.parent) / name)


def encoder_of(tower: Tower) -> Encoder:
    """Return the encoder that a tower is or stands on."""
    return tower if isinstance(tower, Encoder) else tower.encoder
