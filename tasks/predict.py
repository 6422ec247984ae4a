"""Prediction: a classifier and files in, class names and scores out."""

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmssl.contracts import Media
from mmssl.data import inline
from mmssl.data.listing import Listing, list_files
from mmssl.errors import UserError
from mmssl.files import replacing_file
from modalities.classifier import Classifier, Prediction
from tasks.build import default_device
from tasks.features import extract

MOST_COLUMNS = 5
"""Classes that a table has room for."""
SUFFIXES = (".jsonl", ".csv", ".parquet")
_URL = re.compile(r"(?!data:,)(data:|[a-z][a-z0-9+.-]+:/)", re.IGNORECASE)


@dataclass(frozen=True)
class PredictResult:
    """What a classifier says about files."""

    predictions: list[tuple[str, list[Prediction]]]
    """For each file its path and {"label", "score"}, best first."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of broken files that were left out on request."""
    out: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {"task": "predict", "files": self.as_list()}

    def as_list(self) -> list[dict[str, Any]]:
        """Return {"path", "predictions"} per file for JSON; a file left out has none of them, and its "error"."""
        whole = [{"path": path, "predictions": best} for path, best in self.predictions]
        return whole + [{"path": path, "predictions": [], "error": reason} for path, reason in self.skipped]

    def render(self, console: Console) -> None:
        """Print a row per file, or where the result went."""
        if self.out is not None:
            console.print(f"{self.out}: predictions for {len(self.predictions)} files", markup=False, soft_wrap=True)
        else:
            named = len(self.predictions[0][1])
            table = Table(box=SIMPLE_HEAD)
            table.add_column("file", overflow="fold")
            for place in range(min(named, MOST_COLUMNS)):
                table.add_column("most likely" if place == 0 else str(place + 1), overflow="fold")
            for path, best in self.predictions:
                cells = (f"{escape(one['label'])} {one['score']:.1%}" for one in best[:MOST_COLUMNS])
                table.add_row(escape(path), *cells)
            console.print(table)
            if named > MOST_COLUMNS:
                console.print(f"the first {MOST_COLUMNS} of {named}; --json and --out have all of them")
        for path, reason in self.skipped:
            console.print(f"{path}: left out ({reason})", markup=False, soft_wrap=True)


def predict(
    classifier: str | Path | Classifier,
    paths: str | Path | Sequence[str | Path],
    *,
    top: int = 5,
    out: str | Path | None = None,
    split: str | None = None,
    skip_broken: bool = False,
) -> PredictResult:
    """Classify files, and all files of folders and manifests (or their ``split``); ``top`` is how many classes to name.

    ``out`` is written as JSON lines (one object per file), CSV or parquet (one row per file and class), by its suffix.
    Raises UserError for a mistake, before anything is computed, and UnusableData for a broken file unless
    ``skip_broken``.
    """
    if top < 1:
        raise UserError(f"--top {top}: give a number from 1")
    out = None if out is None else checked(Path(out))
    if not isinstance(classifier, Classifier):
        classifier = Classifier(classifier).to(default_device())
    files, names = listed(classifier.encoder.kind, [paths] if isinstance(paths, str | Path) else paths, split)
    found = extract(classifier, files, skip_broken=skip_broken, cache=None)
    best = classifier.ranked(found.vectors, top)
    kept = set(found.kept)
    left = [names[i] for i in range(len(files)) if i not in kept]
    result = PredictResult(
        [(names[i], one) for i, one in zip(found.kept, best, strict=True)],
        [(name, reason) for name, (_, reason) in zip(left, found.skipped, strict=True)],
        out,
    )
    if out is not None:
        write(result, out)
    return result


def listed(kind: Media, paths: Sequence[str | Path], split: str | None = None) -> tuple[Listing, list[str]]:
    """Return the files that paths mean as one listing, and each file's path as the person would write it."""
    files: list[str] = []
    names: list[str] = []
    for path in map(Path, paths):
        no_url(path)
        found = list_files(path, kind, split=split)
        one = found.paths == [os.path.abspath(path)]  # noqa: PTH100 - a folder of frames is a file too
        base = path.parent if one or not path.is_dir() else path
        files += found.paths
        # A text that stands in a manifest lies in no folder.
        texts = [inline.text(one) is not None for one in found.paths]
        names += [found.name(i) if is_text else str(base / found.name(i)) for i, is_text in enumerate(texts)]
    return Listing(Path.cwd(), files), names


def no_url(path: str | Path) -> None:
    """Raise UserError for what is a URL and no path."""
    if _URL.match(str(path)):
        # A Path has lost one of the slashes.
        url = re.sub(r"^([^/]*:)/(?!/)", r"\1//", str(path))
        raise UserError(f"{url} is a URL, and nothing is downloaded here; save it and give the file")


def checked(out: Path) -> Path:
    """Return ``out``; UserError where its suffix is unknown or it cannot be written."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"{out}: predictions are written as {', '.join(SUFFIXES)}, so the name must end in one of them")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: {'is a folder' if out.is_dir() else 'its folder cannot be written to'}")
    return out


def write(result: PredictResult, out: Path) -> None:
    """Write predictions to a file, in the form that its suffix names."""
    rows = [
        {"path": path, "rank": rank, **one} for path, best in result.predictions for rank, one in enumerate(best, 1)
    ]
    with replacing_file(out) as aside:
        try:
            if out.suffix == ".jsonl":
                lines = (json.dumps(one) + "\n" for one in result.as_list())
                aside.write_text("".join(lines), encoding="utf-8")
            elif out.suffix == ".csv":
                with aside.open("w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, ["path", "rank", "label", "score"])
                    writer.writeheader()
                    writer.writerows(rows)
            else:
                pq.write_table(pa.Table.from_pylist(rows), aside)
        except UnicodeEncodeError as error:
            raise UserError(f"{out}: {error.object!r} is no UTF-8; rename it or write .jsonl") from None
