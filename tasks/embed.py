"""Vectors of files as a parquet file, for whatever a person does with them next."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from mmssl.data.listing import Listing
from mmssl.errors import UserError
from mmssl.files import replacing_file
from tasks.features import ExtractOptions, Extractor, extract


@dataclass(frozen=True)
class EmbedResult:
    """What was written where."""

    out: Path
    files: int
    dim: int
    fingerprint: str
    skipped: list[tuple[str, str]]
    """(name, reason) of broken files that were left out on request."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        skipped = [{"path": path, "reason": reason} for path, reason in self.skipped]
        facts = {"out": str(self.out), "files": self.files, "dim": self.dim, "fingerprint": self.fingerprint}
        return {"task": "embed", **facts, "skipped": skipped}

    def render(self, console: Console) -> None:
        """Print what a person wants to know."""
        text = f"{self.out}: {self.files} vectors of {self.dim} values"
        if self.skipped:
            text += f"; {len(self.skipped)} broken files left out"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def embed(encoder: Extractor, listing: Listing, out: Path | str, **options: Unpack[ExtractOptions]) -> EmbedResult:
    """Write ``out``, one row per file: path, split and label (text or null) and vector (float32, all of one length).

    Paths are relative to the listing's folder; the schema's metadata holds the encoder's fingerprint. Raises UserError,
    before anything is computed, where ``out`` does not end in .parquet or cannot be written, and as ``extract``.
    """
    out = Path(out)
    _check(out)
    features = extract(encoder, listing, **options)
    kept, dim = features.kept, features.vectors.shape[1]
    files = listing.select(kept)
    nothing: list[str | None] = [None] * len(kept)
    fingerprint = encoder.fingerprint()
    columns = {
        "path": pa.array(_names(files), pa.string()),
        "split": pa.array(files.columns.get("split", nothing), pa.string()),
        "label": pa.array(labels_of(listing, kept), pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(features.vectors.numpy().ravel()), dim),
    }
    with replacing_file(out) as aside:
        pq.write_table(pa.table(columns, metadata={"mmssl.fingerprint": fingerprint}), aside)
    return EmbedResult(out, len(kept), dim, fingerprint, features.skipped)


def labels_of(listing: Listing, kept: list[int]) -> list[str | None]:
    """Return the labels of the files at ``kept``, None where there are none."""
    # Labels are welcome here, not needed: a manifest's may have gaps, and a folder may have no sub-folders at all.
    labels: list[str | None]
    if listing.rows:
        labels = listing.columns.get("label", [None] * len(listing))
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
