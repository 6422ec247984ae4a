"""What is searched, and where its index is: the modality of a folder's files, and the file of vectors."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mmssl.data.fragment import file_of
from mmssl.data.listing import list_files
from mmssl.errors import UserError, nearest, sibling
from modalities.encoder import MODALITIES
from modalities.joint import Tower
from tasks.features import default_cache
from tasks.search_file import FORMAT, Facts
from tasks.zero_shot_classifier import TEXT

LONGEST_NAME = 220
"""Bytes of an index's name: what is beside it for a moment is called longer, and file systems take 255."""


def modality_of(towers: Mapping[str, Tower], folder: Path, asked: str | None, where: str) -> str:
    """Return the modality of the files; raises UserError where that is not one."""
    if asked is not None:
        if asked not in towers:
            raise UserError(f"{where} has no tower of modality '{asked}'{nearest(asked, towers)}")
        return asked
    names = [name for name in towers if name != TEXT] or [TEXT]
    if len(names) > 1:
        if not os.path.exists(file_of(str(folder))):  # noqa: PTH110 - as in list_files
            raise UserError(f"{folder} does not exist{sibling(folder)}")
        there = {name: _holds(folder, name) for name in names}
        words = f"{', '.join(names[:-1])} or {names[-1]}"
        # Numbered pictures may be the frames of a film, but they are pictures.
        names = [name for name in names if there[name] == "files"] or [name for name in names if there[name]]
        if not names:
            texts = f"; texts are searched by --modality {TEXT}" if TEXT in towers else ""
            raise UserError(f"{folder} holds no file of modality {words}{texts}")
    if len(names) > 1:
        words = f"{', '.join(names[:-1])} and {names[-1]}"
        raise UserError(f"{folder}: {where} reads {words}; say which by modality (--modality {names[0]})")
    return names[0]


def _holds(folder: Path, modality: str) -> Literal["files", "others", None]:
    """Return whether there are files with the suffixes of a modality, or only what may be of it, or nothing."""
    kind = MODALITIES[modality]
    try:
        listing = list_files(folder, kind)
    except UserError:
        return None
    suffixes = (os.path.splitext(file_of(path))[1].lower() for path in listing.paths)  # noqa: PTH122
    return "files" if any(suffix in kind.suffixes for suffix in suffixes) else "others"


def default_file(facts: Facts) -> Path:
    """Return where the index of this is by default, in the user's cache folder."""
    # The format is in the name: what another mmssl has written is left to it.
    key = json.dumps([FORMAT, facts.fingerprint, facts.folder, facts.split])
    return default_cache().parent / "search" / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.arrow"


def checked(index: Path) -> Path:
    """Return where an index is to be; raises UserError where no file can be."""
    if index.is_dir() or not index.parent.is_dir():
        what = "is a folder" if index.is_dir() else f"cannot be: the folder {index.parent} does not exist"
        raise UserError(f"--index {index} {what}; name a file")
    if index.exists() and not index.is_file():
        raise UserError(f"--index {index} is no regular file")
    if len(os.fsencode(index.name)) > LONGEST_NAME:
        raise UserError(f"--index {index.name}: a name of more than {LONGEST_NAME} bytes; choose a shorter one")
    return Path(os.path.realpath(index))  # what a link leads to is written, not the link
