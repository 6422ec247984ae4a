"""What ``mmssl data pack`` puts where: which files make a sample, what it is called, which samples make a shard.

The plan follows from the data and the settings alone, before anything is decoded: so a run that was cut off is gone on
with, and a source that has changed since is noticed.
"""

import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmssl.contracts import Media
from mmssl.data import inline, paths
from mmssl.data.cells import Cell
from mmssl.data.fragment import file_of
from mmssl.data.listing import Columns, Listing, list_files
from mmssl.data.pairs import list_pairs
from mmssl.data.parts import container, part, stamp
from mmssl.data.tables import left_out, table_at
from mmssl.errors import UserError, nearest
from modalities.encoder import MODALITIES
from tasks.build import load_recipe
from tasks.writer import say

MB = 1_000_000


class PackSample(NamedTuple):
    """What belongs together: one group of members in a shard, one or more rows of the manifest."""

    key: str
    """What its members are called, without what is behind the first dot."""
    rows: list[int]
    """Indices in the listing: pieces of one file, or several captions of one picture."""
    files: dict[str, str]
    """Its files by modality."""

    def members(self) -> dict[str, str]:
        """Return what its files are called in a shard, by modality."""
        found: dict[str, str] = {}
        for name, file in self.files.items():
            suffix = paths.suffix(file) or min(MODALITIES[name].suffixes)
            taken = f"{self.key}{suffix}" in found.values()
            found[name] = f"{self.key}.{name}{suffix}" if taken else f"{self.key}{suffix}"
        return found


class Plan(NamedTuple):
    """A listing, in columns, and its samples by shard."""

    listing: Listing
    media: dict[str, list[str | None]]
    """The paths of each modality, row by row; None also where a text stands in the manifest itself."""
    columns: Columns
    """All other columns."""
    shards: list[list[PackSample]]

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(map(len, self.shards))

    @property
    def classes(self) -> list[str]:
        """The sorted labels."""
        return sorted({label for label in self.columns.get("label", []) if label is not None})

    def name(self, file: str) -> str:
        """Return what a source file is called."""
        return self.listing.called(file)

    def source(self, shard: Sequence[PackSample]) -> str:
        """Return a digest of all that goes into a shard: which files, of which size and time, and what is said of them.

        It is the same wherever the source lies.
        """
        digest = hashlib.sha256()
        for sample in shard:
            files = [[name, self.name(file), *stamp(file)] for name, file in sample.files.items()]
            said = [[*self.row(row).items()] for row in sample.rows]
            pieces = [[self.piece(row, name) for name in self.media] for row in sample.rows]
            digest.update(json.dumps([sample.key, files, said, pieces]).encode())
        return digest.hexdigest()

    def row(self, row: int) -> dict[str, str]:
        """Return what the other columns say of a row, empty cells left out."""
        return {name: value for name, values in self.columns.items() if (value := values[row]) is not None}

    def piece(self, row: int, name: str) -> str:
        """Return the piece (#t=START,END) that a row's path names by itself, not by the columns start and end."""
        path = self.media[name][row] or ""
        return "" if self.row(row).keys() & {"start", "end"} else path[len(file_of(path)) :]


def make_plan(source: str | Path, modality: str | None, recipe: str | None, per_shard: int, max_shard_mb: int) -> Plan:
    """Return what is to be packed and where; raises UserError where there is nothing to pack, or it cannot be."""
    kinds = _kinds(source, modality, recipe)
    try:
        listing = list_files(source, kinds[0]) if len(kinds) == 1 else list_pairs(source, kinds, strict=False)
    except UserError as error:
        raise UserError(f"{error}{_likely(source, kinds)}") from None
    found = listing.media or {kinds[0].name: list[str | None](listing.paths)}
    media = {name: files for name, files in found.items() if any(map(_file, files))}
    if not media:
        raise UserError(f"{source}: all its texts stand in the manifest itself, so there is no file to be packed")
    own = {"path", *(f"{name}_path" for name in media)} if listing.media else set()
    columns = {name: values for name, values in listing.columns.items() if name not in own} or _labels(listing)
    _check(listing, media, columns)
    samples = list(_samples(listing, media))
    return Plan(listing, media, columns, list(_cut(samples, per_shard, max_shard_mb * MB)))


def _likely(source: str | Path, kinds: Sequence[Media]) -> str:
    """Return which modality a folder may have been meant to be of that has none of the first kind; else nothing."""
    place = paths.absolute(source)
    names = [name for _, names in paths.walk(place) for name in names] if paths.is_folder(place) else []
    suffixes = Counter(map(paths.suffix, names))
    counts = {name: sum(suffixes[one] for one in kind.suffixes) for name, kind in MODALITIES.items()}
    most = max(counts, key=lambda name: counts[name])
    return "" if counts[kinds[0].name] or not counts[most] else f"; if these are meant, say --modality {most}"


