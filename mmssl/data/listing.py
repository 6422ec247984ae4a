"""What a path holds: a folder of media, a folder with a manifest, a manifest file or one media file.

Paths stay strings here, and folders are read with ``os.scandir``: a million files list in seconds.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmssl.contracts import Media
from mmssl.data import fragment, inline
from mmssl.errors import UserError, nearest, sibling

Columns = dict[str, list[str | None]]

MANIFESTS = (".csv", ".jsonl", ".parquet")
"""Suffixes of a manifest; a folder's own is called ``manifest`` plus one of them."""

ITSELF = {"text": "caption"}
"""Modalities that may stand in the manifest itself, where others have a path, and in which column."""


@dataclass(frozen=True)
class Listing:
    """What a path holds, before anything is decoded: files in a fixed order and their manifest columns."""

    root: Path
    """What the person gave."""
    paths: list[str]
    """Absolute file paths, in manifest order, or sorted for a folder."""
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
        name = self._called(self.paths[i])
        return f"{name}, row {self.rows[i]}" if self.media and self.rows else name

    def _called(self, path: str) -> str:
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
                raise UserError(f"{self.root}: row {self.rows[i]} ({self._called(self.paths[i])}) has no {column}")
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
        root = os.path.abspath(self.root)  # noqa: PTH100 (a string, and unlike resolve() it leaves links alone)
        is_file = self.paths[:1] == [root] or (bool(self.rows) and root.lower().endswith(MANIFESTS))
        return os.path.join(os.path.dirname(root) if is_file else root, "")  # noqa: PTH118, PTH120


def list_files(path: str | Path, kind: Media, split: str | None = None, default_split: str | None = None) -> Listing:
    """Return what ``path`` holds of the modality ``kind``.

    The columns ``start`` and ``end`` of a manifest, in seconds, make its rows pieces of files. ``split`` selects the
    rows of one split, which must exist; ``default_split`` is selected if there are rows of it. Raises UserError, one
    sentence, for a path that holds nothing or a manifest that cannot be read.
    """
    root = Path(path)
    piece = fragment.split(str(path)) if kind.timed else fragment.Span(str(path))
    if not os.path.exists(piece.file):  # noqa: PTH110 (False, not an exception, for what may not be asked about)
        raise UserError(f"{root} does not exist{sibling(root)}")
    if piece.end is not None and piece.end <= piece.start:
        raise UserError(f"{root} ends before it starts: a piece is #t=START,END in seconds")
    if root.is_dir():
        manifest = _manifest_in(root)
        listing = _list_folder(root, kind) if manifest is None else _list_manifest(root, manifest, kind)
    elif root.suffix.lower() in MANIFESTS:
        listing = _list_manifest(root, root, kind)
    elif Path(piece.file).suffix.lower() in kind.suffixes or Path(piece.file).is_dir():
        listing = Listing(root, [os.path.abspath(root)])  # noqa: PTH100
    else:
        raise UserError(
            f"{root} is neither a folder, a manifest ({', '.join(MANIFESTS)}) "
            f"nor a file of modality {kind.name} ({', '.join(sorted(kind.suffixes))})"
        )
    if split is None and default_split in listing.columns.get("split", []):
        split = default_split
    return listing if split is None else listing.split(split)


def manifest_of(root: Path) -> Path | None:
    """Return the manifest that a path is or has at its top; None for a folder without one.

    Raises UserError where there is nothing, or more than one.
    """
    if not root.exists():
        raise UserError(f"{root} does not exist{sibling(root)}")
    if root.is_dir():
        return _manifest_in(root)
    if root.suffix.lower() in MANIFESTS:
        return root
    raise UserError(f"{root} is neither a folder nor a manifest ({', '.join(MANIFESTS)})")


def _manifest_in(folder: Path) -> Path | None:
    found = [p for suffix in MANIFESTS if (p := folder / f"manifest{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} holds more than one manifest: name one of {', '.join(map(str, found))}")
    return found[0] if found else None


def _list_folder(root: Path, kind: Media) -> Listing:
    paths, ignored = [], Counter[str]()
    for folder, names in _walk(os.path.abspath(root)):  # noqa: PTH100
        found = [name for name in names if _suffix(name) in kind.suffixes]
        others = [name for name in names if _suffix(name) not in kind.suffixes]
        if not found and _is_film(others, kind):
            paths.append(folder)
            others = [name for name in others if _suffix(name) not in kind.frame_suffixes]
        paths += [os.path.join(folder, name) for name in found]  # noqa: PTH118
        ignored.update(map(_suffix, others))
    if not paths:
        others_ = ", ".join(f"{n} {suffix or 'without a suffix'}" for suffix, n in ignored.most_common(5))
        what = f"only {ignored.total()} of other kinds ({others_})" if ignored else "and no other file either"
        raise UserError(f"{root} holds no file of modality {kind.name} ({', '.join(sorted(kind.suffixes))}), {what}")
    return Listing(root, sorted(paths), ignored=dict(sorted(ignored.items())))


def _is_film(names: Sequence[str], kind: Media) -> bool:
    # Several pictures whose names differ in their numbers alone, and no film beside them.
    frames = [name for name in names if _suffix(name) in kind.frame_suffixes and any(map(str.isdigit, name))]
    return len(frames) > 1 and len({re.sub(r"\d+", "#", name) for name in frames}) == 1


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    # Yields every folder and the names of the files in it.
    # A link that goes in circles ends where it meets a folder that it is inside of. A link to nothing counts as a file,
    # so that it is reported as broken instead of vanishing.
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(folder, ())]
    while pending:
        folder, above = pending.pop()
        status = os.stat(folder)  # noqa: PTH116
        here = (status.st_dev, status.st_ino)
        if here in above:
            continue
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            raise UserError(f"{folder} cannot be read: permission denied") from None
        names = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                pending.append((entry.path, (*above, here)))
            elif entry.is_file() or entry.is_symlink():
                names.append(entry.name)
        yield folder, names


