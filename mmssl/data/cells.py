"""Files inside parquet tables, as Hugging Face's ``datasets`` writes them: bytes in a cell of a column.

A cell is a path: ``/data/train.parquet@1200+image/012.jpg`` is what row 1200 (counted from 0) has in the column
``image`` (its name percent-encoded), which was once called ``012.jpg``. Tables are read in row groups; a process keeps
those that were read last, so that samples are best drawn from a few of them at a time (``data.window``).
"""

import json
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmssl.data import paths
from mmssl.data.broken import BrokenFile

CACHE_BYTES = 2**28
"""Bytes of row groups that a process keeps, of more than one: 268 MB."""
NOTHING = "nothing/"
"""What the names of cells begin with in which there is nothing; those of others have no slash."""
TABLES = 64
"""Tables that a process keeps open."""

_CELL = re.compile(r"(.+?\.parquet)@(\d+)\+([^/]+)/(.+)", re.DOTALL | re.IGNORECASE)


class Cell(NamedTuple):
    """Bytes in a table: the table, the row, the column, and what they are called."""

    table: str
    row: int
    column: str
    name: str

    @classmethod
    def parse(cls, path: str) -> Self | None:
        """Return the cell that a path is, None for any other path."""
        match = _CELL.fullmatch(path) if ".parquet@" in path.lower() else None
        return None if match is None else cls(match[1], int(match[2]), unquote(match[3]), match[4])

    def __str__(self) -> str:
        return f"{self.table}@{self.row}+{quote(self.column, safe='')}/{self.name}"

    @property
    def container(self) -> str:
        """The file of which it is a part."""
        return self.table

    def read(self) -> bytes:
        """Return its bytes; raises BrokenFile."""
        table = opened(self.table)
        if self.row >= table.starts[-1]:
            raise BrokenFile(f"its table has {table.starts[-1]} rows")
        group = table.group(self.row)
        try:
            value = _GROUPS.get(table, group, self.column)[self.row - table.starts[group]]
        except (pa.ArrowException, KeyError, OSError) as error:
            raise BrokenFile(f"its table cannot be read: {str(error).strip().splitlines()[0]}") from None
        data: bytes | None = value.as_py()
        if not data:
            raise BrokenFile("nothing in its cell" if data is None else "empty file")
        return data

    def group(self) -> int:
        """Return the number of its row group; 0 in a table that cannot be read, as reading it will find out."""
        try:
            return opened(self.table).group(self.row)
        except BrokenFile:
            return 0

    def group_bytes(self) -> int:
        """Return the bytes of its row group, not compressed; 0 in a table that cannot be read."""
        try:
            table = opened(self.table)
        except BrokenFile:
            return 0
        return table.sizes[min(table.group(self.row), len(table.sizes) - 1)] if table.sizes else 0

    @property
    def size(self) -> int:
        """About how many bytes it has: the mean of its row group, of all columns."""
        rows = opened(self.table).rows(self.group())
        return self.group_bytes() // max(1, rows)


class Table:
    """An opened table."""

    def __init__(self, path: str, state: tuple[Any, ...]) -> None:
        self.key = (path, *state)
        source: Any = path
        if paths.url(path) is not None:
            files, name = paths.filesystem(path)
            source = files.open(name, "rb")
        # One thread: the reader's own pool does not survive the fork of a data worker.
        self.parquet = pq.ParquetFile(source, pre_buffer=False)
        meta = self.parquet.metadata
        self.sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
        counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self.starts: list[int] = np.cumsum([0, *counts]).tolist()
        """The first row of each row group, and the number of all."""

    def group(self, row: int) -> int:
        """Return the row group of a row."""
        return bisect_right(self.starts, row) - 1

    def rows(self, group: int) -> int:
        """Return how many rows a row group has."""
        return self.starts[group + 1] - self.starts[group]

    def column(self, group: int, name: str) -> Any:
        """Return the bytes in a column of a row group, an arrow array."""
        struct = pa.types.is_struct(self.parquet.schema_arrow.field(name).type)
        return _read_leaf(self.parquet, group, name, "bytes" if struct else None)


