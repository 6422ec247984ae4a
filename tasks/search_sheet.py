"""The contact sheet of a search: small pictures of what was found, as one PNG or as a page complete in itself."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from PIL.Image import Resampling

from mmssl.data import inline
from mmssl.data.guard import BrokenFile, guarded
from mmssl.errors import UnusableData, UserError
from modalities.abilities import Moves, Sounds
from modalities.encoder import DECODE_TIMEOUT, Encoder
from modalities.text_read import Document
from tasks.panels import Block, Line, Panel, Shot, legible, read_signal
from tasks.panels_media import view_of
from tasks.panels_page import fit, write_panel
from tasks.panels_retrieval import written
from tasks.report import Picture, Strip, Table, write_report
from tasks.search_index import Hit

SUFFIXES = (".html", ".png")
SIDE = 192
"""Pixels of a picture's longer side."""


def checked(out: Path) -> Path:
    """Return ``out``; UserError where its suffix is unknown or it cannot be written."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"{out}: a contact sheet is a picture or a page, so the name must end in .png or .html")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: {'is a folder' if out.is_dir() else 'its folder cannot be written to'}")
    return out


def write_sheet(
    out: Path, title: str, note: str, asked: tuple[str, Picture], hits: Sequence[tuple[Hit, str]], encoder: Encoder
) -> None:
    """Write a sheet of what was ``asked``, its name and picture, and of ``hits``, each with its name, best first.

    A file that can no longer be read has its reason in the place of its picture.
    """
    cards = [("asked", legible(asked[0]), asked[1])]
    for i, (hit, name) in enumerate(hits, 1):
        cards.append((f"{i}   {hit['score']:.3f}", legible(name), thumbnail(encoder, hit["path"])))
    if out.suffix.lower() == ".png":
        blocks = [Block(head, [Line(name, [Shot("", picture)])]) for head, name, picture in cards]
        write_panel(out, Panel(title, note, blocks, side=SIDE))
        return
    columns = [[(f"{head}\n{name}", picture)] for head, name, picture in cards]
    rows = [[str(i), f"{hit['score']:.4f}", legible(name)] for i, (hit, name) in enumerate(hits, 1)]
    found = Strip("Found", "Best first, with the cosine similarity.", columns)
    write_report(out, title, note, [found, Table("Files", "The same, by name.", ["", "score", "file"], rows)])


def thumbnail(encoder: Encoder, path: str, side: int = SIDE) -> Picture:
    """Return a file as a small picture, uint8 [h, w, 3] with a longer side of ``side`` at most.

    A picture is shown as it is; of a video the middle frame that the encoder sees, of a sound its spectrogram, of a
    text its beginning. Where the file cannot be read, the reason is written.
    """
    try:
        if encoder.modality == "image":
            return fit(np.asarray(guarded(encoder.decode, path, DECODE_TIMEOUT)), side, side)
        if encoder.modality == "text":
            return fit(written(_text(encoder, path)), side, side)
        view = view_of(encoder, read_signal(encoder.config, path))
    except BrokenFile as broken:
        return written(broken.reason)
    except UnusableData as broken:
        return written(str(broken).removeprefix(f"{path}: "))
    if isinstance(view.kind, Moves):
        frames = view.kind.motion(view.x, view.signal)
        return fit(frames[len(frames) // 2], side, side)
    if isinstance(view.kind, Sounds):
        return np.asarray(PIL.Image.fromarray(view.picture).resize((side, side), Resampling.BILINEAR))
    return fit(view.picture, side, side)


def _text(encoder: Encoder, path: str) -> str:
    text = inline.text(path)
    if text is not None:
        return text
    document: Document = guarded(encoder.decode, path, DECODE_TIMEOUT)
    return document.text
