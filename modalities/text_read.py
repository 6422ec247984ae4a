"""Reading texts: UTF-8 files as a whole or in part, and their sentences."""

import codecs
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Literal

import numpy as np

from mmssl.data import inline
from mmssl.data.guard import BrokenFile

MAX_BYTES = 2**26
"""Size above which a text is not read as a whole: 67 MB, a dozen times the length of the Bible."""
LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character."""

Lines = Literal["end", "wrapped"]
"""end: the end of a line ends a sentence too. wrapped: lines are broken anywhere, and an empty one ends a sentence."""

# Possessive and looking behind, so that a run of stops is looked at once, however long it is.
_STOP = r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+(?=\s)|[。！？]++[」』”’]*+"  # noqa: RUF001
_ENDS: dict[Lines, re.Pattern[str]] = {
    "end": re.compile(rf"{_STOP}|\n"),
    "wrapped": re.compile(rf"{_STOP}|\n[^\S\n]*+\n"),
}
_WORD = re.compile(r"[\w.]*$")
_LONGEST_ABBREVIATION = 12
_ABBREVIATIONS = frozenset(
    "approx cf ch dept dr eq ed fig figs gen gov inc jr lt ltd mr mrs ms mt p pp prof rev sr st vol vs".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Document:
    """A decoded text: lines end in a line feed, and there is no byte-order mark."""

    text: str


def read(path: str) -> Document:
    """Return a whole text, of a file or of the path itself; raises BrokenFile, or what ``guarded`` makes one of."""
    if path.startswith(inline.PREFIX):
        return _inline(path)
    with Path(path).open("rb") as file:
        if _size(file) > MAX_BYTES:
            raise BrokenFile(f"absurdly large to be read as a whole: more than {MAX_BYTES // 10**6} MB of text")
        return _decoded(file.read(), 0, last=True)


def excerpts(path: str, rngs: Sequence[np.random.Generator], most: int) -> list[Document]:
    """Return a text, for each generator, or a random part of ``most`` bytes of one that is longer; raises as ``read``.

    Only the parts are read, so what is wrong elsewhere is not found.
    """
    if path.startswith(inline.PREFIX):
        return [_inline(path)] * len(rngs)
    with Path(path).open("rb") as file:
        size = _size(file)
        if size <= most:
            return [_decoded(file.read(), 0, last=True)] * len(rngs)
        parts = []
        for rng in rngs:
            start = int(rng.integers(size - most + 1))
            file.seek(start)
            parts.append(_decoded(file.read(most), start, last=start + most == size))
        return parts


def sentences(text: str, lines: Lines = "end") -> list[str]:
    """Split a text at ., ! and ? before white space, behind closing quotes, and at lines as told.

    A single point behind a letter or a well-known abbreviation ends nothing. White space within a sentence becomes one
    space; nothing else is changed or left out.
    """
    found, start = [], 0
    for match in _ENDS[lines].finditer(text):
        if match.group() == "." and _abbreviates(text, match.start()):
            continue
        found.append(text[start : match.end()])
        start = match.end()
    plain = (" ".join(sentence.split()) for sentence in [*found, text[start:]])
    return [sentence for sentence in plain if sentence]


def bounded(sentences: Sequence[str], length: int) -> list[bytes]:
    """Return sentences as UTF-8, those of more than ``length`` bytes (at least 4) in pieces of at most as many."""
    pieces = []
    for sentence in sentences:
        data, start = sentence.encode(), 0
        while start < len(data):
            end = boundary(data, start + length)
            pieces.append(data[start:end])
            start = end
    return pieces


def boundary(data: bytes, at: int) -> int:
    """Return the last place up to ``at`` where a character of UTF-8 text begins, or its end."""
    at = min(at, len(data))
    while 0 < at < len(data) and _continues(data[at]):
        at -= 1
    return at


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _size(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def _inline(path: str) -> Document:
    """Return the text that a path is. Its faults are found here: nobody can look for them in a file."""
    try:
        data = (inline.text(path) or "").encode()
    except UnicodeEncodeError as error:
        raise BrokenFile(f"not a text: half a character (a lone surrogate) at {error.start}") from None
    except UnicodeDecodeError as error:
        raise BrokenFile(f"not UTF-8 text: byte 0x{error.object[error.start]:02x} at {error.start}") from None
    if not data:
        raise BrokenFile("empty text")
    return _decoded(data, 0, last=True)


def _decoded(data: bytes, start: int, last: bool) -> Document:
    """Decode bytes found at ``start``; characters that are cut through, at either end, are left out."""
    if not data:
        raise BrokenFile("empty file")
    if b"\0" in data:
        raise BrokenFile("not a text: there are NUL bytes in it")
    skipped = 0
    while start and skipped < min(len(data), LONGEST_CHARACTER - 1) and _continues(data[skipped]):
        skipped += 1
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[skipped:], final=last)
    except UnicodeDecodeError as error:
        at = skipped + error.start
        raise BrokenFile(f"not UTF-8 text: byte 0x{data[at]:02x} at {start + at}") from None
    if not text.removeprefix("\ufeff").strip():
        raise BrokenFile("no text in it but white space")
    return Document(text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"))


def _abbreviates(text: str, stop: int) -> bool:
    match = _WORD.search(text[max(0, stop - _LONGEST_ABBREVIATION) : stop])
    word = match.group() if match else ""
    letters = word.split(".")
    if all(len(letter) == 1 and letter.isalpha() for letter in letters) and (len(letters) > 1 or word.isupper()):
        return word != "I"  # e.g. and J., but not "So do I."
    return word.lower() in _ABBREVIATIONS
