"""Vectors of files as a parquet file, for whatever a person does with them next."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from torch import Tensor

from mmssl.data import fragment
from mmssl.data.listing import Listing
from mmssl.errors import UserError
from mmssl.files import replacing_file
from tasks.features import ExtractOptions, Extractor, Features, check_readable, extract
from tasks.frames import FrameExtractor, FrameOptions, read_frames

ROWS = 2**14
"""Rows that are written at a time, where there are many of a file: 16 MB of 256 values each."""
DECIMALS = 9
"""Of a second, in the times of frames: 0.03, not 0.030000000000000002."""


@dataclass(frozen=True)
class EmbedResult:
    """What was written where."""

    out: Path
    files: int
    dim: int
    fingerprint: str
    skipped: list[tuple[str, str]]
    """(name, reason) of broken files that were left out on request."""
    frames: int | None = None
    """How many rows there are, where there is one for every moment."""
    seconds_per_frame: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        skipped = [{"path": path, "reason": reason} for path, reason in self.skipped]
        facts: dict[str, Any] = {
            "out": str(self.out),
            "files": self.files,
            "dim": self.dim,
            "fingerprint": self.fingerprint,
        }
        if self.frames is not None:
            facts |= {"frames": self.frames, "seconds_per_frame": self.seconds_per_frame}
        return {"task": "embed", **facts, "skipped": skipped}

    def render(self, console: Console) -> None:
        """Print what a person wants to know."""
        text = f"{self.out}: {self.files} vectors of {self.dim} values"
        if self.seconds_per_frame is not None:
            each = f"{1000 * self.seconds_per_frame:g} ms each"
            text = f"{self.out}: {self.frames} vectors of {self.dim} values, {each}, of {self.files} files"
        if self.skipped:
            text += f"; {len(self.skipped)} broken files left out"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def embed(
    encoder: Extractor, listing: Listing, out: Path | str, label_column: str = "label",
    **options: Unpack[ExtractOptions],
) -> EmbedResult:  # fmt: skip
    """Write ``out``, one row per file: path, split and label (text or null) and vector (float32, all of one length).

    The label is that of a manifest's ``label_column``, or a folder's name.

    Paths are relative to the listing's folder; the schema's metadata holds the encoder's fingerprint. Raises UserError,
    before anything is computed, where ``out`` does not end in .parquet or cannot be written, and as ``extract``.
    """
    out = Path(out)
    _check(out)
    features = extract(encoder, listing, **options)
    kept, dim = features.kept, features.vectors.shape[1]
    files = listing.select(kept)
    fingerprint = encoder.fingerprint()
    columns = {
        "path": pa.array(_names(files), pa.string()),
        "split": pa.array(_splits(files), pa.string()),
        "label": pa.array(labels_of(listing, kept, label_column), pa.string()),
        "vector": _vectors(features.vectors),
    }
    with replacing_file(out) as aside:
        pq.write_table(pa.table(columns, metadata={"mmssl.fingerprint": fingerprint}), aside)
    return EmbedResult(out, len(kept), dim, fingerprint, features.skipped)


def embed_frames(
    extractor: FrameExtractor, listing: Listing, out: Path | str, label_column: str = "label",
    **options: Unpack[FrameOptions],
) -> EmbedResult:  # fmt: skip
    """Write ``out``, one row per frame: path, split and label of the file, start and end (float64, seconds), vector.

    So every row is a piece of a file, as a manifest has them: of a piece that the listing names, path is the file, and
    times are in it. Rows are written as files are done, and nothing is left where one fails. Raises as ``embed`` and
    ``read_frames``.
    """
    out = Path(out)
    _check(out)
    names, labels = _names(listing), labels_of(listing, list(range(len(listing))), label_column)
    splits, fingerprint, seconds = _splits(listing), extractor.fingerprint(), extractor.seconds_per_step
    kept, skipped, count, dim = [], [], 0, 0
    with replacing_file(out) as aside, _Writer(aside, fingerprint) as writer:
        for i, frames in read_frames(extractor, listing, **options):
            if isinstance(frames, str):
                skipped.append((listing.name(i), frames))
                continue
            starts = np.round(fragment.split(listing.paths[i]).start + np.arange(len(frames) + 1) * seconds, DECIMALS)
            columns = {
                "path": pa.array([fragment.file_of(names[i])] * len(frames), pa.string()),
                "split": pa.array([splits[i]] * len(frames), pa.string()),
                "label": pa.array([labels[i]] * len(frames), pa.string()),
                "start": pa.array(starts[:-1]),
                "end": pa.array(starts[1:]),
                "vector": _vectors(frames),
            }
            writer.add(columns)
            kept.append(i)
            count, dim = count + len(frames), frames.shape[1]
        check_readable(Features(torch.empty(0), kept, skipped), listing)
    return EmbedResult(out, len(kept), dim, fingerprint, skipped, count, seconds)


class _Writer:
    """Writes a parquet file in groups of rows, as they come."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path, self._metadata = path, {"mmssl.fingerprint": fingerprint}
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> "_Writer":
        return self

    def add(self, columns: dict[str, pa.Array]) -> None:
        """Add rows, which are written once there are enough for a group."""
        self._waiting.append(pa.table(columns, metadata=self._metadata))
        if sum(len(table) for table in self._waiting) >= ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting)
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._path, table.schema)
            self._writer.write_table(table, row_group_size=ROWS)
            self._waiting.clear()

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()


def _vectors(rows: Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.numpy().ravel()), rows.shape[1])


def _splits(listing: Listing) -> list[str | None]:
    nothing: list[str | None] = [None] * len(listing)
    return listing.columns.get("split", nothing)


def labels_of(listing: Listing, kept: list[int], column: str = "label") -> list[str | None]:
    """Return the labels of the files at ``kept``, None where there are none.

    Raises UserError where another column than ``label`` was asked for, and is not there.
    """
    if column != "label" and column not in listing.columns:
        listing.labels(column)
    # Labels are welcome here, not needed: a manifest's may have gaps, and a folder may have no sub-folders at all.
    labels: list[str | None]
    if listing.rows:
        labels = listing.columns.get(column, [None] * len(listing))
    else:
        try:
            labels = [*listing.labels()]
        except UserError:
            labels = [None] * len(listing)
    return [labels[i] for i in kept]


def _names(listing: Listing) -> list[str]:
    names = [listing.name(i) for i in range(len(listing))]
    for name in names:
        if not name.isprintable() and "\udc80" <= max(name) <= "\udcff":
            raise UserError(f"{name!r} is not a name in UTF-8, which is all that parquet holds; rename the file")
    return names


def _check(out: Path) -> None:
    if out.suffix != ".parquet":
        raise UserError(f"{out}: the vectors are written as parquet, so the name must end in .parquet")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: {'is a folder' if out.is_dir() else 'its folder cannot be written to'}")
