"""Tables of files: manifests in CSV, JSON lines and parquet, tar shards, parquet files that hold the files themselves.

Whatever a table is made of, it becomes columns of texts, some of which are paths.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmssl.contracts import Media
from mmssl.data import cells, paths, tars
from mmssl.errors import UserError

Columns = dict[str, list[str | None]]

MANIFESTS = (".csv", ".jsonl", ".parquet")
"""Suffixes of a manifest; a folder's own is called ``manifest`` plus one of them."""
SHARD = ".tar"
UNFINISHED = "packing.json"
"""What is in a folder of shards as long as they are not all there."""

_SPLIT = re.compile(r"(?:.*/)?([^/]+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?|(?:.*/)?([^/]+)/\d{4,}")
"""How ``datasets`` and the Hub name their files, without the suffix: ``train-00000-of-00002``, ``train/0000``."""
_COMPRESSED = re.compile(r".*\.(tar\.\w+|tgz)", re.DOTALL | re.IGNORECASE)
_ABOUT = ("readme", "license")
"""Names of files that tell of the data, and are none."""
_NO_CLASS = -1
"""The label of what has none, in ``datasets``."""


class Table(NamedTuple):
    """Columns, where they were found, and what the paths in them are relative to."""

    where: str
    columns: Columns
    folder: str


def table_at(path: str, kinds: Sequence[Media]) -> Table | None:
    """Return the table that a path, which exists, is or has at its top; None for a plain folder and for other files.

    Without a manifest, a folder is one of shards or of parquet files with the files in them, if it has such. Raises
    UserError and UnusableData where it cannot be read, UserError too where it has several of these, or files of the
    first kind besides.
    """
    if not paths.is_folder(path):
        if paths.suffix(path) in MANIFESTS:
            return Table(path, read_manifest(path), os.path.dirname(paths.absolute(path)))  # noqa: PTH120
        if _COMPRESSED.fullmatch(path):
            raise UserError(f"{path} is compressed, so that nothing in it has a place; give the plain {SHARD}")
        return _sharded(path, [path], kinds) if paths.suffix(path) == SHARD else None
    if paths.exists(paths.join(path, UNFINISHED)):
        raise UserError(f"{path} is not packed to its end; run the same 'data pack' again")
    manifest = _manifest_in(path)
    if manifest is not None:
        return Table(manifest, read_manifest(manifest), paths.absolute(path))
    shards, tables = _files_of_files(path, kinds[0])
    return _sharded(path, shards, kinds) if shards else _joined(path, tables)


def _manifest_in(folder: str) -> str | None:
    names = (paths.join(folder, f"manifest{suffix}") for suffix in MANIFESTS)
    found = [name for name in names if paths.is_file(name)]
    if len(found) > 1:
        raise UserError(f"{folder} holds more than one manifest: name one of {', '.join(found)}")
    return found[0] if found else None


def _files_of_files(folder: str, kind: Media) -> tuple[list[str], list[str]]:
    """Return the shards and the parquet files with files in them in a folder, each in order; one of both is empty."""
    loose, shards, tables = Counter[str](), list[str](), list[str]()
    for inner, names in paths.walk(paths.absolute(folder)):
        for name in names:
            suffix = paths.suffix(name)
            if suffix == SHARD:
                shards.append(paths.join(inner, name))
            elif suffix == ".parquet":
                tables.append(paths.join(inner, name))
            elif suffix in kind.suffixes | kind.frame_suffixes and not name.lower().startswith(_ABOUT):
                loose[suffix] += 1
    tables = [file for file in tables if _embeds(file)]
    held = [f"{count} {suffix}" for suffix, count in loose.items()]
    held += [f"{len(some)} {what}" for some, what in ((shards, "tar shards"), (tables, "parquet tables")) if some]
    if (shards or tables) and len(held) > 1:
        raise UserError(
            f"{folder} holds {', '.join(held[:-1])} and {held[-1]}; name one of them or move the other elsewhere"
        )
    return sorted(shards), sorted(tables)


