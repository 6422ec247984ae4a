"""The file of a search index: unit vectors of files, and what the files were when they were embedded.

It is an Arrow IPC file, one row per file: path, size, time of its last change, why it cannot be read (null if it can),
vector (float16 of one length). Arrow's are the files that are written in parts of bounded size, read where they lie in
memory (mapped, nothing is copied), hold texts beside numbers, and are known by their end to be whole; what safetensors
would have us lay out by hand. Whole files come first, by path, then the broken ones: so a row's number is a vector's,
and equal scores are in the order of paths.
"""

import glob
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache as memoized
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from pydantic import Field
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mmssl.config import Piece, validate
from mmssl.data import inline
from mmssl.data.fragment import file_of
from mmssl.data.parts import container, stamp
from mmssl.errors import UnusableData, UserError
from mmssl.files import replacing_file, sync
from mmssl.locks import Lock

FORMAT = 2
ROWS = 2**16
"""Files that are written, and looked at, at a time: 64 MB of 512 values."""
FACTS = b"mmssl.search"
FACTS_SUM, STATES, VECTORS = b"mmssl.search.sum", b"states", b"vectors"
"""CRC-32 of the facts, of a part's vectors and of its other columns."""
MAGIC = b"ARROW1"

Vector: TypeAlias = np.ndarray[Any, np.dtype[np.float16]]


class State(NamedTuple):
    """What is known of a file without reading it; a file that has another one has changed."""

    size: int
    mtime_ns: int


NOWHERE = State(-1, -1)
"""Of a file that is not there, or may not be asked about."""


class Entry(NamedTuple):
    """What has been found out about a file."""

    state: State
    vector: Vector | None
    """[d], of length 1; None of a broken file."""
    reason: str | None = None
    """Why a file is broken."""


class Facts(Piece):
    """What an index is of."""

    fingerprint: str
    """The encoder's."""
    modality: str
    folder: str
    """Absolute path of the folder or the manifest."""
    split: str | None
    dim: int = Field(gt=0)


class _Stored(Facts):
    whole: int = Field(ge=0)
    """How many files have a vector."""


class OtherFormat(UserError):
    """An index of another version of mmssl."""