def _check(listing: Listing, media: Mapping[str, Sequence[str | None]], columns: Columns) -> None:
    """Raise UserError for what a manifest of shards cannot hold, and say what it does not."""
    for name, values in columns.items():
        if name.endswith("_path") and any(value is not None and Cell.parse(value) for value in values):
            raise UserError(
                f"{listing.root}: column '{name.removesuffix('_path')}' holds files of no modality of this pack, which "
                "would be left behind; take it out of the table first"
            )
    named = {listing.called(file) for files in media.values() for file in files if file is not None}
    for text in (*columns, *named, *(value for values in columns.values() for value in values if value is not None)):
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{text!r} is not UTF-8, which is all that a manifest of shards holds; rename it")
    files = (Cell.parse(file) for files in media.values() for file in files if file is not None)
    tables = dict.fromkeys(cell.table for cell in files if cell is not None)
    lost = dict.fromkeys(name for table in tables for name in left_out(table))
    if lost:
        say(f"{listing.root}: not packed are the columns of lists, structs or bytes: {', '.join(lost)}")


def _kinds(source: str | Path, modality: str | None, recipe: str | None) -> list[Media]:
    """Return which media are packed: those of a recipe, or a modality's and those that have columns of their own."""
    if recipe is not None:
        if modality is not None:
            raise UserError("--modality and --recipe exclude each other: a recipe has its own")
        encoders = load_recipe(recipe).encoders
        return [MODALITIES[name].source(one.signal) for name, one in encoders.items()]
    name = modality or "image"
    if name not in MODALITIES:
        raise UserError(f"'{name}' is not a modality{nearest(name, MODALITIES)}")
    place = str(paths.given(source))
    table = table_at(place, [MODALITIES[name]]) if paths.exists(place) else None
    columns: Columns = {} if table is None else table.columns
    others = [kind for other, kind in MODALITIES.items() if f"{other}_path" in columns and other != name]
    return [MODALITIES[name], *others]


def _labels(listing: Listing) -> Columns:
    """Return the labels of a plain folder, which its sub-folders are, where every file is in one."""
    try:
        return {} if listing.rows else {"label": list[str | None](listing.labels())}
    except UserError:
        return {}


def _file(path: str | None) -> str | None:
    """Return the file that is to be packed for a path; None where there is none, or it is a text itself."""
    return None if path is None or inline.text(path) is not None else file_of(path)


def _samples(listing: Listing, media: Mapping[str, Sequence[str | None]]) -> Iterator[PackSample]:
    """Yield the samples in the order of their first rows; rows of the same files are one sample."""
    rows: dict[tuple[str | None, ...], list[int]] = {}
    for i, row in enumerate(zip(*media.values(), strict=True)):
        files = tuple(map(_file, row))
        if any(files):
            rows.setdefault(files, []).append(i)
    taken: set[str] = set()
    names = {file: listing.called(file) for some in rows for file in some if file is not None}
    above = _common(names.values())
    for files, some in rows.items():
        found = {name: file for name, file in zip(media, files, strict=True) if file is not None}
        for file in found.values():
            if paths.is_folder(file):
                raise UserError(f"{file} is a folder of frames, which a shard cannot hold: make a video file of it")
        yield PackSample(_key(names[next(iter(found.values()))].removeprefix(above), taken), some, found)


def _common(names: Iterable[str]) -> str:
    """Return the folder that all files with absolute names are in: where it lies is nobody's business."""
    folders = {posixpath.dirname(container(name)) for name in names if posixpath.isabs(name) or paths.url(name)}
    if len({paths.url(folder) is None for folder in folders}) != 1:
        return ""
    return posixpath.join(str(paths.given(posixpath.commonpath(folders))), "")


def _key(name: str, taken: set[str]) -> str:
    """Return what a sample is called, after its first file: no two alike, and no dot, at which names are parted."""
    within = part(name)
    name = posixpath.normpath(f"/{name if within is None else within.name}").lstrip("/")
    folder, base = posixpath.split(name.encode(errors="replace").decode())
    stem = os.path.splitext(base)[0].replace(".", "_")  # noqa: PTH122
    key = wanted = posixpath.join(folder, stem)
    again = 1
    while key in taken:
        again += 1
        key = f"{wanted}-{again}"
    taken.add(key)
    return key


def _cut(samples: Sequence[PackSample], most: int, most_bytes: int) -> Iterator[list[PackSample]]:
    """Yield the samples of each shard: at most so many, and of so many bytes unless it is one alone."""
    shard: list[PackSample] = []
    size = 0
    for sample in samples:
        more = sum(map(_bytes, sample.files.values()))
        if shard and (len(shard) == most or size + more > most_bytes):
            yield shard
            shard, size = [], 0
        shard.append(sample)
        size += more
    yield shard


def _bytes(file: str) -> int:
    found = part(file)
    return (stamp(file)[0] or 0) if found is None else found.size