def read_manifest(path: Path) -> Columns:
    """Return the columns of a manifest, an empty cell as None; raises UserError where it cannot be read."""
    try:
        return _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _list_manifest(root: Path, manifest: Path, kind: Media) -> Listing:
    columns = read_manifest(manifest)
    column = _path_column(columns, kind)
    if column not in columns:
        raise UserError(f"{manifest} has no 'path' column{nearest('path', columns)}")
    if not columns[column]:
        raise UserError(f"{manifest} lists no file")
    paths = []
    for row, path in enumerate(resolve(manifest, columns, column, kind), 1):
        if path is None:
            raise UserError(f"{manifest}: row {row} has an empty {column}")
        paths.append(path)
    others = {name: values for name, values in columns.items() if name != column}
    return Listing(root, paths, others, rows=range(1, len(paths) + 1))


def own_column(columns: Columns, kind: Media) -> str | None:
    """Return the column of a manifest that holds one kind and no other; None where there is none."""
    names = (f"{kind.name}_path", ITSELF.get(kind.name))
    return next((name for name in names if name in columns), None)


def _path_column(columns: Columns, kind: Media) -> str:
    """Return the column in which a manifest, perhaps of several modalities, has the files of a kind."""
    own = own_column(columns, kind)
    # Beside files of its own, a caption is what is said of them.
    files = (_suffix(name) in kind.suffixes for name in columns.get("path", ()) if name)
    return "path" if own is None or (own == ITSELF.get(kind.name) and any(files)) else own


def resolve(manifest: Path, columns: Columns, column: str, kind: Media) -> list[str | None]:
    """Return a manifest's paths in ``column`` as absolute ones, None where the cell is empty.

    They are pieces where rows have a start or an end; raises UserError for times that make none.
    """
    if column == ITSELF.get(kind.name):
        return [inline.join(text) if text and text.strip() else None for text in columns[column]]
    folder = os.path.abspath(manifest.parent)  # noqa: PTH100
    paths = [
        os.path.join(folder, name) if name and name.strip() else None  # noqa: PTH118 (an absolute name stays as it is)
        for name in columns[column]
    ]
    return _pieces(manifest, paths, columns) if kind.timed and columns.keys() & {"start", "end"} else paths


def _pieces(manifest: Path, paths: Sequence[str | None], columns: Columns) -> list[str | None]:
    nothing: list[str | None] = [None] * len(paths)
    pieces: list[str | None] = []
    for row, (path, *times) in enumerate(
        zip(paths, columns.get("start", nothing), columns.get("end", nothing), strict=True), 1
    ):
        if path is None:
            pieces.append(None)
            continue
        if any(time is not None for time in times) and fragment.split(path).file != path:
            raise UserError(f"{manifest}: row {row} names a piece ({path}) and gives start or end too; use one of them")
        try:
            pieces.append(fragment.join(path, *(None if time is None else float(time) for time in times)))
        except ValueError:
            raise UserError(
                f"{manifest}: row {row} starts at '{times[0] or 0}' and ends at '{times[1] or 'the end'}'; "
                "give seconds, the end after the start"
            ) from None
    return pieces


def _read_csv(path: Path) -> Columns:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            _no_repeats(path, header)
            columns: Columns = {name: [] for name in header}
            for cells in filter(None, reader):
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells under {len(header)} column names; "
                        "quote cells that hold a comma"
                    )
                for values, cell in zip(columns.values(), cells, strict=True):
                    values.append(cell or None)
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None
    return columns


def _read_jsonl(path: Path) -> Columns:
    columns: Columns = {}
    rows = 0
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({getattr(error, 'msg', error)})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: a row is a JSON object, but this is a {type(row).__name__}")
            for key in row:
                columns.setdefault(key, [None] * rows)
            for key, values in columns.items():
                values.append(_text(row.get(key)))
            rows += 1
    return columns


def _read_parquet(path: Path) -> Columns:
    try:
        file = pq.ParquetFile(path)
        # Vectors and raw bytes are no manifest columns, and would fill the memory.
        names = [f.name for f in file.schema_arrow if not (pa.types.is_nested(f.type) or _is_binary(f.type))]
        _no_repeats(path, names)
        table = file.read(columns=names)
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    return {name: [_text(value) for value in table.column(name).to_pylist()] for name in names}


def _no_repeats(path: Path, names: Sequence[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UserError(f"{path} has more than one column '{name}'")


def _is_binary(kind: Any) -> bool:
    return any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary))


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, default=str)


_READERS: dict[str, Callable[[Path], Columns]] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