class StoredIndex:
    """An index as it was when it was opened, whatever is written in its place later; any thread may read it."""

    def __init__(self, file: Path) -> None:
        """Map it; raises UnusableData where it is damaged, UserError where it is no index or of another format."""
        self.file = file
        try:
            with file.open("rb") as opened:  # Python's map: Arrow's knows no names that are not UTF-8
                reader = pa.ipc.open_file(pa.py_buffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)))
            metadata = reader.schema.metadata or {}
            if zlib.crc32(metadata[FACTS]) != int(metadata[FACTS_SUM]):
                raise ValueError("what it says of itself is not what was written")
            stored = json.loads(metadata[FACTS])
            version = stored.pop("format")
            if version != FORMAT:
                raise OtherFormat(f"{file} is in format {version}, but this mmssl reads format {FORMAT}")
            facts = validate(_Stored, stored, str(file))
            if reader.schema.remove_metadata() != _schema(facts.dim):
                raise ValueError("its columns are not those of an index")
            read = [reader.get_batch_with_custom_metadata(i) for i in range(reader.num_record_batches)]
            self._batches = [one.batch for one in read]
            self._sums = [(int(one.custom_metadata[STATES]), int(one.custom_metadata[VECTORS])) for one in read]
            for batch in self._batches:
                batch.validate(full=True)
        except (pa.ArrowException, UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FileNotFoundError | OtherFormat):
                raise
            if not _begins(file):
                raise UserError(f"{file} is no search index") from None
            words = (str(error) or type(error).__name__).splitlines()[0]
            raise UnusableData(f"{file} is not a whole search index ({words})") from None
        self.facts = Facts(**facts.model_dump(exclude={"whole"}))
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._whole = facts.whole
        if self._whole not in self._starts:
            raise UnusableData(f"{file} is not a whole search index (it holds fewer files than it says)")

    def __len__(self) -> int:
        """How many files have a vector."""
        return self._whole

    @cached_property
    def blocks(self) -> list[Tensor]:
        """The vectors of the whole files, float16 [b, d] each, where they lie in the file."""
        parts = zip(self._batches, self._starts, strict=False)
        values = (batch.column("vector").values for batch, start in parts if start < self._whole)
        # This way, and not through NumPy, torch takes memory that cannot be written to without a word.
        return [from_dlpack(part).view(-1, self.facts.dim) for part in values]

    def path(self, row: int) -> str:
        """Return the absolute path in a row."""
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return os.fsdecode(self._batches[batch].column("path")[row - int(self._starts[batch])].as_py())

    def vectors(self, rows: Sequence[int]) -> Vector:
        """Return copies of the vectors in rows: float16 [n, d]."""
        wanted = np.asarray(rows, np.int64)
        found = np.empty((len(wanted), self.facts.dim), np.float16)
        for block, start in zip(self.blocks, self._starts, strict=False):
            here = (wanted >= start) & (wanted < start + len(block))
            found[here] = block.numpy()[wanted[here] - start]
        return found

    def check_vectors(self) -> None:
        """Raise UnusableData where vectors are not what was written; half a second for a million of 512 values."""
        for batch, (_, expected) in zip(self._batches, self._sums, strict=True):
            self._check(_vectors_sum(batch), expected)

    def _check(self, found: int, expected: int) -> None:
        if found != expected:
            raise UnusableData(f"{self.file} is damaged: what it holds is not what was written")

    def states(self) -> dict[str, tuple[int, State, str | None]]:
        """Return for every path its row, its state then, and why it is broken, None of a whole one.

        Raises UnusableData where that is not what was written.
        """
        found, row = {}, 0
        for batch, (expected, _) in zip(self._batches, self._sums, strict=True):
            self._check(_states_sum(batch), expected)
            columns = (batch.column(name).to_pylist() for name in ("path", "size", "mtime_ns", "reason"))
            for path, size, mtime_ns, reason in zip(*columns, strict=True):
                found[os.fsdecode(path)] = (row, State(size, mtime_ns), reason)
                row += 1
        return found

    def broken(self) -> list[tuple[str, str]]:
        """Return path and reason of the files that cannot be read."""
        last = [batch for batch, start in zip(self._batches, self._starts, strict=False) if start >= self._whole]
        columns = ([value for batch in last for value in batch.column(name).to_pylist()] for name in ("path", "reason"))
        return [(os.fsdecode(path), reason) for path, reason in zip(*columns, strict=True)]


def write_index(
    file: Path, facts: Facts, old: StoredIndex | None, fresh: Mapping[str, Entry], listed: Container[str]
) -> None:
    """Write an index of what ``old`` has of the ``listed`` files, and ``fresh`` entries in the place of its own.

    It is written aside, forced to the disk and renamed, a part at a time; paths and states of all files are in memory.
    Raises UnusableData where the states of ``old`` are damaged; its vectors are to be checked before.
    """
    known = {} if old is None else old.states()
    rows: dict[str, _Row] = {path: one for path, one in known.items() if path in listed and path not in fresh}
    rows |= {path: (None, entry.state, entry.reason) for path, entry in fresh.items()}
    whole, broken = ([path for path in sorted(rows) if (rows[path][2] is None) is kind] for kind in (True, False))
    text = json.dumps({"format": FORMAT, **facts.model_dump(), "whole": len(whole)})
    schema = _schema(facts.dim)
    with (
        replacing_file(file) as aside,
        aside.open("wb") as sink,
        pa.ipc.new_file(sink, schema.with_metadata({FACTS: text, FACTS_SUM: str(zlib.crc32(text.encode()))})) as writer,
    ):
        for part in (*_parts(whole), *_parts(broken)):
            columns = [
                pa.array([os.fsencode(path) for path in part], pa.binary()),
                pa.array([rows[path][1].size for path in part], pa.int64()),
                pa.array([rows[path][1].mtime_ns for path in part], pa.int64()),
                pa.array([rows[path][2] for path in part], pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(_vectors(part, rows, old, fresh, facts.dim)), facts.dim),
            ]
            batch = pa.record_batch(columns, schema=schema)
            sums = {STATES: str(_states_sum(batch)), VECTORS: str(_vectors_sum(batch))}
            writer.write_batch(batch, custom_metadata=sums)
    sync(file.parent)


