"""What a path holds: a folder of media, a table of files (``mmssl.data.tables``) or one media file.

Paths stay strings here, and folders are read with ``os.scandir``: a million files list in seconds.
"""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from mmssl.contracts import Media
from mmssl.data import fragment, inline, paths
from mmssl.data.cells import something
from mmssl.data.parts import container
from mmssl.data.tables import MANIFESTS, SHARD, Columns, Table, table_at
from mmssl.errors import UserError, nearest, sibling

__all__ = ["ITSELF", "MANIFESTS", "Columns", "Listing", "list_files", "own_column", "resolve"]

ITSELF = {"text": "caption"}
"""Modalities that may stand in the manifest itself, where others have a path, and in which column."""


@dataclass(frozen=True)
class Listing:
    """What a path holds, before anything is decoded: files in a fixed order and their manifest columns."""

    root: Path | str
    """What the person gave, a URL as a text."""
    paths: list[str]
    """Absolute paths of files or of parts of files (``mmssl.data.parts``), or URLs; in manifest order, or sorted for a
    folder."""
    columns: Columns = field(default_factory=dict)
    """Manifest columns other than path, an empty cell as None; {} for a folder."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Lower-case suffix -> how many files of a folder are not of this modality."""
    rows: Sequence[int] = ()
    """For each file the manifest row it stands in, counted from 1 below the header; () without a manifest."""
    media: dict[str, list[str | None]] = field(default_factory=dict)
    """Where rows are of several modalities, their paths by modality, None for what a row has not; else {}."""

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """Return what file ``i`` is called: its path, relative to the folder it was found in, else absolute.

        What is a text and no file is called as it reads. A row of several media is called after the first of them, and
        by its number, for others may have the same.
        """
        name = self.called(self.paths[i])
        return f"{name}, row {self.rows[i]}" if self.media and self.rows else name

    def called(self, path: str) -> str:
        """Return a path relative to the folder that the files were found in, else absolute; a text as it reads."""
        text = inline.text(path)
        return path.removeprefix(self._base) if text is None else text

    def contents(self) -> bytes:
        """Return what there is in every row, by name, to be hashed: the same wherever the folder lies."""
        columns: Sequence[Sequence[str | None]] = list(self.media.values()) or [self.paths]
        rows = ("\0".join((path or "").removeprefix(self._base) for path in row) for row in zip(*columns, strict=True))
        return "\n".join(rows).encode(errors="surrogatepass")

    def select(self, indices: Sequence[int]) -> "Listing":
        """Return the files at ``indices``, in that order, with their columns."""
        columns = {key: [values[i] for i in indices] for key, values in self.columns.items()}
        rows = [self.rows[i] for i in indices] if self.rows else ()
        media = {key: [values[i] for i in indices] for key, values in self.media.items()}
        return replace(self, paths=[self.paths[i] for i in indices], columns=columns, rows=rows, media=media)

    def split(self, name: str) -> "Listing":
        """Return the files whose ``split`` column equals ``name``; raises UserError naming the splits there are."""
        if "split" not in self.columns:
            raise UserError(f"{self.root}: has no 'split' column in a manifest, so no split '{name}' either")
        column = self.columns["split"]
        if name not in column:
            splits = {value for value in column if value is not None}
            raise UserError(f"{self.root}: no row has split '{name}'{nearest(name, splits)}")
        return self.select([i for i, value in enumerate(column) if value == name])

    def labels(self, column: str = "label") -> list[str]:
        """Return every file's label: the manifest's ``column``, or for a folder the first sub-folder's name.

        Raises UserError where there is no such column, or a file has no label.
        """
        if not self.rows and not self.columns:
            return self._folder_labels(column)
        if column not in self.columns:
            raise UserError(f"{self.root}: the manifest has no '{column}' column{nearest(column, self.columns)}")
        labels = []
        for i, value in enumerate(self.columns[column]):
            if value is None:
                raise UserError(f"{self.root}: row {self.rows[i]} ({self.called(self.paths[i])}) has no {column}")
            labels.append(value)
        return labels

    def _folder_labels(self, column: str) -> list[str]:
        if column != "label":
            raise UserError(f"{self.root}: column '{column}' was asked for, but there is no manifest to hold it")
        labels = []
        for i in range(len(self)):
            folder, slash, _ = self.name(i).partition(os.sep)
            if not slash:
                raise UserError(
                    f"{self.root}: {self.name(i)} has no label; make one sub-folder per class, or add a manifest"
                )
            labels.append(folder)
        return labels

    @cached_property
    def _base(self) -> str:
        root = paths.absolute(self.root)
        is_file = self.paths[:1] == [root] or (bool(self.rows) and root.lower().endswith((*MANIFESTS, SHARD)))
        return paths.join(os.path.dirname(root) if is_file else root, "")  # noqa: PTH120


