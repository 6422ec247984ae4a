"""What belongs together: rows of a manifest, or files of one name, with media of several modalities in each.

A manifest has a column per modality: ``image_path``, ``video_path``, ``audio_path``, ``text_path``. Texts may stand in
the manifest itself, under ``caption``; and what ``path`` holds is of the one modality that no other column gives. In a
folder without a manifest, ``a/b.jpg`` and ``a/b.txt`` belong together.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmssl.contracts import Media
from mmssl.data import paths
from mmssl.data.cells import something
from mmssl.data.listing import ITSELF, MANIFESTS, Columns, Listing, check_there, list_files, own_column, resolve
from mmssl.data.tables import Table, table_at
from mmssl.errors import UserError, nearest


def list_pairs(
    path: str | Path,
    kinds: Sequence[Media],
    split: str | None = None,
    default_split: str | None = None,
    strict: bool = True,
) -> Listing:
    """Return rows with media of two or more modalities; the first of ``kinds`` is the one that the others go with.

    ``Listing.media`` holds each row's paths, None where it has none of a modality; the paths of the listing itself are
    those of the first that a row has. Of more than two modalities a row needs not have all. ``split`` and
    ``default_split`` as in ``list_files``. Raises UserError, one sentence, for a path without such rows and, if
    ``strict``, for a row without two of them; else rows may lack any.
    """
    root = paths.given(path)
    check_there(root, str(root))
    table = table_at(str(root), kinds)
    if table is None and not paths.is_folder(str(root)):
        raise UserError(f"{root} is neither a folder nor a manifest ({', '.join(MANIFESTS)})")
    listing = _by_name(root, kinds) if table is None else _rows(root, table, kinds)
    if split is None and default_split in listing.columns.get("split", []):
        split = default_split
    listing = listing if split is None else listing.split(split)
    if strict:
        _check(listing, kinds)
    return listing


def _rows(root: Path | str, table: Table, kinds: Sequence[Media]) -> Listing:
    media = {kind.name: _column(table, kind, kinds) for kind in kinds}
    count = len(next(iter(media.values())))
    if not count:
        raise UserError(f"{table.where} lists nothing")
    columns: Columns = {name: [*map(something, values)] for name, values in table.columns.items()}
    return _listing(root, media, columns, range(1, count + 1))


def _column(table: Table, kind: Media, kinds: Sequence[Media]) -> list[str | None]:
    """Return where each row's medium of a kind is, an absolute path or the text itself; None where it has none."""
    where, columns, _ = table
    own = own_column(columns, kind)
    if own is not None:
        return [*map(something, resolve(table, own, kind))]
    without = [one.name for one in kinds if own_column(columns, one) is None]
    if "path" in columns and without == [kind.name]:
        return [*map(something, resolve(table, "path", kind))]
    has, missing = ", ".join(columns) or "none", [name for one in without for name in _names(one)]
    if "path" in columns:
        raise UserError(
            f"{where} does not say which of {' and '.join(without)} its path is of: all but one need a column of "
            f"their own ({', '.join(missing)}), but it has {has}{_misspelt(columns, missing)}"
        )
    ways = [*_names(kind.name), "path"]
    raise UserError(
        f"{where} says nothing of modality {kind.name}: it needs a column {' or '.join(ways)}, but has "
        f"{has}{_misspelt(columns, ways)}"
    )


def _names(modality: str) -> list[str]:
    return [f"{modality}_path", *([ITSELF[modality]] if modality in ITSELF else [])]


def _misspelt(columns: Columns, missing: Sequence[str]) -> str:
    """Return which column may be one that is missing; nothing where none is close."""
    others = [name for name in columns if name != "path" and not name.endswith("_path")]
    hints = (nearest(name, others) for name in missing)
    return next((hint for hint in hints if hint.startswith("; did you mean")), "")


def _by_name(root: Path | str, kinds: Sequence[Media]) -> Listing:
    """Return the files of a folder that have one name but for the suffix."""
    found: dict[str, dict[str, str | None]] = {}
    for kind in kinds:
        for path in list_files(root, kind).paths:
            stem = os.path.splitext(path)[0]  # noqa: PTH122 (strings: there may be a million)
            row = found.setdefault(stem, {})
            if kind.name in row:
                raise UserError(
                    f"{root}: {path} and {row[kind.name]} have one name; which of them belongs to the rest?"
                )
            row[kind.name] = path
    rows = [row for _, row in sorted(found.items()) if len(row) > 1]
    if not rows:
        names = " and ".join(kind.name for kind in kinds)
        raise UserError(
            f"{root}: no files of {names} belong together: give them one name (a.jpg and a.txt), or write a manifest"
        )
    return _listing(root, {kind.name: [row.get(kind.name) for row in rows] for kind in kinds}, {}, ())


def _listing(root: Path | str, media: Mapping[str, list[str | None]], columns: Columns, rows: Sequence[int]) -> Listing:
    first = [next(filter(None, row), "") for row in zip(*media.values(), strict=True)]
    return Listing(root, first, columns, rows=rows, media=dict(media))


def _check(listing: Listing, kinds: Sequence[Media]) -> None:
    first, *others = (kind.name for kind in kinds)
    for i in range(len(listing)):
        there = {name for name, files in listing.media.items() if files[i] is not None}
        if first not in there or len(there) < 2:
            missing = first if first not in there else " or ".join(others)
            row = f"row {listing.rows[i]}" if listing.rows else listing.name(i)
            raise UserError(f"{listing.root}: {row} has no {missing}, so that there is nothing that belongs together")