_Row: TypeAlias = tuple[int | None, State, str | None]
"""Which row of the old index a file has there, None for a fresh entry; its state; why it is broken."""


def _vectors(
    part: Sequence[str], rows: Mapping[str, _Row], old: StoredIndex | None, fresh: Mapping[str, Entry], dim: int
) -> Vector:
    """Return the vectors of files one after the other, those of broken files zero."""
    vectors = np.zeros((len(part), dim), np.float16)
    places, stay = [], []
    for i, path in enumerate(part):
        row, _, reason = rows[path]
        if row is not None and reason is None:
            places.append(i)
            stay.append(row)
        elif row is None and (vector := fresh[path].vector) is not None:
            vectors[i] = vector
    if old is not None:
        vectors[places] = old.vectors(stay)
    return vectors.ravel()


def _parts(paths: list[str]) -> Iterator[list[str]]:
    return (paths[i : i + ROWS] for i in range(0, len(paths), ROWS))


def _states_sum(batch: Any) -> int:
    found = 0
    for name in ("size", "mtime_ns"):
        found = zlib.crc32(batch.column(name).to_numpy(), found)
    for name in ("path", "reason"):
        for value in batch.column(name).to_pylist():
            # A length in front: where one ends and the next begins is part of it.
            data = value.encode() if isinstance(value, str) else value or b""
            found = zlib.crc32(data, zlib.crc32(len(data).to_bytes(4, "little"), found))
    return found


def _vectors_sum(batch: Any) -> int:
    return zlib.crc32(batch.column("vector").values.to_numpy().view(np.uint8))


def _begins(file: Path) -> bool:
    """Whether a file begins as an index does, or would if it went on."""
    with file.open("rb") as opened:
        return MAGIC.startswith(opened.read(len(MAGIC)))


def _schema(dim: int) -> pa.Schema:
    fields = {"path": pa.binary(), "size": pa.int64(), "mtime_ns": pa.int64(), "reason": pa.string()}
    return pa.schema([*fields.items(), ("vector", pa.list_(pa.float16(), dim))])


def states_of(paths: Iterable[str]) -> dict[str, State]:
    """Return what is known of files, or of what they are pieces or parts of, without reading them."""
    state = memoized(_state)  # thousands of files are in one shard
    # A text that is its own path stays as it is.
    return {path: State(0, 0) if inline.text(path) is not None else state(container(file_of(path))) for path in paths}


def _state(file: str) -> State:
    found = stamp(file)
    match found:
        case [int(size), int(mtime_ns)]:
            return State(size, mtime_ns)
        case [None, None]:
            return NOWHERE
    # Of a folder of frames it is that of each; stores of objects have tags in place of times.
    digest = hashlib.sha256(json.dumps(found).encode()).digest()
    return State(0, int.from_bytes(digest[:7]))


@contextmanager
def held(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Keep other processes and threads from refreshing the index ``file`` meanwhile.

    ``waiting`` is called where one is at it, before it is waited for. What a process that was killed left half-written
    beside the index is removed.
    """
    path = file.with_name(f".{file.name}.lock")
    lock = _locked(path, waiting)
    try:
        for left in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
            left.unlink(missing_ok=True)
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _locked(path: Path, waiting: Callable[[], None]) -> Lock:
    while True:
        lock = Lock(path)
        try:
            if not lock.take():
                waiting()
                lock.take(wait=True)
            # Whoever had it has removed it, and another process may have made and locked a new one.
            with suppress(FileNotFoundError):
                if path.stat().st_ino == lock.inode():
                    return lock
        except BaseException:
            lock.release()
            raise
        lock.release()