def _read_leaf(file: Any, group: int, column: str, field: str | None) -> Any:
    """Return a column of a row group, or a field of its structs."""
    leaf = column if field is None else f"{column}.{field}"
    found = file.read_row_group(group, columns=[leaf], use_threads=False).column(0)
    if field is None:
        return found
    parts = [chunk.field(field) for chunk in found.chunks]
    return pa.chunked_array(parts, None if parts else pa.binary())


def opened(path: str) -> Table:
    """Return a table, which stays open in this process; raises BrokenFile."""
    state = paths.stamp(path)
    if state[0] is None:
        raise BrokenFile("its table: no such file")
    try:
        return _opened(path, tuple(state), os.getpid())
    except (pa.ArrowException, OSError) as error:
        raise BrokenFile(f"its table cannot be read: {str(error).strip().splitlines()[0]}") from None


@lru_cache(maxsize=TABLES)
def _opened(path: str, state: tuple[Any, ...], _process: int) -> Table:
    return Table(path, state)


class _Groups:
    """The columns of row groups that were asked for last."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._bytes = 0

    def get(self, table: Table, group: int, column: str) -> Any:
        key = (*table.key, group, column)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        found = table.column(group, column)
        self._held[key] = found
        self._bytes += found.nbytes
        while self._bytes > CACHE_BYTES and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return found


_GROUPS = _Groups()


def embedded(schema: Any) -> dict[str, str]:
    """Return which columns of a table hold files, and what the column of their paths is called.

    That is ``image_path`` where ``datasets`` says that it is an image, whatever its name; ``path`` for a table's only
    such column, of which nothing is said; else the column's name and ``_path``.
    """
    files = [field.name for field in schema if _holds_files(field.type)]
    kinds = {name: str(feature.get("_type", "")).lower() for name, feature in features(schema).items()}
    names: dict[str, str] = {}
    for file in files:
        known = kinds.get(file) if kinds.get(file) not in (None, "", "value") else None
        name = f"{known or file}_path"
        if known is None and len(files) == 1:
            name = "path"
        if name in names.values():
            name = f"{file}_path"
        if name not in schema.names and name not in names.values():
            names[file] = name
    return names


def features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return what ``datasets`` has noted of a table's columns; nothing where it has not written it."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in found.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def something(path: str | None) -> str | None:
    """Return a path, but None for a cell that is known to hold nothing."""
    if path is None or f"/{NOTHING}" not in path:
        return path
    cell = Cell.parse(path)
    return None if cell is not None and cell.name.startswith(NOTHING) else path


def paths_of(path: str, file: Any, column: str) -> list[str | None]:
    """Return the paths of a column's cells; no file's bytes are read for it. See ``something`` for empty ones."""
    kind, groups = file.schema_arrow.field(column).type, range(file.metadata.num_row_groups)
    struct = pa.types.is_struct(kind)
    names: list[str | None] = [None] * file.metadata.num_rows
    if struct and kind.get_field_index("path") >= 0:
        names = [name for group in groups for name in _read_leaf(file, group, column, "path").to_pylist()]
    there = [present for group in groups for present in _present(file, group, column, "bytes" if struct else None)]
    return [
        str(Cell(path, row, column, (Path(name or "").name or str(row)) if is_there else f"{NOTHING}{row}"))
        for row, (name, is_there) in enumerate(zip(names, there, strict=True))
    ]


def _present(file: Any, group: int, column: str, field: str | None) -> list[bool]:
    """Return which cells of a row group hold something; they are looked into only where some are known not to."""
    meta = file.metadata.row_group(group)
    leaf = column if field is None else f"{column}.{field}"
    chunks = (meta.column(i) for i in range(meta.num_columns))
    known = next(chunk.statistics for chunk in chunks if chunk.path_in_schema == leaf)
    if known is not None and known.has_null_count and known.null_count == 0:
        return [True] * meta.num_rows
    found: list[bool] = _read_leaf(file, group, column, field).is_valid().to_pylist()
    return found


def _holds_files(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        return "bytes" in fields and is_binary(fields["bytes"])
    return is_binary(kind)


def is_binary(kind: Any) -> bool:
    """Whether values of an arrow type are bytes."""
    return any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary))
