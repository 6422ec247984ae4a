"""Files inside other files, whose paths say where: members of tars and cells of tables."""

import os
from collections.abc import Hashable
from typing import Any, TypeAlias

from mmssl.data import paths
from mmssl.data.cells import Cell
from mmssl.data.tars import TarMember

Part: TypeAlias = TarMember | Cell
"""A file of ``size`` bytes inside another one, its ``container``; its ``str`` is its path, ``read`` gives its bytes."""


def part(file: str) -> Part | None:
    """Return what is inside another file, or None for a path that is a file by itself; not for pieces (``#t=``)."""
    return TarMember.parse(file) or Cell.parse(file)


def container(file: str) -> str:
    """Return the file that there is: the one that a part is inside of, else the path itself."""
    found = part(file)
    return file if found is None else found.container


def stamp(file: str) -> list[Any]:
    """Return what changes when a file, or the one that it is inside of, is written anew; see ``paths.stamp``.

    Of a folder of frames it is that of every frame: one that is replaced leaves the folder's own as it was.
    """
    there = container(file)
    try:
        if paths.url(there) is None and os.path.isdir(there):  # noqa: PTH112 - a Path per file is slow for a million
            # Frames are files in it: what lies deeper, perhaps behind links that go in circles, is none.
            entries = sorted(os.scandir(there), key=lambda one: one.name)
            return [[entry.name, *paths.stamp(entry.path)] for entry in entries]
    except OSError:
        return [None, None]
    return paths.stamp(there)


def block(file: str) -> Hashable:
    """Return what is the same for files that are read together: their tar, or their row group; else the file itself."""
    found = part(file)
    if isinstance(found, Cell):
        return found.table, found.group()
    return file if found is None else found.container
