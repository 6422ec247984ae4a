"""Labels of stretches of time within files, such as phones: a table with a row for every segment."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.contracts import Media
from mmssl.data.fragment import file_of, real
from mmssl.data.listing import MANIFESTS, Listing, list_files
from mmssl.errors import UserError, nearest

TIMES = ("start", "end")
NAMES = ("path", *TIMES)
"""The columns that a table of labels must have."""
NANOSECOND = 9
"""Decimals of a second to which middles of frames are rounded, so that they meet times written as decimals."""

Floats = np.ndarray[Any, np.dtype[np.float64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Segments:
    """The labelled stretches of one file, in their order; they do not overlap."""

    starts: Floats
    ends: Floats
    labels: list[str]

    def at(self, times: Floats) -> Numbers:
        """Return the index of the segment that holds each time in seconds, start included and end not; -1 for none."""
        found = np.searchsorted(self.starts, times, side="right") - 1
        return np.where((found >= 0) & (times < self.ends[found]), found, -1)


@dataclass(frozen=True)
class SegmentLabels:
    """Labels of stretches of time, by file."""

    source: Path
    column: str
    """What the labels are called: phone."""
    files: dict[str, Segments]
    """By real path."""

    def classes(self, listing: Listing) -> list[str]:
        """Return the sorted labels in the files of ``listing``; raises UserError for a file without any segment."""
        missing = [i for i, path in enumerate(listing.paths) if real(path).file not in self.files]
        if missing:
            more = f" and {len(missing) - 1} more files have" if len(missing) > 1 else " has"
            raise UserError(
                f"{self.source}: {listing.name(missing[0])}{more} no segment in it; leave what has none out"
            )
        return sorted({label for path in listing.paths for label in self.files[real(path).file].labels})

    def of_frames(self, path: str, count: int, seconds: float, classes: Sequence[str]) -> Numbers:
        """Return the class of each of so many frames of a file or piece of one, ``seconds`` apart; -1 outside of all.

        A frame belongs to the segment that holds its middle.
        """
        span = real(path)
        segments, number = self.files[span.file], {label: i for i, label in enumerate(classes)}
        found = segments.at(np.round(span.start + (np.arange(count) + 0.5) * seconds, NANOSECOND))
        targets = np.array([number[label] for label in segments.labels])
        return np.where(found >= 0, targets[found], -1)


def read_segments(source: Path | str, kind: Media, column: str | None = None) -> SegmentLabels:
    """Read a table (CSV, JSONL or parquet) with columns path, start and end in seconds, and labels.

    Labels are in ``column``, or None: in the only other one. Paths are relative to the table. Raises UserError, one
    sentence, for a table that is none, segments that overlap or end before they start, and a missing label or time.
    """
    source = Path(source)
    if source.suffix.lower() not in MANIFESTS or source.is_dir():
        raise UserError(
            f"{source}: labels of frames are a table of path, start, end and label ({', '.join(MANIFESTS)})"
        )
    # A table of segments is a manifest of pieces: all that can be wrong with one is said there.
    listing = list_files(source, kind)
    for name in TIMES:
        if name not in listing.columns:
            raise UserError(f"{source} has no '{name}' column{_meant(name, listing)}")
    column = column or _only_other(source, listing)
    if column not in listing.columns:
        others = listing.columns.keys() - {*TIMES}
        raise UserError(f"{source} has no '{column}' column{nearest(column, others)}")
    labels, starts, ends = listing.labels(column), _seconds(listing, "start"), _seconds(listing, "end")
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(listing.paths):
        rows.setdefault(file_of(path), []).append(row)
    files: dict[str, list[int]] = {}
    for file, some in rows.items():  # links are followed once per file, not once per row
        files.setdefault(os.path.realpath(file), []).extend(some)
    return SegmentLabels(
        source,
        column,
        {file: _in_order(source, file, np.array(some), starts, ends, labels) for file, some in files.items()},
    )


def _meant(name: str, listing: Listing) -> str:
    close = [column for column in listing.columns if get_close_matches(column.lower(), NAMES, n=1) == [name]]
    return f"; rename '{close[0]}' to '{name}'" if close else f"; a table of labels has {', '.join(NAMES)} and a label"


def _only_other(source: Path, listing: Listing) -> str:
    others = sorted(listing.columns.keys() - {*TIMES})
    if len(others) != 1:
        words = f"one of {', '.join(others)}" if others else "there is no other column than path, start and end"
        raise UserError(f"{source}: which column holds the labels is not clear; name it with --label-column ({words})")
    return others[0]


def _seconds(listing: Listing, name: str) -> Floats:
    cells = listing.columns[name]
    if None in cells:
        raise UserError(f"{listing.root}: row {cells.index(None) + 1} has no {name}")
    return np.array([float(cell or "nan") for cell in cells])


def _in_order(source: Path, file: str, rows: Numbers, starts: Floats, ends: Floats, labels: Sequence[str]) -> Segments:
    rows = rows[np.argsort(starts[rows], kind="stable")]
    bad = np.flatnonzero(starts[rows][1:] < ends[rows][:-1])
    if len(bad):
        a, b = sorted(rows[bad[0] : bad[0] + 2] + 1)
        raise UserError(f"{source}: rows {a} and {b} overlap in time, but a frame of {file} has one label")
    return Segments(starts[rows], ends[rows], [labels[row] for row in rows])
