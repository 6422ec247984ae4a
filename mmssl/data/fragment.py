"""Pieces of a file: a path may end in ``#t=START,END``, in seconds, as W3C media fragments have it.

So a piece is a path like any other: in listings, ledgers, tables of results and on the command line.
"""

import math
import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from mmssl.data import paths
from mmssl.data.parts import container

_FRAGMENT = re.compile(r"#t=(\d+(?:\.\d+)?)?(?:,(\d+(?:\.\d+)?))?$")


class Span(NamedTuple):
    """A file, and which part of it is meant: from ``start`` to before ``end``, in seconds; None is the file's end."""

    file: str
    start: float = 0.0
    end: float | None = None


def split(path: str) -> Span:
    """Return the file and the piece that ``path`` means; the whole file where it has no fragment."""
    match = _FRAGMENT.search(path)
    if match is None or match.end() - match.start() == len("#t="):
        return Span(path)
    start, end = match.groups()
    return Span(path[: match.start()], float(start or 0), None if end is None else float(end))


def join(file: str, start: float | None, end: float | None) -> str:
    """Return the path of a piece; raises ValueError where it is none: not finite, negative, or nothing in it."""
    if start is None and end is None:
        return file
    first, last = start or 0.0, math.inf if end is None else end
    if not 0 <= first < last or math.isnan(last) or end == math.inf:
        raise ValueError(f"a piece goes from a time to a later one, in seconds, but got {start} to {end}")
    return f"{file}#t={_plain(first)}" + ("" if end is None else f",{_plain(end)}")


def file_of(path: str) -> str:
    """Return the file that ``path`` is, or is a piece of."""
    return split(path).file


def _plain(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def real(path: str) -> Span:
    """Return what a path leads to, whatever its spelling: the file behind all links, and the piece."""
    span = split(path)
    there = container(span.file)
    if paths.url(there) is not None:
        return span
    return span._replace(file=os.path.realpath(there) + span.file[len(there) :])


def overlapping(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """Return the paths of ``b`` that share a moment, or all of a file, with one of ``a``."""
    pieces: dict[str, list[tuple[float, float]]] = {}
    for file, start, end in map(real, a):
        pieces.setdefault(file, []).append((start, math.inf if end is None else end))
    covered = {file: _merged(sorted(spans)) for file, spans in pieces.items()}
    return [path for path in b if _meets(covered, real(path))]


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _meets(covered: dict[str, list[tuple[float, float]]], span: Span) -> bool:
    spans = covered.get(span.file, [])
    # The last one that begins before the piece ends.
    before = bisect_left(spans, math.inf if span.end is None else span.end, key=itemgetter(0))
    return before > 0 and spans[before - 1][1] > span.start
