"""The contact sheet of a search: small pictures of what was found, as one PNG or as a page complete in itself."""

import os
from collections.abc import Sequence
from pathlib import Path

from mmssl.data.guard import BrokenFile
from mmssl.errors import UserError
from mmssl.files import legible
from modalities.encoder import DECODE_TIMEOUT
from tasks.panels import Block, Line, Panel, Shot
from tasks.panels_page import fit, write_panel
from tasks.panels_retrieval import written
from tasks.report import Picture, Strip, Table, write_report
from tasks.search_index import Hit
from tasks.thumbnails import isolated_thumbnail

SUFFIXES = (".html", ".png")
SIDE = 192
"""Pixels of a picture's longer side."""


def checked(out: Path, like: str | Path | None = None) -> Path:
    """Return ``out``; UserError where its suffix is unknown, it cannot be written, or it is the file ``like``."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"{out}: a contact sheet is a picture or a page, so the name must end in .png or .html")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: {'is a folder' if out.is_dir() else 'its folder cannot be written to'}")
    if out.exists() and not out.is_file():
        raise UserError(f"{out} is no regular file")
    if like is not None and out.exists() and Path(like).exists() and out.samefile(like):
        raise UserError(f"{out} is the example itself; give the contact sheet another name")
    return out


def write_sheet(
    out: Path, title: str, note: str, like: tuple[str, Picture] | None, hits: Sequence[tuple[Hit, str]], modality: str
) -> None:
    """Write a sheet of the example, its name and picture, and of ``hits``, each with its name, best first.

    A file that can no longer be read has its reason in the place of its picture.
    """
    cards = [] if like is None else [("like this", legible(like[0]), like[1])]
    for i, (hit, name) in enumerate(hits, 1):
        cards.append((f"{i}   {hit['score']:.3f}", legible(name), shown(hit["path"], modality)))
    if out.suffix.lower() == ".png":
        blocks = [Block(head, [Line(name, [Shot("", picture)])]) for head, name, picture in cards]
        write_panel(out, Panel(title, note, blocks, side=SIDE))
        return
    columns = [[(f"{head}\n{name}", picture)] for head, name, picture in cards]
    rows = [[str(i), f"{hit['score']:.4f}", legible(name)] for i, (hit, name) in enumerate(hits, 1)]
    found = Strip("Found", "Best first, with the cosine similarity.", columns, narrow=False)
    write_report(out, title, note, [found, Table("Files", "The same, by name.", ["", "score", "file"], rows)])


def shown(path: str, modality: str) -> Picture:
    """Return a file as a small picture (``thumbnail``); where it cannot be read, the reason is written."""
    try:
        picture = isolated_thumbnail(path, modality, SIDE, DECODE_TIMEOUT)
    except BrokenFile as broken:
        picture = written(broken.reason)
    return fit(picture, SIDE, SIDE)