def list_files(path: str | Path, kind: Media, split: str | None = None, default_split: str | None = None) -> Listing:
    """Return what ``path`` holds of the modality ``kind``.

    The columns ``start`` and ``end`` of a manifest, in seconds, make its rows pieces of files. ``split`` selects the
    rows of one split, which must exist; ``default_split`` is selected if there are rows of it. Raises UserError, one
    sentence, for a path that holds nothing or a manifest that cannot be read.
    """
    root = paths.given(path)
    piece = fragment.split(str(root)) if kind.timed else fragment.Span(str(root))
    check_there(root, container(piece.file))
    if piece.end is not None and piece.end <= piece.start:
        raise UserError(f"{root} ends before it starts: a piece is #t=START,END in seconds")
    whole = piece.file == str(root)
    table = table_at(piece.file, [kind]) if whole else None
    if table is not None:
        listing = _list_table(root, table, kind)
    elif whole and paths.is_folder(piece.file):
        listing = _list_folder(root, kind)
    elif paths.suffix(piece.file) in kind.suffixes or paths.is_folder(piece.file):
        listing = Listing(root, [paths.absolute(root)])
    else:
        raise UserError(
            f"{root} is neither a folder, a manifest ({', '.join(MANIFESTS)}), a shard ({SHARD}) "
            f"nor a file of modality {kind.name} ({', '.join(sorted(kind.suffixes))})"
        )
    if split is None and default_split in listing.columns.get("split", []):
        split = default_split
    return listing if split is None else listing.split(split)


def check_there(root: Path | str, file: str) -> None:
    """Raise UserError where there is no file or folder for what a person gave."""
    if not paths.exists(file):
        hint = sibling(root) if isinstance(root, Path) else ""
        if "*" in file or ".." in posixpath.basename(file):
            hint = "; patterns are not expanded: give the folder that holds the shards"
        raise UserError(f"{root} does not exist{hint}")


def _list_folder(root: Path | str, kind: Media) -> Listing:
    files, ignored = [], Counter[str]()
    for folder, names in paths.walk(paths.absolute(root)):
        found = [name for name in names if paths.suffix(name) in kind.suffixes]
        others = [name for name in names if paths.suffix(name) not in kind.suffixes]
        if not found and paths.url(root) is None and _is_film(others, kind):
            files.append(folder)
            others = [name for name in others if paths.suffix(name) not in kind.frame_suffixes]
        files += [paths.join(folder, name) for name in found]
        ignored.update(map(paths.suffix, others))
    if not files:
        others_ = ", ".join(f"{n} {suffix or 'without a suffix'}" for suffix, n in ignored.most_common(5))
        what = f"only {ignored.total()} of other kinds ({others_})" if ignored else "and no other file either"
        raise UserError(f"{root} holds no file of modality {kind.name} ({', '.join(sorted(kind.suffixes))}), {what}")
    return Listing(root, sorted(files), ignored=dict(sorted(ignored.items())))


def _is_film(names: Sequence[str], kind: Media) -> bool:
    # Several pictures whose names differ in their numbers alone, and no film beside them.
    frames = [name for name in names if paths.suffix(name) in kind.frame_suffixes and any(map(str.isdigit, name))]
    return len(frames) > 1 and len({re.sub(r"\d+", "#", name) for name in frames}) == 1


def _list_table(root: Path | str, table: Table, kind: Media) -> Listing:
    where, columns, _ = table
    column = _path_column(columns, kind)
    if column not in columns:
        raise UserError(f"{where} has no 'path' column{nearest('path', columns)}")
    if not columns[column]:
        raise UserError(f"{where} lists no file")
    files = []
    for row, path in enumerate(resolve(table, column, kind), 1):
        if path is None:
            raise UserError(f"{where}: row {row} has an empty {column}")
        files.append(path)
    others = {name: [*map(something, values)] for name, values in columns.items() if name != column}
    return Listing(root, files, others, rows=range(1, len(files) + 1))


def own_column(columns: Columns, kind: Media) -> str | None:
    """Return the column of a manifest that holds one kind and no other; None where there is none."""
    names = (f"{kind.name}_path", ITSELF.get(kind.name))
    return next((name for name in names if name in columns), None)


def _path_column(columns: Columns, kind: Media) -> str:
    """Return the column in which a manifest, perhaps of several modalities, has the files of a kind."""
    own = own_column(columns, kind)
    # Beside files of its own, a caption is what is said of them.
    files = (paths.suffix(name) in kind.suffixes for name in columns.get("path", ()) if name)
    return "path" if own is None or (own == ITSELF.get(kind.name) and any(files)) else own


def resolve(table: Table, column: str, kind: Media) -> list[str | None]:
    """Return a table's paths in ``column`` as absolute ones, None where the cell is empty.

    They are pieces where rows have a start or an end; raises UserError for times that make none.
    """
    cells = table.columns[column]
    if column == ITSELF.get(kind.name):
        return [inline.join(text) if text and text.strip() else None for text in cells]
    files = [paths.join(table.folder, name) if name and name.strip() else None for name in cells]
    return _pieces(table, files) if kind.timed and table.columns.keys() & {"start", "end"} else files


def _pieces(table: Table, files: Sequence[str | None]) -> list[str | None]:
    where, columns, _ = table
    nothing: list[str | None] = [None] * len(files)
    pieces: list[str | None] = []
    for row, (path, *times) in enumerate(
        zip(files, columns.get("start", nothing), columns.get("end", nothing), strict=True), 1
    ):
        if path is None:
            pieces.append(None)
            continue
        if any(time is not None for time in times) and fragment.split(path).file != path:
            raise UserError(f"{where}: row {row} names a piece ({path}) and gives start or end too; use one of them")
        try:
            pieces.append(fragment.join(path, *(None if time is None else float(time) for time in times)))
        except ValueError:
            raise UserError(
                f"{where}: row {row} starts at '{times[0] or 0}' and ends at '{times[1] or 'the end'}'; "
                "give seconds, the end after the start"
            ) from None
    return pieces