def _sharded(where: str, shards: Sequence[str], kinds: Sequence[Media]) -> Table | None:
    found = chain.from_iterable(tars.rows(paths.absolute(shard), kinds) for shard in shards)
    media = ["path"] if len(kinds) == 1 else [f"{kind.name}_path" for kind in kinds]
    rows = [row for row in found if any(name in row for name in media)]
    if not rows:
        names = " or ".join(kind.name for kind in kinds)
        raise UserError(f"{where}: {len(shards)} tar shards hold no file of modality {names}")
    return Table(where, _columns_of(rows), "/")


def _joined(where: str, files: Sequence[str]) -> Table | None:
    """Return the rows of parquet files as one table; their names may say of which split they are."""
    if not files:
        return None
    joined: Columns = {}
    rows = 0
    for file in files:
        columns = read_manifest(file)
        count = len(next(iter(columns.values())))
        match = _SPLIT.fullmatch(os.path.splitext(file.removeprefix(paths.absolute(where)))[0])  # noqa: PTH122
        if match is not None:
            columns.setdefault("split", [match[1] or match[2]] * count)
        for name in columns.keys() - joined.keys():
            joined[name] = [None] * rows
        for name, values in joined.items():
            values += columns.get(name, [None] * count)
        rows += count
    return Table(where, joined, "/")


def _columns_of(rows: Sequence[dict[str, str]]) -> Columns:
    names = dict.fromkeys(chain.from_iterable(rows))
    return {name: [row.get(name) for row in rows] for name in names}


def read_manifest(path: str) -> Columns:
    """Return the columns of a manifest, an empty cell as None; raises UserError where it cannot be read."""
    try:
        with paths.opened(path) as file:
            return _READERS[paths.suffix(path)](path, file)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_csv(path: str, file: BinaryIO) -> Columns:
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
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


def _read_jsonl(path: str, file: BinaryIO) -> Columns:
    columns: Columns = {}
    rows = 0
    with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        for number, line in enumerate(text, 1):
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


def _read_parquet(path: str, file: BinaryIO) -> Columns:
    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        names = _plain_names(schema)
        _no_repeats(path, names)
        classes = {name: feature.get("names") for name, feature in cells.features(schema).items()}
        read = table.read(columns=names)
        columns = {name: _texts(read.column(name).to_pylist(), classes.get(name)) for name in names}
        for column, name in cells.embedded(schema).items():
            columns[name] = cells.paths_of(paths.absolute(path), table, column)
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    return columns


def _texts(values: Sequence[Any], classes: Sequence[str] | None) -> list[str | None]:
    """Return cells as texts; of classes that have names, the names."""
    if isinstance(classes, list):
        known = {_NO_CLASS: None, **dict(enumerate(classes))}
        return [_text(known.get(value, value)) for value in values]
    return [_text(value) for value in values]


def _embeds(path: str) -> bool:
    return bool(cells.embedded(_schema(path)))


def left_out(path: str) -> list[str]:
    """Return the columns of a parquet file that are not read: lists, vectors, structs, bytes that are no files."""
    schema = _schema(path)
    plain = {*_plain_names(schema), *cells.embedded(schema)}
    return [name for name in schema.names if name not in plain]


def _plain_names(schema: Any) -> list[str]:
    # Vectors are no manifest columns, and would fill the memory; so would files, which are read when they are asked
    # for.
    return [f.name for f in schema if not (pa.types.is_nested(f.type) or cells.is_binary(f.type))]


def _schema(path: str) -> Any:
    try:
        with paths.opened(path) as file:
            return pq.ParquetFile(file).schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({(str(error).splitlines() or ['?'])[0]})") from None


def _no_repeats(path: str, names: Sequence[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UserError(f"{path} has more than one column '{name}'")


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, default=str)


_READERS: dict[str, Callable[[str, BinaryIO], Columns]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
